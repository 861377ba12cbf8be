"""Storage of keys and values."""
