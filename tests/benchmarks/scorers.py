"""Measures time and memory of the scorers at their benchmarks' sizes, each as the command in a process of its own.

    python -m tests.benchmarks.scorers [--rows=30000] [--dimensions=2048] [--images=2212] [--json=FILE]

`frechet` compares float32 features, as of COCO-30K, with a file of moments, with as many features, and with as many
where both covariances are singular because half of the dimensions copy the others; `geneval-score` judges images of all
six tasks, each with a hundred boxes. It prints seconds of the clock and of the processors, and the largest memory, with
the start of Python.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ecdit.evaluation.geneval import CLASSES, COLOURS, TASKS
from tests.benchmarks import timing
from tests.runs import ROOT

SHARDS, BOXES = 6, 100


def write_features(folder: Path, seed: int, rows: int, dimensions: int, rank: int) -> None:
    """Writes features, whose spread falls by dimension, to several files; those behind `rank` copy the first ones."""
    folder.mkdir()
    spread = np.exp(-4 * np.arange(dimensions, dtype=np.float32) / dimensions)
    random = np.random.default_rng(seed)
    for shard, part in enumerate(np.array_split(np.arange(rows), SHARDS)):
        values = random.standard_normal((len(part), dimensions), np.float32) * spread[None]
        values[:, rank:] = values[:, : dimensions - rank]
        np.save(folder / f"{shard}.npy", values + np.float32(0.4))


def geneval_lines(images: int) -> Iterator[dict[str, Any]]:
    """Lines as `ecdit.evaluate geneval` writes them."""
    random = np.random.default_rng(0)
    for image in range(images):
        tag, (first, second) = TASKS[image % len(TASKS)], random.choice(CLASSES, 2, replace=False).tolist()
        include: list[dict[str, Any]] = [{"class": first, "count": 1}]
        if tag in ("colors", "color_attr"):
            include[0]["color"] = COLOURS[image % len(COLOURS)]
        if tag in ("two_object", "color_attr", "position"):
            include.append({"class": second, "count": 1})
        if tag == "position":
            include[1]["position"] = ["left of", 0]
        found: dict[str, list[list[float]]] = {}
        for name in [first, second, *random.choice(CLASSES, BOXES - 2).tolist()]:
            x, y, width, height = random.integers(1, 500, 4).tolist()
            found.setdefault(name, []).append([x, y, x + width, y + height, float(np.float32(random.random()))])
        yield {
            "filename": f"{image:05d}/samples/0000.png",
            "metadata": {"tag": tag, "prompt": "a photo", "include": include},
            "detections": found,
            "colors": {name: ["red"] * len(found[name]) for name in (first, second)},
        }


def command(*arguments: str) -> dict[str, float]:
    """Runs an evaluation; returns its seconds and its memory."""
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "ecdit.evaluate", *arguments], cwd=ROOT)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{arguments[0]} failed with exit code {child.returncode}; it says above why")
    return {
        "seconds": time.perf_counter() - start,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "megabytes": usage.ru_maxrss / 1024,
    }


def measure(rows: int, dimensions: int, images: int) -> dict[str, dict[str, float]]:
    """Returns seconds and memory by what was scored."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        for seed, name in enumerate(("a", "b")):
            write_features(place / name, seed, rows, dimensions, dimensions)
            write_features(place / f"singular_{name}", seed, rows, dimensions, dimensions - dimensions // 2)
        with (place / "detections.jsonl").open("w") as file:
            file.writelines(json.dumps(line) + "\n" for line in geneval_lines(images))
        options = ["--allow_few_samples"] if rows < dimensions else []
        two = command("frechet", f"--features={place}/b", f"--reference={place}/a", f"--save={place}/b.npz", *options)
        one = command("frechet", f"--features={place}/a", f"--reference={place}/b.npz", *options)
        singular = command("frechet", f"--features={place}/singular_b", f"--reference={place}/singular_a", *options)
        score = command("geneval-score", f"--detections={place}/detections.jsonl", f"--out={place}/results.jsonl")
    size = f"{rows} x {dimensions}"
    return {
        f"frechet, {size} against moments": one,
        f"frechet, {size} against {size}": two,
        f"frechet, {size} against {size}, both singular": singular,
        f"geneval-score, {images} images": score,
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=30000)
    parser.add_argument("--dimensions", type=int, default=2048)
    parser.add_argument("--images", type=int, default=2212)
    parser.add_argument("--json", type=Path, help="where to write the result")
    arguments = parser.parse_args()
    found = measure(arguments.rows, arguments.dimensions, arguments.images)
    for name, numbers in found.items():
        print(
            f"{name}: {numbers['seconds']:.1f} s, {numbers['processor_seconds']:.1f} s of processors, "
            f"{numbers['megabytes']:.0f} MB"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": timing.machine(), "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
