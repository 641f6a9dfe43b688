"""Draws faults of a run at random: kills, signals, damaged files, a full disk, other processes."""

import contextlib
import dataclasses
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ecdit.exit_codes import HUNG, PREEMPTED
from tests.faults.runs import (
    BASE,
    EVERY,
    HEARTBEAT,
    ONE,
    PAIR,
    STEPS,
    TIMEOUT,
    WIDE,
    Layout,
    Run,
    differs_from_twin,
    finished,
    last_line,
    loss_difference,
    same_arrays,
)

WATCHDOG = 5  # seconds
DISK_MB = 24  # of the small disk
LOSS_TOLERANCE = 1e-4


class Failed(Exception):
    """A trial in which the framework did not do what it should."""


@dataclasses.dataclass
class Trial:
    """One trial: what was drawn, and what came of it."""

    rng: random.Random
    folder: Path  # its own
    stage: "Stage"
    log: dict[str, Any]  # what is written of it

    @property
    def workdir(self) -> Path:
        """The run that the fault happens to."""
        return self.folder / "run"

    def draw(self, name: str, value: Any) -> Any:
        """Notes what was drawn."""
        self.log[name] = value
        return value

    def start(self, layout: Layout, **overrides: Any) -> Run:
        """Starts the run, or goes on with it."""
        return Run(layout, self.workdir, self.stage.data, self.stage.cache, **overrides)

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
        difference = differs_from_twin(self.workdir, self.stage.twin(layout))
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

    def twin(self, layout: Layout) -> Path:
        """The workdir of a run to the end in one go."""
        return self._left_alone(layout, "twin", STEPS)

    def _left_alone(self, layout: Layout, name: str, steps: int) -> Path:
        workdir = self.folder / f"{name}_{layout.processes}x{layout.devices}"
        if not (workdir / "checkpoints" / str(steps)).is_dir():
            run = Run(layout, workdir, self.data, self.cache, train__num_steps=steps)
            codes = run.wait(900)
            if codes != [0] * layout.processes:
                sys.exit(f"a run without any fault ended with {codes}: {run.output()[-3000:]}")
        return workdir


def kill(trial: Trial) -> None:
    """SIGKILL in any step, or before the first, sometimes of a resumed run."""
    if trial.draw("from_base", trial.rng.random() < 0.5):
        shutil.copytree(trial.stage.base(ONE), trial.workdir)
    run = trial.start(ONE)
    _wait_for_any_moment(trial, run)
    run.kill()
    trial.log["codes"] = run.wait()
    trial.resume(ONE, trial.note_loss())
    trial.require_twin(ONE)


