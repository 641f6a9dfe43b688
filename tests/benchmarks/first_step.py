"""Measures the time from starting the emoji run's command to its first step, without and with a warm cache.

    python -m tests.benchmarks.first_step [--runs=5] [--json=FILE] [--data=DIR] [--tiny]

Each run starts `python -m ecdit.train --config=configs/emoji.py` with prepared data, a new workdir and an empty
compilation cache, and again with what the first left in the cache. The clock runs from the start of the process to the
time that metrics.jsonl gives for step 1; then the process is killed. One more process with each state of the cache does
the same by itself and says how long its phases took, for information.
"""

import argparse
import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests import runs
from tests.benchmarks import timing

POLL_SECONDS = 0.02
TIMEOUT_SECONDS = 900


def settings(arguments: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """What differs from the config, by dotted key."""
    tiny = runs.TINY if arguments.tiny else {}
    return {**tiny, "data.directory": arguments.data, "runtime.compilation_cache": str(cache)}


def first_time(path: Path) -> float | None:
    """When the first step in metrics.jsonl was reported, seconds since 1970; None before."""
    line, newline, _ = path.read_text().partition("\n") if path.exists() else ("", "", "")
    return json.loads(line)["time"] if newline else None


def seconds_to_first_step(arguments: argparse.Namespace, cache: Path) -> float:
    """Runs the command until its first step, then kills it."""
    flags = [f"--config.{key}={value}" for key, value in settings(arguments, cache).items()]
    with tempfile.TemporaryDirectory() as workdir:
        metrics, log = Path(workdir) / "metrics.jsonl", Path(workdir) / "log"
        command = runs.command("train", f"--config={runs.ROOT}/configs/emoji.py", f"--workdir={workdir}", *flags)
        with log.open("w") as output:
            start = time.time()
            process = subprocess.Popen(
                command,
                cwd=runs.ROOT,
                env=timing.child_environment(arguments.quick),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                while (reported := first_time(metrics)) is None:
                    if process.poll() is not None or time.time() - start > TIMEOUT_SECONDS:
                        raise SystemExit(f"first_step: no step; the end of its output:\n{log.read_text()[-2000:]}")
                    time.sleep(POLL_SECONDS)
            finally:
                process.kill()
                process.wait()
    return reported - start


def phases(arguments: argparse.Namespace, cache: Path, started: float) -> dict[str, float]:
    """Milliseconds of what the command does up to its first step, in this process, which began at `started`."""
    import jax

    from ecdit import runtime
    from ecdit.experiment import make_experiment
    from ecdit.partitioning import make_mesh
    from ecdit.runs.workload import device_batches
    from ecdit.system import make_system
    from ecdit.training import optimizer, state, step

    milliseconds = {"python_and_imports": 1e3 * (time.time() - started)}

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        milliseconds[name] = 1e3 * (time.perf_counter() - start)

    with phase("config_and_devices"):
        values = runs.emoji_config()
        values.update_from_flattened_dict(settings(arguments, cache))
        experiment = make_experiment(values)
        runtime.configure(experiment.runtime)
        mesh = make_mesh(experiment.mesh)
    with phase("model_structure"):
        system = make_system(experiment.system)
        update = optimizer.make_optimizer(experiment.optimizer)
        shardings = state.state_shardings(system, update, mesh)
    with jax.set_mesh(mesh):
        with phase("first_state"):
            first = jax.block_until_ready(state.init_state(system, update, shardings, experiment.seed))
        with phase("first_batch"):
            batch = next(device_batches(experiment, mesh, 0))
        with phase("trace_step"):
            lowered = step.make_train_step(experiment.step_config, system, mesh).lower(first, batch)
        with phase("compile_step"):
            compiled = lowered.compile()
        with phase("run_step"):
            jax.block_until_ready(compiled(first, batch))
    return milliseconds


def phases_in_a_process(arguments: argparse.Namespace, cache: Path) -> dict[str, float]:
    """`phases` of a fresh process."""
    options = (f"--data={arguments.data}", f"--cache={cache}", f"--started={time.time()}")
    return timing.in_fresh_process("first_step", arguments.quick, *options)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One run: the command twice and the phases twice, each time with a cold and then a warm cache."""
    with tempfile.TemporaryDirectory() as scratch:
        cache, phase_cache = Path(scratch) / "cache", Path(scratch) / "phases"
        seconds = {name: [seconds_to_first_step(arguments, cache)] for name in ("cold", "warm")}
        detail = {name: phases_in_a_process(arguments, phase_cache) for name in ("cold", "warm")}
    cases = {"command": timing.case("from the command to the first reported step", seconds, "cold")}
    for name, milliseconds in detail.items():
        in_seconds = {phase: [value / 1e3] for phase, value in milliseconds.items()}
        cases[f"phases, {name} cache"] = timing.case(
            "one process, for information", {"all": [sum(milliseconds.values()) / 1e3], **in_seconds}, "all"
        )
    return {"environment": environment(), "cases": cases}


def environment() -> dict[str, Any]:
    """That of the processes that are timed."""
    from ecdit.config import build
    from ecdit.runtime import RuntimeConfig

    config = build(RuntimeConfig, runs.emoji_config().runtime)
    return {
        **timing.machine(),
        "xla_flags": " ".join(config.xla_flags),
        "keep_host_memory": config.keep_host_memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="prepared data, or where to prepare it; by default a temporary directory")
    parser.add_argument("--tiny", action="store_true", help="a small model: whether it works, not how fast")
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    arguments = timing.parse(parser, rounds=1, calls=1)
    if arguments.child:
        Path(arguments.child).write_text(json.dumps(phases(arguments, arguments.cache, arguments.started)))
        return
    with timing.emoji_data(arguments.data) as arguments.data:
        timing.report("first_step", arguments, [measure(arguments) for _ in range(arguments.runs)])


if __name__ == "__main__":
    main()
