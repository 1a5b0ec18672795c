"""The prompter URIAL and its text layout. Knows nothing of the model's chat template."""
