"""Samples and what to measure of them."""
