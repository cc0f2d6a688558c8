"""Contextual sparsity: units of a decoder, their importance, the predictor, and the runtime that skips units.

Training data and the compression job are in `compression`, the options in `methods.shadow`.
"""
