"""Results that run: packed layers, contextual sparsity, loading through transformers. Nothing here compresses."""
