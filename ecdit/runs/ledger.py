"""Books every second of a run's life, in `<workdir>/goodput/`: a file of JSON for each start, written again and again.

A process that is killed loses what it did since its file was last written. That time counts as `down`, and so does all
time between the end of a start's record and the beginning of the next process.
"""

import contextlib
import dataclasses
import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from ecdit.errors import UserError
from ecdit.files import is_remote, replace_text
from ecdit.storage import children, make_directory, read_all
from ecdit.training.config import Phase

DIRECTORY = "goodput"
WRITE_SECONDS = {False: 5.0, True: 60.0}  # seconds between writes, on a disk and in a bucket
MARKS = 100  # newest saves of a start, from which a later start computes how much of its time was lost
REPEATED: tuple[Phase, ...] = ("data", "step")  # activities that are repeated after a kill, whose time was lost


@dataclasses.dataclass
class Record:
    """Holds the seconds that a start spent in each phase."""

    began: float  # Unix time of the process's start
    seen: float  # Unix time of the last entry
    first: int  # steps done when it started
    seconds: dict[str, float]  # by phase
    marks: dict[str, dict[str, float]]  # by saved step: `seconds` when that step was done


class Ledger:
    """Books the time of this process, from its start on."""

    def __init__(self) -> None:
        age, now = process_age(), time.time()
        self.record = Record(now - age, now, 0, {"start": age}, {})
        self.phase: Phase = "start"
        self.since = time.monotonic()
        self.lock, self.closed = threading.Lock(), threading.Event()
        self.path: Path | None = None
        self.thread: threading.Thread | None = None

    def enter(self, phase: Phase) -> None:
        """Books the time since the last call on the phase that ends, and begins `phase`."""
        with self.lock:
            self._book()
            self.phase = phase

    def open(self, workdir: Path, first: int) -> None:
        """Begins to write, on the first process. Call it when this process has the workdir's lock.

        `first` is how many steps are done.
        """
        self.record.first = first
        if jax.process_index() > 0:
            return
        directory = workdir / DIRECTORY
        make_directory(directory)
        numbers = [int(path.stem) for path in children(directory) if path.suffix == ".json" and path.stem.isdigit()]
        self.path = directory / f"{max(numbers, default=-1) + 1:05d}.json"
        self._write()
        pause = WRITE_SECONDS[is_remote(workdir)]
        self.thread = threading.Thread(target=self._keep_writing, args=(pause,), name="ledger", daemon=True)
        self.thread.start()

    def mark(self, step: int) -> None:
        """Notes that `step` is done and being saved."""
        with self.lock:
            self._book()
            marks = {**self.record.marks, str(step): dict(self.record.seconds)}
            self.record.marks = dict(list(marks.items())[-MARKS:])

    def close(self) -> None:
        """Writes the record to its end."""
        self.closed.set()
        if self.thread is not None:
            self.thread.join()
            self._write()

    def _book(self) -> None:
        now = time.monotonic()
        seconds = self.record.seconds
        seconds[self.phase] = seconds.get(self.phase, 0.0) + now - self.since
        self.record.seen += now - self.since
        self.since = now

    def _keep_writing(self, pause: float) -> None:
        while not self.closed.wait(pause):
            self._write()

    def _write(self) -> None:
        with self.lock:
            self._book()
            text = json.dumps(dataclasses.asdict(self.record)) + "\n"
        if self.path is not None:
            with contextlib.suppress(UserError):  # accounting must not stop a run, and the next write may succeed
                replace_text(self.path, text)


def process_age() -> float:
    """Returns the seconds since this process was started; 0 where the system does not say."""
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


def read_records(workdir: Path) -> list[Record]:
    """Returns the records of all starts of a run, in order.

    Raises:
      UserError: one of them is damaged.
    """
    paths = sorted(path for path in children(workdir / DIRECTORY) if path.suffix == ".json")
    try:
        return [Record(**json.loads(text)) for text in read_all(paths)]
    except (ValueError, TypeError) as error:
        raise UserError(f"{workdir / DIRECTORY} is damaged: {error}") from None


def account(records: Sequence[Record]) -> dict[str, float]:
    """Returns the seconds of a run's life by what they went into, `lost` and `down` included.

    Steps that a later start did again are lost: what was spent on them does not count as steps.
    """
    total: dict[str, float] = {}
    down = lost = 0.0
    for n, record in enumerate(records):
        later = records[n + 1 :]
        kept = _kept(record, min((start.first for start in later), default=None))
        for phase, seconds in record.seconds.items():
            total[phase] = total.get(phase, 0.0) + kept.get(phase, seconds)
            lost += seconds - kept.get(phase, seconds)
        if later:
            down += max(0.0, later[0].began - record.seen)
    return total | {"lost": lost, "down": down}


def life(records: Sequence[Record]) -> float:
    """Returns the seconds from the start of a run's first process to the end of its last record."""
    return records[-1].seen - records[0].began if records else 0.0


def _kept(record: Record, resumed: int | None) -> dict[str, float]:
    """Returns the seconds by REPEATED phase of a start that were not lost, where a later one went on from `resumed`."""
    if resumed is None:
        return {}
    marks = {int(step): seconds for step, seconds in record.marks.items()}
    before = [step for step in marks if step <= resumed]
    seconds = marks[max(before)] if before else {}
    return {phase: seconds.get(phase, 0.0) for phase in REPEATED}
