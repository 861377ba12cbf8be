"""What tools/gpu_check.py is made of: stages, each alone, and what they share."""
