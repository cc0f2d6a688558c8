"""Contextual sparsity: units of a decoder, their importance, the predictor, and the products that skip."""
