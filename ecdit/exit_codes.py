"""The exit codes of training that a launcher knows. This module imports nothing."""

PREEMPTED = 42  # SIGTERM came, and training saved its state before it ended
HUNG = 43  # the watchdog ended a process that made no progress
INTERRUPTED = 130  # Ctrl-C: the user ended it, so no launcher starts it again
