"""Results of a run: records, metrics, tables, plots and a page. Sends nothing."""
