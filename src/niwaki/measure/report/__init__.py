"""Presentation of measurements: one HTML file, and the numbers on a model card. No value is measured here."""
