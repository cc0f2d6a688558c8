"""Stored records of compressed matrices: dense, masked, sparse and quantized. No product is computed here."""
