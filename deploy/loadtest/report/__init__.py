"""What a run came to: records, metrics, tables, plots and a page. Sends nothing."""
