"""Perplexity, divergence and tasks of one model, streamed block by block. Comparisons with intervals: `compare`."""
