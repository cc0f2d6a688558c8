"""The terminal: one file for a command or for a few related ones, and tables, options, progress.

No work is done here.
"""
