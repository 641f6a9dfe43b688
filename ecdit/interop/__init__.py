"""Writes weights in other formats."""
