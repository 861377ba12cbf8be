"""The engine: requests in, samples out."""
