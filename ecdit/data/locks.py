"""Keeps several preparing processes apart by lock files, and lets workers end with their parent."""

import contextlib
import ctypes
import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path, say: Callable[[str], None], together: bool = False) -> Iterator[None]:
    """Holds a lock file alone, or `together` with others that hold it so.

    The kernel frees the lock when the process ends, even if it is killed. The file stays. Where the file system has no
    locks, it says so and goes on.
    """
    kind = fcntl.LOCK_SH if together else fcntl.LOCK_EX
    # NFS makes these locks of byte ranges, for which a shared one needs a file that can be read.
    with path.open("a+") as file:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is preparing: waiting for it ({path})")
            fcntl.flock(file, kind)
        except OSError as error:
            say(f"{path} cannot be locked ({error.strerror}): let no other process do the same here")
        yield


def lock_of(path: Path) -> Path:
    """Returns the lock file beside what several processes may prepare."""
    return path.with_name(f".{path.name}.lock")


def scratch_of(path: Path) -> Path:
    """Returns where a file or directory is while it is written, or was when its process was killed."""
    return path.with_name(f".{path.name}")


def remove_scratch(directory: Path) -> None:
    """Removes temporary files of `files.replace_text` that killed processes have left."""
    for path in directory.rglob(".*.tmp"):
        path.unlink()


def ends_with_its_parent(parent: int) -> None:
    """Makes a worker end when its parent is killed, so that it cannot disturb the next preparation. Linux only."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
