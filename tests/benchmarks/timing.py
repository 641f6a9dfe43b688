"""Measures for every benchmark here: candidates take turns in one process, and runs are fresh processes.

A machine's speed drifts, so no milliseconds of different times are compared. In each round every candidate has one
turn, in a new random order, and a ratio is the median over rounds of the ratio within the round. Fresh processes show
differences between processes (memory layout, scheduling), so results are medians over runs with the lowest and highest.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.quick import QUICK_COMPILATION
from tests.runs import ROOT, emoji_config

PARTS = ("ratios", "milliseconds", "steps_per_second", "percent")  # the numbers of a case
Seconds = dict[str, list[float]]  # of one call, per candidate and round


def take_turns(candidates: Mapping[str, Callable[[], Any]], rounds: int, calls: int, warmup: int = 2) -> Seconds:
    """Times `candidates`, which return when their work is done: mean seconds of `calls` calls in each round."""
    for candidate in candidates.values():
        for _ in range(warmup):
            candidate()
    return reported_turns({name: timed(candidate, calls) for name, candidate in candidates.items()}, rounds)


def timed(candidate: Callable[[], Any], calls: int) -> Callable[[], float]:
    """A turn of `calls` calls: says the mean seconds of one."""

    def turn() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            candidate()
        return (time.perf_counter() - start) / calls

    return turn


def reported_turns(turns: Mapping[str, Callable[[], float]], rounds: int) -> Seconds:
    """The same for turns that say themselves how long a call took."""
    order = list(turns)
    shuffle = random.Random(0).shuffle
    seconds: Seconds = {name: [] for name in turns}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            seconds[name].append(turns[name]())
    return seconds


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The median over rounds of numerator / denominator."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def fastest(seconds: Seconds, names: Sequence[str]) -> str:
    """Which of `names` has the lowest median."""
    return min(names, key=lambda name: statistics.median(seconds[name]))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest of one number's values in several runs."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def case(sizes: str, seconds: Seconds, denominator: str, **more: Any) -> dict[str, Any]:
    """What one run says of one comparison: every candidate against `denominator`, itself included."""
    return {
        "sizes": sizes,
        "denominator": denominator,
        "ratios": {name: paired_ratio(values, seconds[denominator]) for name, values in seconds.items()},
        "milliseconds": {name: 1e3 * statistics.median(values) for name, values in seconds.items()},
        "seconds": seconds,
        **more,
    }


def summarize(runs: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """The cases of several runs as one: each number with its spread."""

    def over_runs(name: str, key: str) -> dict[str, dict[str, float]]:
        return {part: spread([run[name][key][part] for run in runs]) for part in runs[0][name].get(key, {})}

    return {
        name: {
            "sizes": first["sizes"],
            "denominators": [run[name]["denominator"] for run in runs],
            **{key: over_runs(name, key) for key in PARTS},
        }
        for name, first in runs[0].items()
    }


def parse(parser: argparse.ArgumentParser, rounds: int, calls: int) -> argparse.Namespace:
    """The command line, with the options that all benchmarks have."""
    parser.add_argument("--runs", type=int, default=5, help="fresh processes")
    parser.add_argument("--rounds", type=int, default=rounds, help="turns of each candidate in a run")
    parser.add_argument("--calls", type=int, default=calls, help="calls in a turn")
    parser.add_argument("--json", type=Path, help="where to write everything that was measured")
    parser.add_argument("--quick", action="store_true", help="compile without optimizing: to try it, not to time it")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for option in ("runs", "rounds", "calls"):
        if getattr(arguments, option) < 1:
            parser.error(f"--{option} must be 1 or more")
    return arguments


def child_environment(quick: bool = False) -> dict[str, str]:
    """A fresh process's environment: CPU, and no settings of jax, XLA or the allocator but those it makes itself."""
    dropped = ("JAX_", "XLA_", "MALLOC_", "GLIBC_TUNABLES", "TF_XLA_FLAGS")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    flags = {"XLA_FLAGS": QUICK_COMPILATION} if quick else {}
    return {**kept, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths), **flags}


