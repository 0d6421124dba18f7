"""The store that cache_format.md describes."""
