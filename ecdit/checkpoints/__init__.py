"""Saves a run's state with checksums, finds the newest valid checkpoint, and reads it back."""
