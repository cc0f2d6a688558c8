"""Model requests: recipes, targets, presets, events of a job, and the sources of models and texts.

No tensor and no torch lives here.
"""
