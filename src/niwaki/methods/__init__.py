"""Compression methods, one file each, and their registry. A method reads no file and chooses no device."""
