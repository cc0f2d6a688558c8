"""Models, records, servers and reports that tests share."""
