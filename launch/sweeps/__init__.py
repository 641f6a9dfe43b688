"""The parts of `launch.sweep`: the points of a sweep, running them on this machine, and their results."""
