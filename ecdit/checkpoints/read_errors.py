"""Tells a damaged checkpoint from one that cannot be read at the moment; all reads of checkpoints go through `read`.

Damage is data that differs from what was saved: a failed checksum, a missing file, or files that cannot be decoded.
Everything else is not the checkpoint's fault: a disk, a network or a process that has reached its limit of open files.
A damaged checkpoint is set aside, so a mistake here would move a valid one away.
"""

import errno
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ecdit.errors import UserError, chain
from ecdit.files import is_remote
from ecdit.storage import STATUSES, is_outage

T = TypeVar("T")

RETRY_SECONDS = (1.0, 2.0, 4.0)  # pauses between attempts of a read after I/O errors

# Errors of Python and the libraries for undecodable data or a missing file. (JSON's and UTF-8's are ValueErrors.)
_UNDECODABLE = (ValueError, LookupError, TypeError, AttributeError, EOFError)
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
# Orbax raises these itself, without a number, for files that it has looked for in vain.
_MISSING_BY_NAME = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_REFUSED = (errno.EACCES, errno.EPERM)  # a retry does not help
_FAULTS = (ImportError, MemoryError, RecursionError)
# Beginnings of tensorstore's messages for errors outside the data. It appends the number of a system error.
_STATUS = re.compile(r"(UNKNOWN|ABORTED|CANCELLED|INTERNAL|UNIMPLEMENTED): ")
_STATUS_ANYWHERE = re.compile("|".join(STATUSES))
_NUMBER = re.compile(r"os_error_code='(\d+)'")


class CheckpointError(UserError):
    """A checkpoint that is missing, does not fit, or could not be written."""


class DamagedError(CheckpointError):
    """A checkpoint whose files do not hold what was saved."""


class UnreadableError(CheckpointError):
    """A checkpoint that could not be read, for a reason that is not in its files."""


def read(directory: Path, action: Callable[[], T]) -> T:
    """Returns what `action` returns, which reads the checkpoint in `directory`; repeats it after an I/O error.

    Raises:
      DamagedError: the files are missing or cannot be decoded.
      UnreadableError: they cannot be read now.
    """
    for pause in (*RETRY_SECONDS, None):
        try:
            return action()
        except CheckpointError:
            raise
        except Exception as raised:
            error = _hidden(directory) or raised
            text = f"{directory} cannot be read: {first_line(error)}"
            if is_damage(error) and _exists(directory):
                raise DamagedError(text) from error
            if pause is None or not _may_pass(error):
                raise UnreadableError(f"{text}. This is no sign of damage: nothing was moved.") from error
        time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _hidden(directory: Path) -> OSError | None:
    """Returns the error that hides a checkpoint's file on a disk from `stat`, or None.

    Orbax calls a file missing whatever `stat` reports of it.
    """
    if is_remote(directory):
        return None
    try:
        for folder, _, names in os.walk(directory, onerror=_reraise):
            for name in names:
                os.stat(os.path.join(folder, name))
    except OSError as error:
        return None if error.errno in _MISSING else error
    return None


def _reraise(error: OSError) -> None:
    raise error


def is_damage(error: BaseException) -> bool:
    """Returns whether an error of reading says that the files do not hold what was saved."""
    if is_outage(error) or any(_is_fault(one) for one in chain(error)):
        return False
    return any(isinstance(one, _UNDECODABLE) or error_number(one) in _MISSING for one in chain(error))


def error_number(error: BaseException) -> int | None:
    """Returns the number (errno) of the system's error that an exception reports, or None."""
    if isinstance(error, _MISSING_BY_NAME):
        return error.errno or errno.ENOENT
    if isinstance(error, OSError):
        return error.errno
    found = _NUMBER.search(str(error))
    return int(found.group(1)) if found else None


def first_line(error: Exception) -> str:
    """Returns the first line of an error; tensorstore appends a page about its arguments."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.split(r" \[tensorstore_spec|\. See full TensorStore", line)[0]


def _is_fault(error: BaseException) -> bool:
    number = error_number(error)
    if isinstance(error, _FAULTS) or (number is not None and number not in _MISSING):
        return True
    text = str(error)
    return bool(_STATUS.match(text) or _STATUS_ANYWHERE.search(text))


def _may_pass(error: BaseException) -> bool:
    """Returns whether the same read may succeed in a moment."""
    numbers = {error_number(one) for one in chain(error)} - {None}
    return bool(numbers - set(_REFUSED) - set(_MISSING)) and not numbers & set(_REFUSED)


def _exists(directory: Path) -> bool:
    """Returns whether a checkpoint's directory is there; if it has gone whole, a disk may have gone."""
    try:
        return directory.exists()
    except OSError:
        return False
