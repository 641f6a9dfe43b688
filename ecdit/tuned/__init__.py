"""Faster forms of functions in `ecdit.models`, for TPUs and GPUs: the same results up to rounding, chosen by config."""
