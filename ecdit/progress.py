"""Shows how far a long work is: a bar on a terminal, and elsewhere, as in a pod's log, a plain line now and then."""

import collections
import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

EVERY = 30.0  # seconds between two lines, at least
_RECENT = 10  # lines over which the rate is taken, so that a compilation at the start soon counts no more


@contextlib.contextmanager
def progress(
    what: str, units: str, total: int | None = None, begun: int = 0, shown: bool = True
) -> Iterator[Callable[[int], object]]:
    """Yields a function that is told how many more are done; shows them on stderr, as a bar or as lines.

    Args:
      what: is done, such as "sampling".
      units: of the count, such as "images".
      total: of all; None if it is not known.
      begun: how many were done before.
      shown: False shows nothing, as on all processes but the first.
    """
    if not shown:
        yield lambda count: None
    elif sys.stderr.isatty():
        from tqdm import tqdm  # here, so that programs without long work need not have it

        with tqdm(None, what, total, unit=f" {units}", initial=begun) as bar:
            yield bar.update
    else:
        yield _Lines(what, units, total, begun).update


def each(
    items: Iterable[T], what: str, units: str, total: int | None = None, begun: int = 0, shown: bool = True
) -> Iterator[T]:
    """Yields the items, and shows how many are done; see `progress` for the arguments."""
    with progress(what, units, total, begun, shown) as update:
        for item in items:
            yield item
            update(1)


class _Lines:
    """Prints a line when something is done and the last line is `EVERY` seconds old."""

    def __init__(self, what: str, units: str, total: int | None, begun: int):
        self._what, self._units, self._total, self._done = what, units, total, begun
        self._lines = collections.deque([(time.monotonic(), begun)], _RECENT)  # when, and how many were done

    def update(self, count: int) -> None:
        """Counts, and prints a line if one is due."""
        self._done += count
        if self._total is not None and self._done >= self._total:
            return  # what comes next says that this is done
        now, (last, _), (first, before) = time.monotonic(), self._lines[-1], self._lines[0]
        if now - last >= EVERY:
            self._lines.append((now, self._done))
            line = line_of(self._what, self._units, self._done, self._total, (self._done - before) / (now - first))
            print(line, file=sys.stderr, flush=True)


def line_of(what: str, units: str, done: int, total: int | None, rate: float) -> str:
    """Returns a line about a work of which `rate` are done a second."""
    speed = f"{_short(rate)} {units}/s" if rate >= 1 or rate == 0 else f"{_short(1 / rate)} s each"
    if total is None:
        return f"{what}: {done} {units}, {speed}"
    line = f"{what}: {done} of {total} {units} ({done / max(total, 1):.0%}), {speed}"
    return line if rate == 0 else f"{line}, {duration((total - done) / rate)} left"


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def duration(seconds: float) -> str:
    """Returns a duration as text, rounded up to minutes, or from 100 minutes on to tenths of hours."""
    minutes = seconds / 60
    return f"{minutes / 60:.1f} hours" if minutes >= 100 else f"{math.ceil(minutes)} min"
