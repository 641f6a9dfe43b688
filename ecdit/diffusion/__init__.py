"""Rectified flow: its objective, guidance and solvers, without any network."""
