"""The terminal: one file per command, tables, options, progress. No work is done here."""
