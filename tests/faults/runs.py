"""Starts, watches and ends tiny runs in several layouts, and compares them with a run without faults."""

import dataclasses
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from launch.local import _free_port, cpu_environment, process_environment
from tests.quick import QUICK_COMPILATION
from tests.runs import ROOT, train_command

STEPS, EVERY, BASE = 40, 5, 20  # of a whole run; between saves; of the run that damage is done to
TIMEOUT = 300.0  # seconds after which a run counts as hung
HEARTBEAT = 10  # seconds
EMOJI = ROOT / "configs/emoji.py"
VOLATILE = {"time", "images_per_second", "model_flops_per_second", "peak_share", "data_seconds"}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Processes of so many devices each; the mesh is data-parallel over all."""

    processes: int
    devices: int


ONE, PAIR, WIDE = Layout(1, 1), Layout(2, 1), Layout(1, 2)


@dataclasses.dataclass(frozen=True)
class Odd:
    """What one process of several is started with in another way than the others."""

    process: int
    flags: tuple[str, ...] = ()
    root: Path = ROOT  # of the checkout


class Run:
    """Processes of one start of a run, with their output in files beside the workdir."""

    def __init__(
        self,
        layout: Layout,
        workdir: Path,
        data: Path,
        cache: Path,
        config: Path = EMOJI,
        flags: Sequence[str] = (),
        odd: Odd | None = None,
        environment: Mapping[str, str] | None = None,
        **overrides: Any,
    ):
        values = {
            "train__num_steps": STEPS,
            "checkpoint__every": EVERY,
            "checkpoint__keep": 3,
            "checkpoint__max_failed_saves": 1000,
            "optimizer__warmup_steps": 4,
            "runtime__heartbeat_seconds": HEARTBEAT,
            "mesh__data": layout.processes * layout.devices,
        }
        command = [*train_command(workdir, data, **{**values, **overrides}), *flags]
        command = [f"--config={config}" if word.startswith("--config=") else word for word in command]
        coordinator = f"127.0.0.1:{_free_port()}"
        self.workdir, self.logs, self.children = workdir, [], []
        for i in range(layout.processes):
            own, root = (odd.flags, odd.root) if odd is not None and odd.process == i else ((), ROOT)
            env = cpu_environment(layout.devices)
            if layout.processes > 1:
                env = process_environment(coordinator, layout.processes, i, layout.devices)
            env |= {
                "XLA_FLAGS": " ".join(dict.fromkeys(f"{env['XLA_FLAGS']} {QUICK_COMPILATION}".split())),
                "JAX_COMPILATION_CACHE_DIR": str(cache),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "PYTHONUNBUFFERED": "1",
                **(environment or {}),
            }
            self.logs.append(workdir.parent / f"{workdir.name}_{len(list(workdir.parent.glob('*.log')))}.log")
            with self.logs[-1].open("w") as log:
                self.children.append(subprocess.Popen([*command, *own], env=env, cwd=root, stdout=log, stderr=log))

    def wait(self, seconds: float = TIMEOUT) -> list[int | None]:
        """The exit codes when all have ended; None for one that has not in time, which is then killed."""
        deadline, codes = time.monotonic() + seconds, []
        for child in self.children:
            try:
                codes.append(child.wait(max(0.1, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                codes.append(None)
        for child in self.children:
            child.kill()
            child.wait()
        return codes

    def until(self, condition: Callable[[], bool], seconds: float = TIMEOUT) -> bool:
        """Waits for `condition`; False if a process ends, or time, before."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline or any(child.poll() is not None for child in self.children):
                return False
            time.sleep(0.002)
        return True

    def kill(self, which: int | None = None) -> None:
        """SIGKILL to all processes, or to one."""
        for child in self.children if which is None else [self.children[which]]:
            child.send_signal(signal.SIGKILL)

    def output(self) -> str:
        """What all processes printed."""
        return "\n".join(log.read_text(errors="replace") for log in self.logs)


def lines(workdir: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def last_line(workdir: Path) -> int:
    """The last step in metrics.jsonl, 0 where there is none."""
    return max((line["step"] for line in lines(workdir)), default=0)


def finished(workdir: Path) -> list[int]:
    """Steps of the checkpoints whose save has ended."""
    directory = workdir / "checkpoints"
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit()) if directory.is_dir() else []


def arrays(directory: Path, names: Iterable[str]) -> dict[str, np.ndarray] | None:
    """Arrays of a checkpoint by their flat names, read without the code that is tested; None if one cannot be."""
    base = {"driver": "file", "path": f"{directory}/state/"}
    found = {}
    for name in names:
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{name.replace('/', '.')}/"}
        try:
            found[name] = tensorstore.open({"driver": "zarr", "kvstore": kvstore}, read=True).result().read().result()
        except ValueError:
            return None
    return found


def same_arrays(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same bits; the second is one that nothing has happened to."""
    names = json.loads((other / "meta/metadata").read_text())["arrays"]
    found, expected = arrays(one, names), arrays(other, names)
    return found is not None and all(
        found[n].dtype == x.dtype and found[n].tobytes() == x.tobytes() for n, x in expected.items()
    )


def differs_from_twin(workdir: Path, twin: Path) -> str:
    """In what the end of a run is not bitwise that of its uninterrupted twin; "" for nothing."""
    found, expected = ([{k: v for k, v in x.items() if k not in VOLATILE} for x in lines(w)] for w in (workdir, twin))
    if [x["step"] for x in found] != list(range(1, STEPS + 1)):
        return "metrics.jsonl has gaps or repeats"
    wrong = [x["step"] for x, y in zip(found, expected, strict=True) if x != y]
    if wrong:
        return f"metrics differ from step {wrong[0]} on"
    if not same_arrays(workdir / f"checkpoints/{STEPS}", twin / f"checkpoints/{STEPS}"):
        return "the last checkpoint's arrays differ"
    return ""


def loss_difference(workdir: Path, twin: Path, after: int) -> float:
    """The largest relative difference of the loss in the 20 steps after `after`."""
    found, expected = ({x["step"]: x["loss"] for x in lines(w)} for w in (workdir, twin))
    window = range(after + 1, min(after + 20, STEPS) + 1)
    return max(abs(found[step] - expected[step]) / abs(expected[step]) for step in window)
