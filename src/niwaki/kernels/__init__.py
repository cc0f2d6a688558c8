"""Fast paths and their slow references. A kernel is a leaf: it takes tensors and imports no other part."""
