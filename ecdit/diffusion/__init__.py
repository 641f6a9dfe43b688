"""Rectified flow: objective, guidance, solvers. No network in here."""
