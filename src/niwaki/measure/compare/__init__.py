"""Comparison of candidates with a dense model: paired quality, speed, gates. The report page is in `report`."""
