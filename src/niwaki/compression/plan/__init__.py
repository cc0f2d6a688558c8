"""Prediction of time, memory, bytes and speed from headers alone. Nothing here writes a result."""
