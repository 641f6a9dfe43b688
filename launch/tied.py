"""Runs a command that is told to save and end when its parent dies: `python -m launch.tied PARENT_ID COMMAND...`.

Becomes the command, so that its process id and exit code are the command's. Linux alone can tie; elsewhere it does not.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

from ecdit.exit_codes import PREEMPTED

PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>: outlasts the exec, and no child inherits it


def main(argv: Sequence[str]) -> None:
    """Ends with PREEMPTED, as training does after SIGTERM, if the parent has died already."""
    parent, *command = argv
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != int(parent):
            sys.exit(PREEMPTED)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
