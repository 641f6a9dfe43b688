"""Weights in other formats."""
