"""Reports a run's steps: a flushed line of metrics a step, printed lines, and writers. Only process 0 writes."""

import contextlib
import datetime
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ecdit.errors import UserError
from ecdit.files import writing
from ecdit.partitioning import devices_text
from ecdit.progress import duration
from ecdit.reporting.metrics_file import METRICS, open_lines
from ecdit.reporting.speed import Speed, Stopwatch, flops_text
from ecdit.reporting.writers import Writer
from ecdit.storage import AppendedObjects
from ecdit.training.config import TrainConfig
from ecdit.training.step import SPIKE


class DivergedError(UserError):
    """Too many steps in a row were skipped, because they were not finite or their loss was far above the usual."""


class Reporter:
    """Reports the steps, and stops a run that has diverged. Processes other than 0 only do the latter."""

    def __init__(
        self,
        workdir: Path,
        start_step: int,
        config: TrainConfig,
        leaf_names: Sequence[str],
        writers: Sequence[Writer] = (),
        permit: Callable[[], None] = lambda: None,
    ):
        """Continues the metrics after `start_step`. Closing it closes the `writers` too.

        `permit` is called before each object of metrics is written in a bucket (see `AppendedObjects`).
        """
        self.config, self.leaf_names, self.writers = config, leaf_names, writers
        self.path, self.start_step = workdir / METRICS, start_step
        self.file = None
        if jax.process_index() == 0:
            with writing(self.path):
                self.file = open_lines(workdir, start_step, lambda line: print(line, flush=True), permit)

    def begin(self, watch: Stopwatch) -> None:
        """Times the following steps by `watch`. Call it before the first of them."""
        self.watch = watch

    def report(self, step: int, metrics: dict[str, Any], data_seconds: float) -> None:
        """Writes the metrics of step `step` (counted from 1); waits until they are computed.

        Raises:
          DivergedError: train.max_bad_steps steps in a row were skipped.
          UserError: a file cannot be written.
        """
        values = {name: np.asarray(value).tolist() for name, value in metrics.items()}
        speed = self.watch.tick(data_seconds)
        values |= {
            "images_per_second": speed and speed.images_per_second,
            "model_flops_per_second": speed and speed.model_flops_per_second,
            "data_seconds": data_seconds,
        }
        if self.watch.peak:
            values["peak_share"] = speed and speed.peak_share
        if self.file is not None:
            line = {"step": step, **_without_nan(values), "time": time.time()}
            with writing(self.path):
                self.file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
                self.file.flush()
            if step % self.config.log_every == 0 or step == self.config.num_steps or values["bad_in_row"]:
                for writer in self.writers:
                    writer.scalars(step, named_scalars(values))
                print(self._line(step, values), flush=True)
        if values["bad_in_row"] >= self.config.max_bad_steps:
            raise DivergedError(
                f"step {step}: {self._culprit(values)}, and so {values['bad_in_row']} steps in a row were skipped "
                f"(config.train.max_bad_steps = {self.config.max_bad_steps}). The newest checkpoint is valid."
            )

    def images(self, step: int, files: Mapping[str, Path]) -> None:
        """Passes the PNGs of step `step` to the writers, unless an earlier start did.

        Excludes the time until the next step from the statistics.
        """
        self.watch.pause()
        for writer in self.writers if step > self.start_step else ():
            for name, path in files.items():
                writer.image(step, name, path)

    def evaluation(self, step: int, values: Mapping[str, float], files: Mapping[str, Path]) -> None:
        """Passes the evaluation of a step to the writers, and prints its main numbers.

        Excludes the time until the next step from the statistics.
        """
        self.watch.pause()
        for writer in self.writers:
            writer.scalars(step, values)
            for name, path in files.items():
                writer.image(step, name, path)
        if self.file is not None:
            main = [f"{name.removeprefix('eval/')} {value:.4f}" for name, value in values.items() if "/t_" not in name]
            print(f"step {step} evaluated: {', '.join([*main, *map(str, files.values())])}", flush=True)

    def save(self) -> None:
        """Writes buffered lines, so that they precede the checkpoint unless the bucket is away."""
        if self.file is not None:
            with writing(self.path):
                if isinstance(self.file, AppendedObjects):
                    self.file.save()
                else:
                    os.fsync(self.file.fileno())
        for writer in self.writers:
            writer.save()

    def close(self) -> None:
        """Closes the file and the writers."""
        with contextlib.ExitStack() as stack:
            for writer in self.writers:
                stack.callback(writer.close)
            if self.file is not None:
                stack.enter_context(writing(self.path))
                stack.callback(self.file.close)

    def _line(self, step: int, values: dict[str, Any]) -> str:
        config, speed = self.config, self.watch.recent()
        parts = [f"step {step}/{config.num_steps}", f"loss {values['loss']:.4f}", f"grad {values['grad_norm']:.3f}"]
        if speed is None:
            parts.append("compiled")
        else:
            left = datetime.timedelta(seconds=round(speed.step_seconds * (config.num_steps - step)))
            share = [] if speed.peak_share is None else [f"{speed.peak_share:.1%} of peak"]
            parts += [
                f"{speed.images_per_second:.1f} images/s",
                f"{flops_text(speed.model_flops_per_second)} model",
                *share,
                f"data wait {speed.data_seconds:.3f} s",
                f"{left} left",
            ]
        if values["bad_in_row"]:
            parts.append(f"SKIPPED: {self._culprit(values)} ({values['bad_in_row']} in a row)")
        return "  ".join(parts)

    def _culprit(self, values: dict[str, Any]) -> str:
        leaf = values["bad_leaf"]
        if leaf == SPIKE:
            return f"the loss was above {self.config.spike_factor:g} times its running mean (config.train.spike_factor)"
        return ("the loss" if leaf < 0 else f"the gradient of {self.leaf_names[leaf]}") + " was not finite"


