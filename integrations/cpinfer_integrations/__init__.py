"""Adapters to neighbours, one module each; none is imported by `cpinfer` itself."""

import cpinfer  # noqa: F401  # asks for this process's parent, before neighbours are imported
