"""FlashInfer's kernels as a backend; its words (page, indptr) stay in here."""
