"""Divides a preparation between processes, on one host or on many: each prepares a share of the parts.

Shares write into one working directory at the same time, or into directories of their own that are copied together. A
call without a share waits for those that run, prepares what is left, and joins the parts.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ecdit.data import DataError
from ecdit.data.locks import locked
from ecdit.files import replace_text

_COUNT = "shares"  # file in a working directory with the number of shares
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Share:
    """The parts whose index modulo `count` is `index`."""

    index: int
    count: int

    def __contains__(self, part: int) -> bool:
        return part % self.count == self.index

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def parse_share(text: str) -> Share:
    """Returns the share that `--share=I/N` names.

    Raises:
      DataError: the text is not I/N with 0 <= I < N.
    """
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if not found or int(found[1]) >= int(found[2]):
        allowed = "must be I/N, share I of N, with I from 0 to N - 1, such as 0/16"
        raise DataError(f"--share={text}: {allowed}")
    return Share(int(found[1]), int(found[2]))


@contextlib.contextmanager
def sharing(lock: Path, share: Share, say: Say) -> Iterator[None]:
    """Holds `lock` together with other shares, but not with a call that joins, nor with the same share again."""
    own = lock.with_name(f"{lock.stem}.share-{share.index}.lock")
    with locked(lock, say, together=True), locked(own, say):
        yield


@contextlib.contextmanager
def beginning(lock: Path, say: Say) -> Iterator[None]:
    """Lets one share at a time make or check the working directory that all of them use."""
    with locked(lock.with_name(f"{lock.stem}.begin.lock"), say):
        yield


def check_count(working: Path, share: Share) -> None:
    """Keeps the number of shares in the working directory.

    Raises:
      DataError: shares of another number have begun there, some of which would prepare the same parts.
    """
    path = working / _COUNT
    if path.exists() and path.read_text() != str(share.count):
        raise DataError(
            f"--share={share}: {working} was begun in {path.read_text()} shares; go on with that number, or without "
            f"--share, or delete {path} when no share runs"
        )
    replace_text(path, str(share.count))


def forget_count(working: Path) -> None:
    """Removes what `check_count` keeps."""
    (working / _COUNT).unlink(missing_ok=True)
