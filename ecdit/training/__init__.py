"""Optimizer, state, step, checkpoints and the loop."""
