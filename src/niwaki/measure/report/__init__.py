"""A comparison as one HTML file, and as part of a model card. No number is measured here."""
