"""Runs that differ in a few keys: what they are, running them here, and what came of them. `launch.sweep` drives it."""
