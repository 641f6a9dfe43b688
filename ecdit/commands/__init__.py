"""The evaluations of `python -m ecdit.evaluate NAME`: a file each that has the flags and calls the scorer."""
