"""Models, servers and reports that tests share."""
