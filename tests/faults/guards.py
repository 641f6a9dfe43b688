"""Faults that a run has to notice before it harms itself, such as lost checkpoints, a second trainer or odd hosts."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

from tests.faults.phased_config import BOUNDARIES
from tests.faults.runs import (
    BASE,
    ONE,
    PAIR,
    ROOT,
    STEPS,
    TIMEOUT,
    VOLATILE,
    Odd,
    finished,
    last_line,
    lines,
    same_arrays,
)
from tests.faults.trial import Trial, require

USER_ERROR = 2


def vanished_checkpoints(trial: Trial) -> None:
    """The directory of the checkpoints is gone: the command refuses and touches nothing, until it is told to start."""
    shutil.copytree(trial.stage.base(ONE), trial.workdir)
    directory, metrics = trial.workdir / "checkpoints", (trial.workdir / "metrics.jsonl").read_bytes()
    directory.rename(trial.folder / "elsewhere")
    if trial.draw("empty_directory", trial.rng.random() < 0.5):
        directory.mkdir()
    refused = trial.start(ONE)
    codes, output = refused.wait(), refused.output()
    trial.log["codes"] = codes
    require(codes == [USER_ERROR], f"it ended with {codes}: {output[-1500:]}")
    said = f"{directory} has no checkpoint, but step {BASE} was saved"
    require(said in output and "--start_over" in output, f"it did not say so: {output[-1500:]}")
    require((trial.workdir / "metrics.jsonl").read_bytes() == metrics, "it changed the metrics")
    if trial.draw("brought_back", trial.rng.random() < 0.5):
        shutil.rmtree(directory, ignore_errors=True)
        (trial.folder / "elsewhere").rename(directory)
        trial.resume(ONE, BASE)
    else:
        run = trial.start(ONE, flags=("--start_over",))
        codes, output = run.wait(), run.output()
        require(codes == [0], f"--start_over ended with {codes}: {output[-1500:]}")
        kept = trial.workdir / "before_start_over/1/metrics.jsonl"
        require(kept.exists() and kept.read_bytes() == metrics, "the old metrics were not kept")
    trial.require_twin(ONE)


def second_trainer(trial: Trial) -> None:
    """The same command again while the run is at work: it ends, names the first one, and harms nothing."""
    step = trial.draw("after_step", trial.rng.randrange(1, STEPS - 5))
    delay = trial.draw("after_seconds", trial.rng.uniform(0.0, 0.2))
    run = trial.start(ONE)
    run.until(lambda: last_line(trial.workdir) >= step)
    time.sleep(delay)
    # Held, it keeps its lock; otherwise it could end before the second one has started.
    run.children[0].send_signal(signal.SIGSTOP)
    before = snapshot(trial.workdir)
    second = trial.start(ONE)
    codes = trial.log["codes"] = second.wait()
    after = snapshot(trial.workdir)
    run.children[0].send_signal(signal.SIGCONT)
    said = f"is in use by another trainer (process {run.children[0].pid} on "
    require(codes == [USER_ERROR] and said in second.output(), f"the second: {codes}, {second.output()[-1500:]}")
    require(before == after, f"the second one changed {sorted(before.items() ^ after.items())[:5]}")
    codes = run.wait()
    require(codes == [0], f"the first one ended with {codes}: {run.output()[-1500:]}")
    trial.require_twin(ONE)


def snapshot(workdir: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of each file of a run."""
    files = {path.relative_to(workdir).as_posix(): path.stat() for path in workdir.rglob("*") if path.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in files.items()}


