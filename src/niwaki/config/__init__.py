"""Model requests: recipes, targets, presets, and the sources of models and texts. No tensor and no torch lives here."""
