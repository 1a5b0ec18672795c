"""The prompter URIAL: its text layout, styles and cleaner. Knows nothing of the model's chat template."""
