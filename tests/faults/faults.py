"""Draws faults of a run at random: kills, signals, damaged files, a full disk, other processes."""

import contextlib
import dataclasses
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from ecdit.exit_codes import HUNG, PREEMPTED
from launch.job import RESTART_CODES, SHOWN_CODES
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
    finished,
    last_line,
    loss_difference,
    same_arrays,
)
from tests.faults.trial import Trial, require

WATCHDOG = 5  # seconds
DISK_MB = 24  # of the small disk
LOSS_TOLERANCE = 1e-4


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
    if joined and codes[1 - which]:  # it may have done the last step before
        require(shell_code(codes[1 - which]) in RESTART_CODES, f"no launcher restarts {codes}, but {SHOWN_CODES}")
    trial.resume(PAIR, trial.note_loss())
    trial.require_twin(PAIR)


def shell_code(code: int) -> int:
    """An exit code of subprocess's as a shell and a launcher have it: 128 + n for signal n."""
    return code if code >= 0 else 128 - code


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
    _bit_flip(trial, ONE)


def damage_met_by_two(trial: Trial) -> None:
    """The same, and two processes resume: both go on from the same checkpoint."""
    _bit_flip(trial, PAIR)


def _bit_flip(trial: Trial, layout: Layout) -> None:
    steps = _damaged_steps(trial, layout)
    for step in steps:
        path, size = _any_byte(trial, step)
        bit = trial.draw(f"bit_{step}", trial.rng.randrange(8 * size))
        data = bytearray(path.read_bytes())
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
    _resume_after_damage(trial, steps, layout)


def truncation(trial: Trial) -> None:
    """A file of the newest checkpoint or of the two newest ends early, or is gone."""
    steps = _damaged_steps(trial, ONE)
    for step in steps:
        path, size = _any_byte(trial, step)
        if trial.draw(f"gone_{step}", trial.rng.random() < 0.25):
            path.unlink()
        else:
            with path.open("r+b") as file:
                file.truncate(trial.draw(f"length_{step}", trial.rng.randrange(size)))
    _resume_after_damage(trial, steps, ONE)


def _damaged_steps(trial: Trial, layout: Layout) -> list[int]:
    shutil.copytree(trial.stage.base(layout), trial.workdir)
    return sorted(finished(trial.workdir), reverse=True)[: 1 + (trial.rng.random() < 0.2)]


def _any_byte(trial: Trial, step: int) -> tuple[Path, int]:
    """The file of a random byte of the checkpoint, so that large files, which hold arrays, are hit most; its size."""
    files = sorted(p for p in (trial.workdir / f"checkpoints/{step}").rglob("*") if p.is_file() and p.stat().st_size)
    path = trial.rng.choices(files, [file.stat().st_size for file in files])[0]
    trial.draw(f"file_{step}", str(path.relative_to(trial.workdir / "checkpoints")))
    return path, path.stat().st_size


def _resume_after_damage(trial: Trial, steps: list[int], layout: Layout) -> None:
    """Whatever no longer reads as the same bits must be found; what still does may be gone on from."""
    base = trial.stage.base(layout)
    harmless = [s for s in steps if same_arrays(trial.workdir / f"checkpoints/{s}", base / f"checkpoints/{s}")]
    trial.log["array_data_hit"] = [step for step in steps if step not in harmless]
    run = trial.start(layout)
    codes, output = run.wait(), run.output()
    require(codes == [0] * layout.processes, f"the resumed run ended with {codes}: {output[-1500:]}")
    resumed = trial.draw("resumed_from", int(re.search(r"resumed from step (\d+)", output)[1]))
    aside = {p.name for p in (trial.workdir / "checkpoints/damaged").glob("*")}
    trial.log["set_aside"] = sorted(aside)
    require(resumed not in trial.log["array_data_hit"], f"went on from step {resumed}, which is damaged")
    valid = [step for step in finished(base) if step not in steps or step in harmless]
    require(resumed == max(valid) or (resumed in valid and bool(harmless)), f"went on from {resumed}, not {max(valid)}")
    require(aside == {str(step) for step in steps if step > resumed}, f"set aside: {sorted(aside)}")
    require(all(f"checkpoints/{name}" in output for name in aside), "the damage was not said")
    trial.require_twin(layout)


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
