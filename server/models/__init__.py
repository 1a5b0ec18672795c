"""Model files: their catalogue, conversion, fingerprint and tokenizer, and the dtype for the CPU. Knows no engine."""
