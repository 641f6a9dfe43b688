"""What a run says of itself: `metrics.jsonl` (a flushed line per step) and the printed step lines. Process 0 only."""

import datetime
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ecdit.config import UserError
from ecdit.training.experiment import TrainConfig


class DivergedError(UserError):
    """Too many steps in a row were not finite."""


class Reporter:
    """Writes metrics, and stops a run that has diverged; on other processes than 0 it only does the latter."""

    def __init__(self, workdir: Path, start_step: int, config: TrainConfig, leaf_names: Sequence[str]):
        self.config, self.leaf_names = config, leaf_names
        self.file = None
        if jax.process_index() == 0:
            path = workdir / "metrics.jsonl"
            drop_lines_after(path, start_step)
            self.file = path.open("a")
        self.last_time: float | None = None
        self.durations: list[float] = []  # of the steps since the first, which compiles

    def report(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes the metrics of step `step` (steps done, from 1), which waits until they are computed.

        Raises:
          DivergedError: train.max_bad_steps steps in a row were not finite.
        """
        values = {name: np.asarray(value).tolist() for name, value in metrics.items()}
        now = time.monotonic()
        rate = None
        if self.last_time is not None:
            self.durations = [*self.durations[-99:], now - self.last_time]
            rate = self.config.batch_size / (now - self.last_time)
        self.last_time = now
        if self.file is not None:
            line = {"step": step, **_without_nan(values), "images_per_second": rate, "time": time.time()}
            self.file.write(json.dumps(line, allow_nan=False) + "\n")
            self.file.flush()
            if step % self.config.log_every == 0 or step == self.config.num_steps or values["bad_in_row"]:
                print(self._line(step, values), flush=True)
        if values["bad_in_row"] >= self.config.max_bad_steps:
            raise DivergedError(
                f"step {step}: {self._culprit(values)}, and so {values['bad_in_row']} steps in a row were skipped "
                f"(config.train.max_bad_steps = {self.config.max_bad_steps}). The newest checkpoint is sound."
            )

    def close(self) -> None:
        """Closes the file."""
        if self.file is not None:
            self.file.close()

    def _line(self, step: int, values: dict[str, Any]) -> str:
        config = self.config
        seconds = sum(self.durations) / len(self.durations) if self.durations else 0.0
        left = datetime.timedelta(seconds=round(seconds * (config.num_steps - step))) if seconds else "?"
        parts = [
            f"step {step}/{config.num_steps}",
            f"loss {values['loss']:.4f}",
            f"grad {values['grad_norm']:.3f}",
            f"{config.batch_size / seconds:.1f} images/s" if seconds else "compiled",
            f"{left} left",
        ]
        if values["bad_in_row"]:
            parts.append(f"SKIPPED: {self._culprit(values)} ({values['bad_in_row']} in a row)")
        return "  ".join(parts)

    def _culprit(self, values: dict[str, Any]) -> str:
        leaf = values["bad_leaf"]
        return ("the loss" if leaf < 0 else f"the gradient of {self.leaf_names[leaf]}") + " was not finite"


def _without_nan(value: Any) -> Any:
    """JSON has no numbers that are not finite: they become null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step_of(line: str) -> float:
    """A line's step; infinity for a line that a crash has garbled."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf


def drop_lines_after(path: Path, step: int) -> None:
    """Removes the lines of steps after `step`, and a torn last one: a resumed run writes them anew."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= step]
    scratch = path.with_suffix(".tmp")
    scratch.write_text("".join(kept))
    os.replace(scratch, path)
