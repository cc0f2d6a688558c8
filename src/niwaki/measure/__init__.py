"""Measurement of results: quality, speed, comparison, gates, benchmark, report. No module here changes a result."""
