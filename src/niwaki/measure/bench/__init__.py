"""Speed and memory of the variants of a model, in turns with the dense one. Quality is not measured here."""