def in_fresh_process(module: str, quick: bool, *options: str) -> Any:
    """Runs `module` anew with the arguments of this process, `options` and --child: where it leaves its result."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "result.json"
        command = [sys.executable, "-m", f"tests.benchmarks.{module}", *sys.argv[1:], *options, f"--child={path}"]
        code = subprocess.run(command, cwd=ROOT, env=child_environment(quick), check=False).returncode
        if code:
            sys.exit(f"{module}: a run failed with exit code {code}; it says above why")
        return json.loads(path.read_text())


@contextlib.contextmanager
def emoji_data(directory: str | None) -> Iterator[str]:
    """Where the emoji data is prepared: in `directory`, if need be, or in one that is removed afterwards."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(directory or scratch).absolute()
        if not (path / "emoji" / "composition.json").exists():
            # In a process of its own: it leaves TensorFlow's threads behind.
            command = ["ecdit.prepare", f"--config={ROOT}/configs/emoji.py", f"--config.data.directory={path}"]
            environment = child_environment()
            done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment, stdout=sys.stderr)
            if done.returncode:
                sys.exit(f"cannot prepare the data in {path}; it says above why")
        yield str(path)


def use_emoji_runtime() -> dict[str, Any]:
    """Sets this process up as `ecdit.train` does for configs/emoji.py, but for the compilation cache; describes it."""
    from ecdit import runtime
    from ecdit.config import build

    values = emoji_config().runtime
    values.compilation_cache = ""
    config = build(runtime.RuntimeConfig, values)
    runtime.configure(config)
    return {**machine(), "keep_host_memory": config.keep_host_memory}


def machine() -> dict[str, Any]:
    """What a number depends on besides the code that was timed."""
    import jax
    import jaxlib

    import ecdit

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    cpus = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
        "cpu": f"{os.cpu_count()} x {cpus[0] if cpus else platform.machine()}",
        "load_average": os.getloadavg()[0],
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "commit": commit.stdout.strip() or "unknown",
        "ecdit": str(Path(ecdit.__file__).parent),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def run_all(
    module: str, arguments: argparse.Namespace, measure: Callable[[argparse.Namespace], dict], *options: str
) -> None:
    """Runs `measure` in fresh processes, with `options` too, prints what it found, writes --json.

    It returns {"environment": ..., "cases": {name: case}}.
    """
    if arguments.child:
        Path(arguments.child).write_text(json.dumps(measure(arguments)))
        return
    report(module, arguments, [in_fresh_process(module, arguments.quick, *options) for _ in range(arguments.runs)])


def report(module: str, arguments: argparse.Namespace, runs: Sequence[dict[str, Any]]) -> None:
    """Prints the runs' summary and writes --json. Each run has its environment and its cases."""
    summary = summarize([run["cases"] for run in runs])
    print(f"{module}: {arguments.runs} runs, {arguments.rounds} rounds a run, {arguments.calls} calls a turn")
    for key, value in runs[0]["environment"].items():
        print(f"  {key}: {value}")
    for name, found in summary.items():
        print("\n".join(["", *table(name, found)]))
    if arguments.json:
        options = {key: str(value) for key, value in vars(arguments).items() if key != "child"}
        whole = {"benchmark": module, "arguments": options, "summary": summary, "runs": list(runs)}
        arguments.json.write_text(json.dumps(whole, indent=1) + "\n")


def table(name: str, found: Mapping[str, Any]) -> list[str]:
    """Lines that show one case's summary."""
    denominators = [f"{d} ({found['denominators'].count(d)} runs)" for d in sorted(set(found["denominators"]))]
    lines = [f"{name}: {found['sizes']}", f"  ratios against {', '.join(denominators)}: median (lowest - highest run)"]
    for candidate, ratio in found["ratios"].items():
        ms = found["milliseconds"][candidate]
        lines.append(f"  {candidate:22} {_shown(ratio, '6.3f')}   {_shown(ms, '9.2f')} ms")
    lines += [f"  {part:34} {_shown(rate, '7.3f')} steps/s" for part, rate in found["steps_per_second"].items()]
    lines += [f"  {part:34} {_shown(share, '6.2f')} %" for part, share in found["percent"].items()]
    return lines


def _shown(number: Mapping[str, float], form: str) -> str:
    return f"{number['median']:{form}} ({number['min']:{form}} - {number['max']:{form}})"


class TimedBatches:
    """Batches, and how long the last one was waited for."""

    def __init__(self, batches: Iterator[Any]):
        self.batches, self.seconds = batches, 0.0

    def next(self) -> Any:
        start = time.perf_counter()
        batch = next(self.batches)
        self.seconds = time.perf_counter() - start
        return batch
