"""Colocated rollouts (a hybrid engine): a trainer lends its model for a phase; slices of weights, mismatch."""
