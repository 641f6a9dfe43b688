"""Implements `launch.sweep`: finds the points of a sweep, runs them on this machine, and collects their results."""
