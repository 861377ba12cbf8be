"""What `cpinfer train-grpo` is made of: rewards, the run with TRL, its curves."""
