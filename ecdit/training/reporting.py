"""What a run says of itself: `metrics.jsonl` (a flushed line per step) and the printed step lines. Process 0 only."""

import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np


class Reporter:
    """Writes metrics; on other processes than 0 it does nothing."""

    def __init__(self, workdir: Path, start_step: int, num_steps: int, batch_size: int, log_every: int):
        self.num_steps, self.batch_size, self.log_every = num_steps, batch_size, log_every
        self.file = None
        if jax.process_index() == 0:
            path = workdir / "metrics.jsonl"
            drop_lines_after(path, start_step)
            self.file = path.open("a")
        self.last_time: float | None = None
        self.durations: list[float] = []  # of the steps since the first, which compiles

    def report(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes the metrics of step `step` (steps done, from 1), which waits until they are computed."""
        if self.file is None:
            return
        values = {name: np.asarray(value).tolist() for name, value in metrics.items()}
        now = time.monotonic()
        rate = None
        if self.last_time is not None:
            self.durations = [*self.durations[-99:], now - self.last_time]
            rate = self.batch_size / (now - self.last_time)
        self.last_time = now
        self.file.write(json.dumps({"step": step, **values, "images_per_second": rate, "time": time.time()}) + "\n")
        self.file.flush()
        if step % self.log_every == 0 or step == self.num_steps or values["bad_in_row"]:
            print(self._line(step, values), flush=True)

    def close(self) -> None:
        """Closes the file."""
        if self.file is not None:
            self.file.close()

    def _line(self, step: int, values: dict[str, Any]) -> str:
        seconds = sum(self.durations) / len(self.durations) if self.durations else 0.0
        speed = f"{self.batch_size / seconds:.1f} images/s" if seconds else "compiled"
        left = time.strftime("%H:%M:%S", time.gmtime(seconds * (self.num_steps - step))) if seconds else "?"
        parts = [
            f"step {step}/{self.num_steps}",
            f"loss {values['loss']:.4f}",
            f"grad {values['grad_norm']:.3f}",
            speed,
            f"{left} left",
        ]
        if values["bad_in_row"]:
            parts.append(f"SKIPPED: not finite ({values['bad_in_row']} in a row)")
        return "  ".join(parts)


def drop_lines_after(path: Path, step: int) -> None:
    """Removes the lines of steps after `step`, and a torn last one: a resumed run writes them anew."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    scratch = path.with_suffix(".tmp")
    scratch.write_text("".join(kept))
    os.replace(scratch, path)
