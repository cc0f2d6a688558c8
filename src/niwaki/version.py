"""The version of niwaki, which results record."""

__version__ = "0.1.0"
