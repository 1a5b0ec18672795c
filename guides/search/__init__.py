"""Answers that are written piece by piece: sequences, transcripts, steps, lookahead. Knows no single guide."""