def garbled_metrics(trial: Trial) -> None:
    """Metrics with an impossible byte, with lines twice, or cut off: repaired where possible, told otherwise."""
    shutil.copytree(trial.stage.base(ONE), trial.workdir)
    path = trial.workdir / "metrics.jsonl"
    how = trial.draw("how", trial.rng.choice(["byte", "twice", "cut"]))
    path.write_bytes(garble(path.read_bytes(), how, trial.rng))
    readable = {row["step"] for line in path.read_bytes().split(b"\n")[:-1] if (row := _row(line))}
    missing = trial.log["missing"] = sorted(set(range(1, BASE + 1)) - readable)
    output = trial.resume(ONE, BASE)
    told = [line for line in output.splitlines() if "lacks the lines of steps" in line]
    require(len(told) == bool(missing), f"missing are {missing}, and it said {told}")
    require(all(str(step) in told[0] for step in missing[:1] + missing[-1:]), f"{missing} are missing: {told}")
    found, twin = lines(trial.workdir), lines(trial.stage.twin(ONE))
    plain = lambda rows: [{k: v for k, v in row.items() if k not in VOLATILE} for row in rows]  # noqa: E731
    expected = [row for row in twin if row["step"] not in missing]
    require(plain(found) == plain(expected), "the metrics are not the twin's")
    last = f"checkpoints/{STEPS}"
    require(same_arrays(trial.workdir / last, trial.stage.twin(ONE) / last), "the last checkpoint's arrays differ")
    trial.log["bitwise"] = True


def garble(data: bytes, how: str, rng: random.Random) -> bytes:
    """Returns metrics that were spoiled: "byte" makes one impossible in UTF-8, "twice" repeats lines, "cut" cuts."""
    place = rng.randrange(len(data))
    if how == "byte":
        return data[:place] + b"\xff" + data[place + 1 :]
    if how == "cut":
        return data[:place]
    rows = data.splitlines(keepends=True)
    begin = rng.randrange(len(rows))
    repeated = rows[begin : begin + rng.randrange(1, 5)]
    return b"".join([*rows[: begin + len(repeated)], *repeated, *rows[begin + len(repeated) :]])


def _row(line: bytes) -> dict | None:
    try:
        return json.loads(line.decode())
    except ValueError:
        return None


def differing_hosts(trial: Trial) -> None:
    """One of two processes has another config or other code: neither does a step, and both say what differs."""
    which = trial.draw("process", trial.rng.randrange(2))
    what = trial.draw("what", trial.rng.choice(["config", "code"]))
    if what == "config":
        odd = Odd(which, flags=("--config.train.ema_decay=0.5",))
        named = "config.train.ema_decay: process 1 (host "
    else:
        root = trial.folder / "checkout"
        shutil.copytree(ROOT / "ecdit", root / "ecdit")
        file = trial.rng.choice(sorted((root / "ecdit").rglob("*.py")))
        trial.draw("file", file.relative_to(root).as_posix())
        file.write_text(file.read_text() + "\n# changed\n")
        odd, named = Odd(which, root=root), "ecdit's sources: process 1 (host "
    run = trial.start(PAIR, odd=odd)
    codes = trial.log["codes"] = run.wait()
    outputs = [log.read_text(errors="replace") for log in run.logs]
    require(codes == [USER_ERROR] * 2, f"they ended with {codes}: {outputs[0][-1500:]}")
    require(all(named in output for output in outputs), f"they did not say {named}: {outputs[0][-1500:]}")
    require(not finished(trial.workdir) and last_line(trial.workdir) == 0, "they did a step")
    trial.resume(PAIR, None)
    trial.require_twin(PAIR)


def kill_at_a_boundary(trial: Trial) -> None:
    """SIGKILL around the beginning of a phase: in the step before it, while the new step is compiled, in its first."""
    trial.config = ROOT / "tests/faults/phased_config.py"
    boundary = trial.draw("boundary", trial.rng.choice(BOUNDARIES))
    step = trial.draw("after_step", boundary + trial.rng.choice([-1, 0, 0, 1]))
    delay = trial.draw("after_seconds", trial.rng.uniform(0.0, 1.0 if step == boundary else 0.1))
    run = trial.start(ONE)
    run.until(lambda: last_line(trial.workdir) >= step, TIMEOUT)
    time.sleep(delay)
    run.kill()
    trial.log["codes"] = run.wait()
    trial.resume(ONE, trial.note_loss())
    trial.require_twin(ONE)
