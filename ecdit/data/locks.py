"""What several preparing processes need: one of them at a time, and none that outlives its parent."""

import contextlib
import ctypes
import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Holds a lock file, which the end of the process frees however it comes. The file stays."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say(f"another process is preparing: waiting for it ({path})")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove_scratch(directory: Path) -> None:
    """Removes what killed processes have left of files that they were replacing: see `files.replace_text`."""
    for path in directory.rglob(".*.tmp"):
        path.unlink()


def ends_with_its_parent(parent: int) -> None:
    """Makes a worker end when its parent is killed, so that no two preparations write the same file. Linux."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
