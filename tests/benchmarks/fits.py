"""Measures the fit of variants of the emoji run: output norms of the expert branch, and optimizers at their best rates.

    python -m tests.benchmarks.fits norms --workdir=runs/norms [--data=DIR] [--steps=500] [--json=FILE]
    python -m tests.benchmarks.fits optimizers --workdir=runs/optimizers [--data=DIR] [--steps=300] [--json=FILE]

Each fit is `python -m ecdit.train --config=configs/emoji.py` with some keys changed, on a core of its own, as many at a
time as there are cores. Fits of a seed see the same batches, noise and times. `norms` trains every variant with seeds
0, 1 and 2 and evaluates retrieval; `optimizers` trains every variant with seed 0 at three learning rates, then the
rate of the lowest loss with seeds 1 and 2. A fit that is killed goes on when the same command runs again; one that is
done is only read.

    loss         mean flow loss of the last 100 steps
    router grad  mean norm of the router's gradient over those steps and the sparse layers
"""

import argparse
import concurrent.futures
import json
import os
import queue
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests import runs
from tests.benchmarks import timing

SEEDS = (0, 1, 2)
LAST = 100  # steps that the numbers are means over

NORMS = {name: {"model.moe_output_norm": name} for name in ("sandwich", "none", "expert")}
RMSPROP = (5e-5, 1e-4, 2e-4)
# Without momentum a step is ten times shorter, and AdamW's rate has no such factor at all.
ALONE = (5e-4, 1e-3, 2e-3)
OPTIMIZERS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "rmsprop": ({}, RMSPROP),
    "rmsprop, decay 0.9": ({"optimizer.rmsprop_decay": 0.9}, RMSPROP),
    "rmsprop, momentum 0": ({"optimizer.rmsprop_momentum": 0.0}, ALONE),
    "rmsprop, eps 1e-8 in the root": ({"optimizer.rmsprop_eps_in_sqrt": True}, RMSPROP),
    "rmsprop, no bias correction": ({"optimizer.rmsprop_bias_correction": False}, RMSPROP),
    "adamw": ({"optimizer.name": "adamw"}, ALONE),
}

Fit = dict[str, float]  # what is measured of one run


def means(lines: Iterable[str]) -> Fit:
    """Loss and router gradient from the lines of a run's metrics.jsonl."""
    last = [json.loads(line) for line in lines][-LAST:]
    return {
        "loss": statistics.mean(row["flow_loss"] for row in last),
        "router_grad": statistics.mean(norm for row in last for norm in row["router_grad_norm"]),
        "bad_steps": last[-1]["bad_steps"],
    }


def fit(arguments: argparse.Namespace, name: str, changes: Mapping[str, Any], core: int) -> Fit:
    """Trains one variant on `core` and measures it."""
    workdir = arguments.workdir / name
    settings = {
        **(runs.TINY if arguments.tiny else {}),
        "data.directory": arguments.data,
        "train.num_steps": arguments.steps,
        "train.images_every": 0,
        "checkpoint.every": arguments.steps,
        **changes,
    }
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    train = runs.command("train", f"--config={runs.ROOT}/configs/emoji.py", f"--workdir={workdir}", *flags)
    _run(train, core, workdir, arguments.tiny)
    found = means((workdir / "metrics.jsonl").read_text().splitlines())
    if arguments.what == "norms":
        path = workdir / "retrieval.json"
        if not path.exists():
            evaluate = runs.command("evaluate", "retrieval", f"--workdir={workdir}", f"--json={path}")
            _run(evaluate, core, workdir, arguments.tiny)
        found["r_at_5"] = json.loads(path.read_text())["r_at_5"]
    print(f"{name}: {found}", file=sys.stderr, flush=True)
    return found


def _run(command: Sequence[str], core: int, workdir: Path, quick: bool) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "log").open("a") as log:
        done = subprocess.run(
            ["taskset", "--cpu-list", str(core), *command],
            cwd=runs.ROOT,
            env=timing.child_environment(quick),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        sys.exit(f"{command[2]} failed with exit code {done.returncode}: see {workdir}/log")


def fits(arguments: argparse.Namespace, variants: Mapping[str, Mapping[str, Any]]) -> dict[str, Fit]:
    """Measures all variants, one on each core at a time."""
    cores: queue.SimpleQueue[int] = queue.SimpleQueue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)

    def on_a_free_core(name: str) -> Fit:
        core = cores.get()
        try:
            return fit(arguments, name, variants[name], core)
        finally:
            cores.put(core)

    with concurrent.futures.ThreadPoolExecutor(cores.qsize()) as pool:
        return dict(zip(variants, pool.map(on_a_free_core, variants), strict=True))


def norms(arguments: argparse.Namespace) -> dict[str, list[Fit]]:
    """By variant, the fits of each seed."""
    seeded = {f"{name}_seed{seed}": {**NORMS[name], "seed": seed} for seed in SEEDS for name in NORMS}
    found = fits(arguments, seeded)
    return {name: [found[f"{name}_seed{seed}"] for seed in SEEDS] for name in NORMS}


def optimizers(arguments: argparse.Namespace) -> dict[str, list[Fit]]:
    """By variant and rate, the fits of each seed: of seed 0 alone where the rate is not the best."""

    def variants(rates: Mapping[str, Iterable[float]], seeds: Iterable[int]) -> dict[str, dict[str, Any]]:
        return {
            f"{name}, rate {rate:g}, seed {seed}": {
                **OPTIMIZERS[name][0],
                "optimizer.learning_rate": rate,
                "seed": seed,
            }
            for seed in seeds
            for name, tried in rates.items()
            for rate in tried
        }

    found = fits(arguments, variants({name: rates for name, (_, rates) in OPTIMIZERS.items()}, SEEDS[:1]))
    best = {
        name: [min(rates, key=lambda rate, name=name: found[f"{name}, rate {rate:g}, seed 0"]["loss"])]
        for name, (_, rates) in OPTIMIZERS.items()
    }
    found |= fits(arguments, variants(best, SEEDS[1:]))
    return {
        f"{name}, rate {rate:g}": [
            found[key] for seed in SEEDS if (key := f"{name}, rate {rate:g}, seed {seed}") in found
        ]
        for name, (_, rates) in OPTIMIZERS.items()
        for rate in rates
    }


def table(found: Mapping[str, Sequence[Fit]]) -> list[str]:
    """Markdown: every seed's numbers."""
    columns = list(next(iter(found.values()))[0])
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, seeds in found.items():
        cells = [" ".join(f"{fit[column]:.4f}" for fit in seeds) for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("norms", "optimizers"))
    parser.add_argument("--workdir", type=Path, required=True, help="where the runs go, and go on")
    parser.add_argument("--steps", type=int, help="of each run: by default 500 for norms, 300 for optimizers")
    parser.add_argument("--data", help="prepared data, or where to prepare it; by default a temporary directory")
    parser.add_argument("--json", type=Path, help="where to write everything that was measured")
    parser.add_argument("--tiny", action="store_true", help="a small model: whether it works, not how well")
    arguments = parser.parse_args()
    arguments.steps = arguments.steps or {"norms": 500, "optimizers": 300}[arguments.what]
    arguments.workdir = arguments.workdir.absolute()
    with timing.emoji_data(arguments.data) as arguments.data:
        found = (norms if arguments.what == "norms" else optimizers)(arguments)
    print("\n".join(table(found)))
    if arguments.json:
        arguments.json.write_text(json.dumps({"steps": arguments.steps, "fits": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