def first_line(config: TrainConfig, dtype: str, mesh: Mesh) -> str:
    """Returns the line that says what a run is about to do and on which devices, before anything takes time."""
    axes = [f"{name} {size}" for name, size in mesh.shape.items() if size > 1]
    parts = [devices_text(mesh.devices.flatten().tolist())]
    if jax.process_count() > 1:
        parts.append(f"of {jax.process_count()} processes")
    if axes:
        parts.append(f"({' x '.join(axes)})")
    return (
        f"{' '.join(parts)}, {dtype} compute, {config.num_steps} steps of {config.batch_size} images; "
        "the step is compiled first"
    )


def forecast(config: TrainConfig, step: int, speed: Speed, draws: bool) -> str:
    """Returns the line that forecasts the time of the remaining steps and, if the run draws, of the next images."""
    line = f"the other {config.num_steps - step} steps will take about {_duration(speed, config.num_steps - step)}"
    if not draws:
        return line
    due = next((later for later in range(step, config.num_steps) if images_due(config, later)), config.num_steps)
    return f"{line}; the next images come after step {due}, in {_duration(speed, due - step)}"


def _duration(speed: Speed, steps: int) -> str:
    return duration(speed.step_seconds * steps)


def images_due(config: TrainConfig, step: int) -> bool:
    """Returns whether samples are drawn after `step`. (Those of the last step are drawn once it is saved.)"""
    return config.images_every > 0 and step % config.images_every == 0 and step < config.num_steps


def named_scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """Returns metrics as single numbers, without unknown ones; a metric per layer becomes `name/layer_1`, ..."""
    named = {}
    for name, value in values.items():
        if isinstance(value, list):
            named |= {f"{name}/layer_{i}": item for i, item in enumerate(value, 1)}
        elif value is not None:
            named[name] = value
    return named


def _without_nan(value: Any) -> Any:
    """Replaces numbers that are not finite by None, because JSON has none."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
