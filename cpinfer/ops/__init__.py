"""torch on one device: attention states and attention over plain tensors. No ranks, no pages."""