def kill_in_a_save(trial: Trial) -> None:
    """SIGKILL while a save writes: from the moment its directory appears, to a little later."""
    step = trial.draw("save", EVERY * trial.rng.randrange(1, STEPS // EVERY + 1))
    delay = trial.draw("after_seconds", trial.rng.uniform(0.0, 0.25))
    run = trial.start(ONE)
    trial.log["caught"] = run.until(lambda: any((trial.workdir / "checkpoints").glob(f"{step}.*-tmp")))
    time.sleep(delay)
    run.kill()
    trial.log["codes"] = run.wait()
    trial.log["half_written"] = bool(list((trial.workdir / "checkpoints").glob("*-tmp")))
    output = trial.resume(ONE, trial.note_loss())
    require("a save was cut short" in output or not trial.log["half_written"], "the half-written save was not named")
    trial.require_twin(ONE)


def kill_one_of_two(trial: Trial) -> None:
    """SIGKILL to one of two processes: the other ends by itself, within the heartbeat's bound."""
    which = trial.draw("process", trial.rng.randrange(2))
    run = trial.start(PAIR)
    _wait_for_any_moment(trial, run)
    joined = last_line(trial.workdir) > 0  # before, the other waits for it as long as a start may take
    run.kill(which)
    begin = time.monotonic()
    if not joined:
        run.kill()
    codes = trial.log["codes"] = run.wait(6 * HEARTBEAT + 30)
    trial.log["ended_after"] = time.monotonic() - begin
    require(None not in codes, f"the other process hangs: {codes}")
    trial.resume(PAIR, trial.note_loss())
    trial.require_twin(PAIR)


def _wait_for_any_moment(trial: Trial, run: Run) -> None:
    """Of a run: by steps, as the time that one takes depends on what else the machine does."""
    first = max(finished(trial.workdir), default=0)
    step = trial.draw("after_step", trial.rng.randrange(first, STEPS))
    delay = trial.draw("after_seconds", trial.rng.uniform(0.0, 1.0 if step == first else 0.2))
    if step > first:
        run.until(lambda: last_line(trial.workdir) >= step)
    time.sleep(delay)


def hang(trial: Trial) -> None:
    """One of two processes stops, alive: the other names the step that it waits in, and ends."""
    which = trial.draw("process", trial.rng.randrange(2))
    step = trial.draw("after_step", trial.rng.randrange(1, STEPS // 2))
    # A stopped process has no heartbeat either: a long one leaves the watchdog ten times its time, in a save.
    run = trial.start(PAIR, train__watchdog_seconds=WATCHDOG, runtime__heartbeat_seconds=100)
    run.until(lambda: last_line(trial.workdir) >= step)
    run.children[which].send_signal(signal.SIGSTOP)
    code = run.children[1 - which].wait(TIMEOUT)
    run.kill()
    trial.log["codes"] = [code, *run.wait()]
    said = re.search(r"hung: (.*)", run.output())
    require(code == HUNG and bool(said), f"the other process ended with {code}: {run.output()[-1500:]}")
    trial.log["said"] = said[1]
    trial.resume(PAIR, trial.note_loss())
    trial.require_twin(PAIR)


def sigterm(trial: Trial) -> None:
    """SIGTERM after any step."""
    _terminated(trial, ONE, 0)
    trial.require_twin(ONE)


def sigterm_to_one_of_two(trial: Trial) -> None:
    """SIGTERM to one of two processes: both save the same step."""
    _terminated(trial, PAIR, trial.draw("process", trial.rng.randrange(2)))
    trial.require_twin(PAIR)


def _terminated(trial: Trial, layout: Layout, which: int) -> None:
    step = trial.draw("after_step", trial.rng.randrange(1, STEPS - 5))
    delay = trial.draw("after_seconds", trial.rng.uniform(0.0, 0.1))
    run = trial.start(layout)
    run.until(lambda: last_line(trial.workdir) >= step)
    time.sleep(delay)
    run.children[which].send_signal(signal.SIGTERM)
    codes = trial.log["codes"] = run.wait()
    newest, reported = max(finished(trial.workdir), default=None), last_line(trial.workdir)
    trial.log |= {"newest": newest, "reported": reported, "lost": reported - (newest or 0)}
    same = [[code] * layout.processes for code in (PREEMPTED, 0)]
    require(codes in same, f"exit codes {codes}: {run.output()[-1500:]}")
    require(newest == reported, f"it saved step {newest}, and reported {reported}")
    trial.resume(layout, newest)


def bit_flip(trial: Trial) -> None:
    """One bit, anywhere in the files of the newest checkpoint or of the two newest."""
    steps = _damaged_steps(trial)
    for step in steps:
        path, size = _any_byte(trial, step)
        bit = trial.draw(f"bit_{step}", trial.rng.randrange(8 * size))
        data = bytearray(path.read_bytes())
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
    _resume_after_damage(trial, steps)


def truncation(trial: Trial) -> None:
    """A file of the newest checkpoint or of the two newest ends early, or is gone."""
    steps = _damaged_steps(trial)
    for step in steps:
        path, size = _any_byte(trial, step)
        if trial.draw(f"gone_{step}", trial.rng.random() < 0.25):
            path.unlink()
        else:
            with path.open("r+b") as file:
                file.truncate(trial.draw(f"length_{step}", trial.rng.randrange(size)))
    _resume_after_damage(trial, steps)


def _damaged_steps(trial: Trial) -> list[int]:
    shutil.copytree(trial.stage.base(ONE), trial.workdir)
    return sorted(finished(trial.workdir), reverse=True)[: 1 + (trial.rng.random() < 0.2)]


def _any_byte(trial: Trial, step: int) -> tuple[Path, int]:
    """The file of a random byte of the checkpoint, so that large files, which hold arrays, are hit most; its size."""
    files = sorted(p for p in (trial.workdir / f"checkpoints/{step}").rglob("*") if p.is_file() and p.stat().st_size)
    path = trial.rng.choices(files, [file.stat().st_size for file in files])[0]
    trial.draw(f"file_{step}", str(path.relative_to(trial.workdir / "checkpoints")))
    return path, path.stat().st_size


def _resume_after_damage(trial: Trial, steps: list[int]) -> None:
    """Whatever no longer reads as the same bits must be found; what still does may be gone on from."""
    base = trial.stage.base(ONE)
    harmless = [s for s in steps if same_arrays(trial.workdir / f"checkpoints/{s}", base / f"checkpoints/{s}")]
    trial.log["array_data_hit"] = [step for step in steps if step not in harmless]
    run = trial.start(ONE)
    codes, output = run.wait(), run.output()
    require(codes == [0], f"the resumed run ended with {codes}: {output[-1500:]}")
    resumed = trial.draw("resumed_from", int(re.search(r"resumed from step (\d+)", output)[1]))
    aside = {p.name for p in (trial.workdir / "checkpoints/damaged").glob("*")}
    trial.log["set_aside"] = sorted(aside)
    require(resumed not in trial.log["array_data_hit"], f"went on from step {resumed}, which is damaged")
    valid = [step for step in finished(base) if step not in steps or step in harmless]
    require(resumed == max(valid) or (resumed in valid and bool(harmless)), f"went on from {resumed}, not {max(valid)}")
    require(aside == {str(step) for step in steps if step > resumed}, f"set aside: {sorted(aside)}")
    require(all(f"checkpoints/{name}" in output for name in aside), "the damage was not said")
    trial.require_twin(ONE)


def full_disk(trial: Trial) -> None:
    """No space for checkpoints from one step to another: saves fail, are reported, and those after them work."""
    begin = trial.draw("full_from", trial.rng.randrange(1, STEPS - 2 * EVERY))
    failures = trial.draw("failures", trial.rng.randrange(1, 3))
    with small_disk(trial.workdir / "checkpoints") as disk:
        run = trial.start(ONE)
        run.until(lambda: last_line(trial.workdir) >= begin)
        filler = disk / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(1 << 12)):
                pass
        kept = finished(trial.workdir)
        run.until(lambda: run.output().count("Training goes on") >= failures)
        filler.unlink()
        codes, output = run.wait(), run.output()
        trial.log |= {"codes": codes, "failed_saves": output.count("Training goes on"), "kept": kept}
        if codes == [0]:
            trial.require_twin(ONE)
            return
        # Only where the last save had no space: it says so, and the same command goes on.
        require(codes == [2] and f"checkpoints/{STEPS} failed" in output, f"ended with {codes}: {output[-1500:]}")
        trial.resume(ONE, max(finished(trial.workdir), default=None))
        trial.require_twin(ONE)


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    """A file system of DISK_MB; needs root."""
    path.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "none", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def processes_changed(trial: Trial) -> None:
    """A run that is killed goes on as other processes, or on another mesh."""
    before, after = trial.rng.choice([(PAIR, ONE), (PAIR, WIDE), (ONE, PAIR), (WIDE, PAIR)])
    trial.log["layouts"] = [dataclasses.astuple(layout) for layout in (before, after)]
    step = trial.draw("after_step", trial.rng.randrange(EVERY, BASE))
    run = trial.start(before)
    run.until(lambda: last_line(trial.workdir) >= step)
    run.kill()
    trial.log["codes"] = run.wait()
    newest = trial.note_loss()
    trial.resume(after, newest)
    difference = trial.log["loss_difference"] = loss_difference(trial.workdir, trial.stage.twin(before), newest or 0)
    require(difference <= LOSS_TOLERANCE, f"the loss differs by {difference:.1e}")


KINDS: dict[str, Callable[[Trial], None]] = {
    "kill": kill,
    "kill in a save": kill_in_a_save,
    "kill one of two": kill_one_of_two,
    "hang": hang,
    "SIGTERM": sigterm,
    "SIGTERM to one of two": sigterm_to_one_of_two,
    "bit flip": bit_flip,
    "truncation": truncation,
    "full disk": full_disk,
    "processes changed": processes_changed,
}
