"""Writes and reads a run's metrics, a line of JSON a step.

On a disk they are `metrics.jsonl`, in a bucket `metrics/FIRST_STEP.jsonl`, ... A resumed run writes the lines after its
checkpoint again. Both forms hold each step once, whenever a run was killed: an object in a bucket is named by its first
step, so that it replaces the one that an earlier start wrote.
"""

import json
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, BinaryIO

from ecdit.files import is_remote, replace_bytes
from ecdit.storage import AppendedObjects, children, read_all

METRICS = "metrics.jsonl"


def open_lines(
    workdir: Path,
    start_step: int,
    say: Callable[[str], None] = lambda line: None,
    permit: Callable[[], None] = lambda: None,
) -> BinaryIO | AppendedObjects:
    """Opens the file for the lines after `start_step`, and removes lines of later steps that an earlier start wrote.

    It repairs what can be repaired (garbled lines, steps that stand twice) and says which steps are missing.

    Args:
      workdir: of the run.
      start_step: steps done.
      say: prints a line.
      permit: see `AppendedObjects`.
    """
    path = workdir / METRICS
    if not is_remote(workdir):
        _tell_gaps(drop_lines_after(path, start_step), start_step, path, say)
        return path.open("ab")
    parts = _parts(workdir)
    # The latest part goes first, so that a kill in between leaves the beginning of the run without a gap.
    for part in reversed(parts):
        if _first_step(part) > start_step:
            part.unlink()
        else:
            drop_lines_after(part, start_step)
            break
    directory = path.with_suffix("")
    if start_step:
        _tell_gaps([row["step"] for row in read_lines(workdir)], start_step, directory, say)
    return AppendedObjects(lambda data: directory / f"{json.loads(data.splitlines()[0])['step']:08d}.jsonl", permit)


def read_lines(workdir: Path) -> list[dict[str, Any]]:
    """Returns the metrics of each step in order, for a run on a disk or in a bucket.

    A line that is still being written, or that a crash has garbled, is left out; of a step that stands twice the later
    line counts.
    """
    path = workdir / METRICS
    paths = _parts(workdir) if is_remote(workdir) else [path] if path.exists() else []
    rows = map(_row, b"".join(read_all(paths)).split(b"\n")[:-1])
    by_step = {row["step"]: row for row in rows if row is not None}
    return [by_step[step] for step in sorted(by_step)]


def drop_lines_after(path: Path, step: int) -> list[int]:
    """Removes the lines of steps after `step`, which a resumed run writes again, and whatever is no line of a step.

    Of a step that stands twice the later line stays. Returns the steps that are left, in order.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    lines = ((_row(line), line) for line in data.split(b"\n")[:-1])
    kept = {row["step"]: line for row, line in lines if row is not None and row["step"] <= step}
    steps = sorted(kept)
    text = b"".join(kept[step] + b"\n" for step in steps)
    if text != data:
        replace_bytes(path, text)
    return steps


def missing_steps(steps: Collection[int], last: int) -> str:
    """Returns which of the steps 1 to `last` are missing, as "3, 7-9"; "" for none."""
    there, gaps = set(steps), []
    for step in range(1, last + 1):
        if step in there:
            continue
        if gaps and gaps[-1][1] == step - 1:
            gaps[-1][1] = step
        else:
            gaps.append([step, step])
    return ", ".join(f"{first}" if first == end else f"{first}-{end}" for first, end in gaps)


def _tell_gaps(steps: Collection[int], last: int, place: Path, say: Callable[[str], None]) -> None:
    if missing := missing_steps(steps, last):
        say(f"{place} lacks the lines of steps {missing}: they were lost, and the run does not do these steps again")


def _parts(workdir: Path) -> list[Path]:
    """Returns the objects of a run's metrics in order; others, which somebody else put there, are left alone."""
    found = children((workdir / METRICS).with_suffix(""))
    return sorted((path for path in found if re.fullmatch(r"[0-9]+\.jsonl", path.name)), key=_first_step)


def _first_step(part: Path) -> int:
    return int(part.stem)


def _row(line: bytes) -> dict[str, Any] | None:
    """Returns a line's metrics, or None for a line that a crash has garbled."""
    try:
        row = json.loads(line)
    except ValueError:  # from JSON or UTF-8
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None
