"""Kernels for CPU that torch has not, in C++: compiled by the system's compiler when they are first asked for."""
