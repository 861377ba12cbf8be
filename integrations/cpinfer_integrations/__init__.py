"""Adapters to neighbours, one module each; none is imported by `cpinfer` itself."""
