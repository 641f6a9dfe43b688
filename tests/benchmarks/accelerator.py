"""Measures the paper's XL models on one accelerator of any kind: training, the expert layer, sampling.

    python -m tests.benchmarks.accelerator [--minutes=10] [--out=accelerator.jsonl] [--rows=train,layer/8E] [--tiny]

The data is random latents and random tokens. It needs only JAX, flax, optax, jaxtyping and numpy. Rows, in this order:

    attention            attention between its projections, by each kernel that runs here, and its distance from
                         float32; chooses model.attention for the other rows unless --attention is set
    train/NAME           a training step of configs/ec_dit.py:NAME, at the largest power of two of images that fits
    train_without_text/NAME   the same with one of the text tower's 32 layers
    layer/EXPERTS        XL's expert layer, both rules and dispatches, with a dense FFN of equal FLOPs, forward and back
    sample/NAME          images per second with guidance at three batches, in turns with XL-dense
    ratios               images per second of train rows, over those of the dense one, beside the prediction by FLOPs
                         and by bytes (roofline.py)

Each row is its own process, because a device's peak memory can be read but not reset, freed memory stays fragmented,
and a crash then ends only one row. That costs the start of CUDA and JAX, seconds where a row takes a minute or more.
Rows share compiled programs through a cache, in a temporary directory unless --cache names one. Rows are JSON lines,
appended to --out when they are done; the processes' output goes to --out with .log. A row that will probably not finish
within --minutes is skipped, and one that exceeds them is ended.

Times are medians of turns with the lowest and highest, and include waiting for a call's results. MFU is 3 x the
denoiser's forward FLOPs (models.flops) over time and peak, so a text tower lowers it; with_text also counts the tower's
forward FLOPs.
"""

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.runs import ROOT

TRAINED = ("XL-dense", "XL-8E", "XL-8E-token_choice")
ROWS = (
    "attention",
    *(f"train/{name}" for name in TRAINED),
    *(f"train_without_text/{name}" for name in TRAINED),
    *(f"layer/{experts}" for experts in ("8E", "16E", "32E")),
    *(f"sample/XL-{experts}" for experts in ("8E", "16E", "32E")),
)
# Seconds that a row is thought to take before one of its kind has been timed.
FIRST_GUESS = {"attention": 40, "train": 150, "train_without_text": 120, "layer": 60, "sample": 200}
TINY_GUESS = 10
END_SECONDS = 5  # for a process to end when it is asked to
TAIL = 1500  # characters of a failed process's output that its row keeps

Line = dict[str, Any]


@dataclasses.dataclass
class Lines:
    """The lines of a run, in the file and in memory."""

    path: Path

    def add(self, line: Line) -> None:
        """Appends a line that another process, or a kill, cannot tear."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[Line]:
        return [json.loads(text) for text in self.path.read_text().splitlines()] if self.path.exists() else []


def chosen_rows(patterns: str) -> list[str]:
    """The rows that begin with one of the comma-separated `patterns`, in their order; all for an empty one."""
    prefixes = tuple(patterns.split(",")) if patterns else ("",)
    unknown = [prefix for prefix in prefixes if not any(row.startswith(prefix) for row in ROWS)]
    if unknown:
        raise SystemExit(f"--rows: no row begins with {', '.join(unknown)}; rows are {', '.join(ROWS)}")
    return [row for row in ROWS if row.startswith(prefixes)]


def run_rows(
    rows: Sequence[str],
    run_row: Callable[[str, float], str | None],
    lines: Lines,
    guess: Mapping[str, float],
    deadline: float,
    now: Callable[[], float] = time.monotonic,
) -> None:
    """Runs each row that is likely to be done before `deadline`.

    Args:
      rows: in order of priority; a later one that is shorter may run where an earlier one does not.
      run_row: of a row and the seconds that it may take, says what went wrong or None.
      lines: where to write what was skipped and what failed.
      guess: seconds of a row by its kind, until one of the kind was timed: then the longest of those.
      deadline: on the clock `now`.
      now: seconds.
    """
    timed: dict[str, float] = {}
    for row in rows:
        kind, start = row.split("/")[0], now()
        expected, left = timed.get(kind, guess[kind]), deadline - start
        if expected > left:
            lines.add({"row": row, "skipped": f"takes about {expected:.0f} s, {left:.0f} s are left"})
            continue
        error = run_row(row, left)
        if error:
            lines.add({"row": row, "error": error})
        else:
            timed[kind] = max(timed.get(kind, 0.0), now() - start)


def run_process(command: Sequence[str], environment: dict[str, str], log: Path, seconds: float) -> str | None:
    """Runs a command for so long at most; its output's end if it failed, None if not."""
    with log.open("ab") as output:
        before = output.tell()
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            _end(child)
            return f"ended after {seconds:.0f} s: the time was up"
        except BaseException:
            _end(child)
            raise
    if code == 0:
        return None
    return f"exit code {code}: ...{log.read_bytes()[before:].decode(errors='replace')[-TAIL:]}"


