"""I/O errors of a failing disk or a stale mount, made by io_errors.c between a run and the C library."""

import errno
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.faults.runs import BASE, EVERY, ONE, STEPS, finished, last_line
from tests.faults.trial import Trial, require

SOURCE = Path(__file__).with_suffix(".c")
NUMBERS = (errno.EIO, errno.ESTALE, errno.EMFILE)


@functools.cache
def library() -> Path:
    """The compiled library; needs a C compiler."""
    path = Path(tempfile.mkdtemp()) / "io_errors.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", path, SOURCE, "-ldl"], check=True)
    return path


class Faults:
    """Errors of a process's calls on files, which begin with `on` and end with `off`."""

    def __init__(self, folder: Path, path: str, mode: str, number: int, count: int = 0):
        """Of files with `path` in their names; "r" reading or "w" writing; `count` calls at most, 0 for all."""
        self.switch = folder / "io_errors_are_on"
        self.environment = {
            "LD_PRELOAD": str(library()),
            "FAULT_PATH": path,
            "FAULT_MODE": mode,
            "FAULT_ERRNO": str(number),
            "FAULT_COUNT": str(count),
            "FAULT_SWITCH": str(self.switch),
        }

    def on(self) -> None:
        """Begins."""
        self.switch.touch()

    def off(self) -> None:
        """Ends."""
        self.switch.unlink()

    def made(self) -> int:
        """How many calls have failed."""
        counted = self.switch.with_name(f"{self.switch.name}.count")
        return counted.stat().st_size if counted.exists() else 0


def errors_of_reading(trial: Trial) -> None:
    """Reading the newest checkpoint fails, a few times or always: no valid one is moved away."""
    shutil.copytree(trial.stage.base(ONE), trial.workdir)
    number = trial.draw("errno", trial.rng.choice(NUMBERS))
    count = trial.draw("calls", trial.rng.choice([0, 1, 2]))
    faults = Faults(trial.folder, f"checkpoints/{BASE}/", "r", number, count)
    faults.on()
    before = finished(trial.workdir)
    run = trial.start(ONE, environment=faults.environment)
    codes, output = run.wait(), run.output()
    trial.log |= {"codes": codes, "failed_calls": faults.made()}
    require(faults.made() > 0, "no call failed")
    require(not (trial.workdir / "checkpoints/damaged").exists(), f"a checkpoint was moved away: {output[-1500:]}")
    if count:  # the reads are tried again
        require(codes == [0], f"it ended with {codes}: {output[-1500:]}")
        require(f"resumed from step {BASE}" in output, "it did not go on from the newest checkpoint")
    else:
        said = f"{trial.workdir}/checkpoints/{BASE} cannot be read" in output and os.strerror(number) in output
        require(codes == [2] and said, f"it ended with {codes}: {output[-1500:]}")
        require(finished(trial.workdir) == before, "checkpoints are gone")
        trial.resume(ONE, BASE)
    trial.require_twin(ONE)


def errors_of_writing(trial: Trial) -> None:
    """Writing checkpoints fails from one step to another: it is said, and the run goes on or ends as it said."""
    number = trial.draw("errno", trial.rng.choice([errno.EIO, errno.ESTALE]))
    begin = trial.draw("from_step", trial.rng.randrange(1, STEPS - 2 * EVERY))
    failures = trial.draw("failures", trial.rng.randrange(1, 3))
    faults = Faults(trial.folder, "/checkpoints/", "w", number)
    run = trial.start(ONE, environment=faults.environment)
    run.until(lambda: last_line(trial.workdir) >= begin)
    faults.on()
    run.until(lambda: run.output().count("Training goes on") >= failures)
    faults.off()
    codes, output = run.wait(), run.output()
    failed = output.count("Training goes on")
    trial.log |= {"codes": codes, "failed_calls": faults.made(), "failed_saves": failed}
    require(faults.made() > 0 and failed > 0, f"no save failed: {output[-1500:]}")
    if codes != [0]:  # only where the last save failed: it says so, and the same command goes on
        require(codes == [2] and f"checkpoints/{STEPS} failed" in output, f"ended with {codes}: {output[-1500:]}")
        trial.resume(ONE, max(finished(trial.workdir), default=None))
    trial.require_twin(ONE)
