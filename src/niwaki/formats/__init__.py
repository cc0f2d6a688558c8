"""Formats on disk: records of compressed matrices (dense, masked, sparse, quantized). No product is computed here."""
