"""Notices that a run's checkpoints have vanished, and starts over where the user says so.

Without them the same command would begin at step 0 and remove the metrics of all later steps.
"""

import itertools
from collections.abc import Set
from pathlib import Path

from ecdit.checkpoints.read_errors import CheckpointError
from ecdit.checkpoints.restore import checkpoint_directory
from ecdit.reporting.metrics_file import METRICS, read_lines
from ecdit.reporting.profiling import PROFILE
from ecdit.reporting.writers import TENSORBOARD, WANDB_ID
from ecdit.runs.kept_tokenizer import FOLDER
from ecdit.runs.ledger import DIRECTORY
from ecdit.runs.provenance import OVERRIDES_FILE, recorded_starts
from ecdit.runs.trained_run import CONFIG_FILE
from ecdit.storage import children, move_aside

ASIDE = "before_start_over"
_METRICS = {METRICS, METRICS.removesuffix(".jsonl")}
_RECORDS = _METRICS | {
    OVERRIDES_FILE,
    CONFIG_FILE,
    TENSORBOARD,
    WANDB_ID,
    PROFILE,
    DIRECTORY,
    FOLDER,
    "samples",
    "evaluations",
}


def check_not_lost(workdir: Path, save_every: int) -> None:
    """Raises CheckpointError if a workdir without a checkpoint records that there was one.

    A run that was killed before its first save has metrics too, and may begin again: they end before its second save,
    which waits for the first one. (One whose first saves failed is refused as well: nothing tells it apart.)
    """
    saved = max((start.get("saved", start["step"]) for start in recorded_starts(workdir)), default=0)
    last = max((row["step"] for row in read_lines(workdir)), default=0)
    if saved == 0 and last <= 2 * save_every:
        return
    told = f"step {saved} was saved by {workdir / OVERRIDES_FILE}, and " if saved else ""
    raise CheckpointError(
        f"{checkpoint_directory(workdir)} has no checkpoint, but {told}"
        f"{workdir / METRICS} goes to step {last}. Bring the checkpoints back (a mount, a lifecycle rule?), use "
        f"another --workdir, or add --start_over: it begins at step 0 and moves the records of the old run aside."
    )


def set_metrics_aside(workdir: Path) -> Path | None:
    """Moves the metrics of a run that begins again into a new directory of the workdir, and returns it.

    Returns None if there are none.
    """
    return _set_aside(workdir, _METRICS) if read_lines(workdir) else None


def set_records_aside(workdir: Path) -> Path | None:
    """Moves metrics, images and records of a run into a new directory of the workdir, and returns it.

    Returns None if there are none.
    """
    return _set_aside(workdir, _RECORDS)


def _set_aside(workdir: Path, names: Set[str]) -> Path | None:
    found = [path for path in children(workdir) if path.name in names]
    if not found:
        return None
    place = next(place for n in itertools.count(1) if not (place := workdir / ASIDE / str(n)).exists())
    move_aside(found, place)
    return place
