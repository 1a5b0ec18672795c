"""The served model's files, tokenizer and processor. Knows nothing of engines."""
