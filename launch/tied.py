"""Runs a command that gets SIGTERM when its parent dies: `python -m launch.tied PARENT_ID COMMAND...`.

The process becomes the command, so that it has the command's process id and exit code. Only Linux sends the SIGTERM.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

from ecdit.exit_codes import PREEMPTED

PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>, which survives exec and is not inherited by children


def main(argv: Sequence[str]) -> None:
    """Becomes the command. If the parent has already died, it exits with PREEMPTED, like training after SIGTERM."""
    parent, *command = argv
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != int(parent):
            sys.exit(PREEMPTED)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
