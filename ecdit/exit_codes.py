"""Lists the exit codes of training that launchers handle. This module imports nothing."""

PREEMPTED = 42  # training received SIGTERM and saved its state before it ended
HUNG = 43  # the watchdog ended a process that made no progress
OUTAGE = 44  # a bucket or the network could not be reached, although the client retried
INTERRUPTED = 130  # the user ended it with Ctrl-C
