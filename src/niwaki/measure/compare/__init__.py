"""Candidates beside a dense model on the same tokens: measurement, intervals, gates. No page is drawn here."""
