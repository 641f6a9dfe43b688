"""The quarantine file: one JSON line for each rejected record.

    {"name": "00012.tar:000120034.jpg", "reason": "truncated", "detail": "image file is truncated (3 bytes ...)"}
Names come from untrusted archives, so lines are ASCII without control characters, which could act on a terminal.
`json.loads` restores the original names, including lone surrogates of undecodable bytes.
"""

import collections
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from ecdit.data import DataError
from ecdit.data.sources.protocol import Rejected

_DELETE = "\x7f"  # the only control character that JSON does not escape


class Quarantine:
    """Writes rejected records to a new file and counts them by reason; a context manager."""

    def __init__(self, path: str | os.PathLike[str]):
        self.counts: collections.Counter[str] = collections.Counter()
        self._file = Path(path).open("w", encoding="ascii", newline="\n")  # noqa: SIM115 - `close` closes it

    def add(self, rejected: Rejected) -> None:
        """Writes one line."""
        self._file.write(line_of(rejected))
        self.counts[rejected.reason] += 1

    def close(self) -> None:
        """Flushes the lines to the disk and closes the file."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> "Quarantine":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()


def line_of(rejected: Rejected) -> str:
    """Returns the line of a rejected record, with its newline."""
    fields = {"name": rejected.name, "reason": rejected.reason, "detail": rejected.detail}
    return json.dumps(fields, ensure_ascii=True).replace(_DELETE, "\\u007f") + "\n"


def read(path: str | os.PathLike[str]) -> Iterator[Rejected]:
    """Yields the rejected records of a quarantine file.

    Raises:
      DataError: a line is no rejected record.
    """
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                fields = json.loads(line.decode("ascii"))
                yield Rejected(**fields)
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(f"{path} is damaged at line {number}: {error}") from None


def merge(paths: Iterable[str | os.PathLike[str]], target: str | os.PathLike[str]) -> dict[str, int]:
    """Joins quarantine files in the given order into `target`, atomically; returns the counts by reason, most first.

    Raises:
      DataError: a line is no rejected record.
    """
    scratch = Path(f"{target}.tmp")
    with Quarantine(scratch) as merged:
        for path in paths:
            for rejected in read(path):
                merged.add(rejected)
    scratch.replace(target)
    return dict(sorted(merged.counts.items(), key=lambda item: (-item[1], item[0])))
