"""The evaluations of `python -m ecdit.evaluate NAME`. Each file defines the flags of one and calls its scorer."""
