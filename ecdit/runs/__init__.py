"""Puts a run together from its experiment: trains it, opens a trained one, and checks a machine for it."""
