"""Measurement of results: quality, speed, comparison, gates, benchmark, report.

No module here changes a weight. `prompt_gate` writes its limits into a result, and `--update-card` writes its README.
"""
