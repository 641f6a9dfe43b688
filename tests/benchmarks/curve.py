"""Measures a run's fit over time: retrieval of each of its checkpoints, as a table, JSON and a plot.

    python -m ecdit.train --config=configs/emoji.py --workdir=W \\
        --config.checkpoint.every=250 --config.checkpoint.keep=99
    python -m tests.benchmarks.curve --workdir=W [--json=FILE] [--plot=FILE.png]

Minutes are those from the first step's line in metrics.jsonl, images and saves included; so a run that was started
more than once is refused. The plot needs the extra `plots`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests import runs
from tests.benchmarks import timing

Point = dict[str, float]  # step, minutes, r_at_1, r_at_5


def minutes(lines: Iterable[str]) -> dict[int, float]:
    """By step, from the lines of metrics.jsonl."""
    times = {row["step"]: row["time"] for row in map(json.loads, lines)}
    start = times[min(times)]
    return {step: (time - start) / 60 for step, time in times.items()}


def evaluate(workdir: Path, step: int) -> dict[str, float]:
    """What `ecdit.evaluate retrieval` measures of one checkpoint."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "result.json"
        command = runs.command("evaluate", "retrieval", f"--workdir={workdir}", f"--step={step}", f"--json={path}")
        code = subprocess.run(command, cwd=runs.ROOT, env=timing.child_environment(), stdout=sys.stderr).returncode
        if code:
            sys.exit(f"evaluating step {step} failed with exit code {code}; it says above why")
        return json.loads(path.read_text())


def measure(workdir: Path) -> list[Point]:
    """A point for every checkpoint."""
    starts = json.loads((workdir / "overrides.json").read_text())
    if len(starts) > 1:
        sys.exit(f"{workdir} was started {len(starts)} times: its clock has gaps")
    at = minutes((workdir / "metrics.jsonl").read_text().splitlines())
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    found = {step: evaluate(workdir, step) for step in steps}
    return [
        {"step": step, "minutes": at[step], "r_at_1": found[step]["r_at_1"], "r_at_5": found[step]["r_at_5"]}
        for step in steps
    ]


def table(points: Sequence[Point]) -> list[str]:
    """Markdown."""
    return [
        "| step | minutes | R@1 | R@5 |",
        "|---|---|---|---|",
        *(f"| {p['step']} | {p['minutes']:.1f} | {p['r_at_1']:.1%} | {p['r_at_5']:.1%} |" for p in points),
    ]


def plot(points: Sequence[Point], path: Path) -> None:
    """R@1 and R@5 over minutes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), dpi=110, layout="constrained")
    axes = figure.subplots()
    for key, name in (("r_at_5", "R@5"), ("r_at_1", "R@1")):
        axes.plot([p["minutes"] for p in points], [100 * p[key] for p in points], marker="o", markersize=3, label=name)
    axes.set(xlabel="minutes on two CPU cores", ylabel="% of training captions", xlim=0, ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    points = measure(arguments.workdir.absolute())
    print("\n".join(table(points)))
    if arguments.json:
        arguments.json.write_text(json.dumps(points, indent=1) + "\n")
    if arguments.plot:
        plot(points, arguments.plot)


if __name__ == "__main__":
    main()