def _end(child: subprocess.Popen) -> None:
    """Ends a process and those that it started: compilers, too."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
            child.wait(timeout=END_SECONDS)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            child.wait()
            return


def child_environment(tiny: bool) -> dict[str, str]:
    """This process's own, with more of a GPU's memory than JAX takes by itself, and quick compilation for --tiny."""
    from tests.benchmarks.timing import QUICK_COMPILATION

    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    if tiny:
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_COMPILATION}"
    return environment


def ratios(lines: Iterable[Line]) -> list[Line]:
    """Lines that compare the train rows with the dense one of their kind: time of an image, measured and predicted."""
    from ecdit.chips import limits
    from tests.benchmarks.paper import paper_experiment
    from tests.benchmarks.roofline import seconds, training_work

    found, timed = [], {line["row"]: line for line in lines if "images_per_second" in line and "batch" in line}
    for row, line in timed.items():
        kind, _, name = row.partition("/")
        dense = timed.get(f"{kind}/XL-dense")
        if kind not in ("train", "train_without_text") or name == "XL-dense" or dense is None:
            continue
        works = [
            (training_work(paper_experiment(which), batch, kind == "train"), batch)
            for which, batch in ((name, line["batch"]), ("XL-dense", dense["batch"]))
        ]
        flops, dense_flops = (sum(work.flops for work in parts) / batch for parts, batch in works)
        chip = limits(line["device"])
        bound = [seconds(parts, chip) / batch for parts, batch in works] if chip else None
        rates, dense_rates = line["images_per_second"], dense["images_per_second"]
        found.append(
            {
                "row": f"ratios/{row}",
                "time_over_dense": {
                    "median": dense_rates["median"] / rates["median"],
                    "min": dense_rates["min"] / rates["max"],
                    "max": dense_rates["max"] / rates["min"],
                },
                "predicted_by_flops": flops / dense_flops,
                "predicted_by_roofline": bound[0] / bound[1] if bound else None,
            }
        )
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of a run and of its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything")
    parser.add_argument("--out", type=Path, default=Path("accelerator.jsonl"), help="JSON lines are appended to it")
    parser.add_argument("--rows", default="", help="beginnings of the rows to run, with commas between")
    parser.add_argument("--tiny", action="store_true", help="small models: whether it works, not how fast")
    parser.add_argument("--attention", choices=["plain", "fused", "cudnn"], help="instead of what the first row finds")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the config, such as model.remat=full"
    )
    parser.add_argument("--batch", type=int, help="images of a training step, instead of searching for what fits")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each candidate")
    parser.add_argument("--turn", type=float, default=1.0, help="seconds that a turn takes at least, by more calls")
    parser.add_argument("--cache", help="directory for what was compiled; by default a temporary one")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Runs the rows, each in a process of its own."""
    deadline = time.monotonic() + 60 * arguments.minutes
    rows, lines = chosen_rows(arguments.rows), Lines(arguments.out.absolute())
    if arguments.attention is None and "attention" not in rows:
        rows = ["attention", *rows]
    before, environment = len(lines.read()), child_environment(arguments.tiny)
    shown = before

    def show() -> None:
        nonlocal shown
        for line in lines.read()[shown:]:
            print(json.dumps(line), flush=True)
            shown += 1

    with tempfile.TemporaryDirectory() as scratch:

        def run_row(row: str, seconds: float) -> str | None:
            options = [f"--child={row}", f"--out={lines.path}", f"--cache={arguments.cache or scratch}"]
            if arguments.attention is None and row != "attention":
                options.append(f"--attention={_found_attention(lines.read()[before:])}")
            command = [sys.executable, "-m", "tests.benchmarks.accelerator", *sys.argv[1:], *options]
            try:
                return run_process(command, environment, lines.path.with_suffix(".log"), seconds)
            finally:
                show()

        guess = dict.fromkeys(FIRST_GUESS, TINY_GUESS) if arguments.tiny else FIRST_GUESS
        run_rows(rows, run_row, lines, guess, deadline)
    if not arguments.tiny:  # whose sizes are not those of the prediction
        for line in ratios(lines.read()[before:]):
            lines.add(line)
    show()


def _found_attention(lines: Iterable[Line]) -> str:
    """What the attention row chose; plain, which runs anywhere, if it failed."""
    return next((line["chosen"] for line in lines if line["row"] == "attention" and "chosen" in line), "plain")


def main() -> None:
    arguments = parse()
    if arguments.child:
        from tests.benchmarks.accelerator_rows import measure

        measure(arguments, Lines(arguments.out).add)
    else:
        run(arguments)


if __name__ == "__main__":
    main()
