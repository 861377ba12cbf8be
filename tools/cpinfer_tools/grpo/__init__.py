"""What `tools/train_grpo.py` is made of: rewards, the run with TRL, its curves."""
