"""Hugging Face models under context parallelism. The only importer of transformers."""
