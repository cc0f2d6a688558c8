"""Candidates against a dense model: what was measured (`comparison`), and verdicts on it.

`evidence`, `metrics`, `gates` and `baseline` only read and judge what was measured: they need no torch.
"""
