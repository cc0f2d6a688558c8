"""Candidates against one dense model."""
