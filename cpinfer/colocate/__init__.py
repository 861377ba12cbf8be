"""Colocated rollouts: a trainer lends its model for a phase; slices of its weights, rollout/training mismatch."""
