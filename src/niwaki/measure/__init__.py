"""The cost of a result: quality, speed, comparison, report. Nothing here changes a result."""
