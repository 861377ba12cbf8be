"""Ranks talking to each other. The only importer of torch.distributed."""
