"""What `cpinfer gpu-check` is made of: stages, each alone, and what they share."""
