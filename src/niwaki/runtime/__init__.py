"""Running what niwaki made: packed linears, and loading them through transformers."""
