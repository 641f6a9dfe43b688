"""Writes and reads a run's metrics, a line of JSON a step.

On a disk they are `metrics.jsonl`, in a bucket `metrics/FIRST_STEP.jsonl`, ... A resumed run writes the lines after its
checkpoint again. Both forms hold each step once, whenever a run was killed: an object in a bucket is named by its first
step, so that it replaces the one that an earlier start wrote.
"""

import json
from pathlib import Path
from typing import Any, BinaryIO

from ecdit.files import is_remote, replace_text
from ecdit.storage import AppendedObjects, children, read_all

METRICS = "metrics.jsonl"


def open_lines(workdir: Path, start_step: int) -> BinaryIO | AppendedObjects:
    """Opens the file for the lines after `start_step`, and removes lines of later steps that an earlier start wrote."""
    path = workdir / METRICS
    if not is_remote(workdir):
        drop_lines_after(path, start_step)
        return path.open("ab")
    parts = _parts(workdir)
    # The latest first: a kill in between leaves a beginning of the run without a gap.
    for part in reversed(parts):
        if _first_step(part) > start_step:
            part.unlink()
        else:
            drop_lines_after(part, start_step)
            break
    directory = path.with_suffix("")
    return AppendedObjects(lambda data: directory / f"{json.loads(data.splitlines()[0])['step']:08d}.jsonl")


def read_lines(workdir: Path) -> list[dict[str, Any]]:
    """Returns the metrics of each step in order, for a run on a disk or in a bucket.

    A line that is still being written, or that a crash has garbled, is left out.
    """
    path = workdir / METRICS
    paths = _parts(workdir) if is_remote(workdir) else [path] if path.exists() else []
    text = b"".join(read_all(paths)).decode(errors="replace")
    rows = map(_row, text.split("\n")[:-1])
    return [row for row in rows if row is not None]


def drop_lines_after(path: Path, step: int) -> None:
    """Removes the lines of steps after `step`, and an incomplete last one; a resumed run writes them again."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and (row := _row(line)) and row["step"] <= step]
    replace_text(path, "".join(kept))


def _parts(workdir: Path) -> list[Path]:
    return sorted(children((workdir / METRICS).with_suffix("")), key=_first_step)


def _first_step(part: Path) -> int:
    return int(part.stem)


def _row(line: str) -> dict[str, Any] | None:
    """Returns a line's metrics, or None for a line that a crash has garbled."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and "step" in row else None
