"""Parts of a recovery: what is learned, from which teacher, in which memory, and how it is written."""
