"""One trial of a campaign, and what all trials share."""

import dataclasses
import random
import re
import sys
from pathlib import Path
from typing import Any

from tests.faults.runs import (
    BASE,
    EMOJI,
    EVERY,
    STEPS,
    Layout,
    Run,
    differs_from_twin,
    finished,
    last_line,
)


class Failed(Exception):
    """A trial in which the framework did not do what it should."""


@dataclasses.dataclass
class Trial:
    """One trial: what was drawn, and what came of it."""

    rng: random.Random
    folder: Path  # its own
    stage: "Stage"
    log: dict[str, Any]  # what is written of it
    config: Path = EMOJI  # of its runs

    @property
    def workdir(self) -> Path:
        """The run that the fault happens to."""
        return self.folder / "run"

    def draw(self, name: str, value: Any) -> Any:
        """Notes what was drawn."""
        self.log[name] = value
        return value

    def start(self, layout: Layout, **options: Any) -> Run:
        """Starts the run, or goes on with it; for `options` see `Run`."""
        return Run(layout, self.workdir, self.stage.data, self.stage.cache, config=self.config, **options)

    def resume(self, layout: Layout, expected: int | None) -> str:
        """Runs to the end, which must go on from `expected`, None for the start; what it printed."""
        run = self.start(layout)
        codes = run.wait()
        output = run.output()
        require(codes == [0] * layout.processes, f"the resumed run ended with {codes}: {output[-1500:]}")
        found = re.search(r"resumed from step (\d+)", output)
        self.log["resumed_from"] = int(found[1]) if found else None
        require(self.log["resumed_from"] == expected, f"it went on from {found and found[1]}, not from {expected}")
        return output

    def require_twin(self, layout: Layout) -> None:
        """The run's end is bitwise that of the twin."""
        difference = differs_from_twin(self.workdir, self.stage.twin(layout, self.config))
        require(not difference, difference)
        self.log["bitwise"] = True

    def note_loss(self) -> int | None:
        """The newest finished checkpoint, after a kill; notes how many reported steps are lost."""
        newest, reported = max(finished(self.workdir), default=None), last_line(self.workdir)
        self.log |= {"newest": newest, "reported": reported}
        # A save runs beside the next steps: only the next one waits for its end.
        lost = reported - (newest or 0)
        require(lost <= 2 * EVERY, f"step {reported} was reported, the newest checkpoint is {newest}")
        self.log["lost"] = max(0, lost)
        return newest


def require(condition: bool, why: str) -> None:
    """Raises Failed unless `condition`."""
    if not condition:
        raise Failed(why)


class Stage:
    """What all trials share: data, compiled programs, and runs that were left alone."""

    def __init__(self, folder: Path, data: Path, cache: Path):
        self.folder, self.data, self.cache = folder, data, cache

    def base(self, layout: Layout) -> Path:
        """The workdir of a run that has done half of its steps."""
        return self._left_alone(layout, "base", BASE)

    def twin(self, layout: Layout, config: Path = EMOJI) -> Path:
        """The workdir of a run to the end in one go."""
        return self._left_alone(layout, "twin", STEPS, config)

    def _left_alone(self, layout: Layout, name: str, steps: int, config: Path = EMOJI) -> Path:
        workdir = self.folder / f"{name}_{config.stem}_{layout.processes}x{layout.devices}"
        if not (workdir / "checkpoints" / str(steps)).is_dir():
            run = Run(layout, workdir, self.data, self.cache, config, train__num_steps=steps)
            codes = run.wait(900)
            if codes != [0] * layout.processes:
                sys.exit(f"a run without any fault ended with {codes}: {run.output()[-3000:]}")
        return workdir
