"""The exit codes of training that a launcher knows. This module imports nothing."""

PREEMPTED = 42  # SIGTERM came, and training saved its state before it ended
HUNG = 43  # the watchdog ended a process that made no progress
OUTAGE = 44  # a bucket or the network could not be reached, although the client tried again
INTERRUPTED = 130  # Ctrl-C: the user ended it, so no launcher starts it again
