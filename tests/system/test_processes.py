"""Tests real processes, joined like the hosts of a pod: they read one sequence of rows, and train like one process."""

import json
import re
import runpy
import sys
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from ecdit.data.prepared import prepare
from ecdit.exit_codes import PREEMPTED
from ecdit.experiment import make_experiment
from ecdit.runs.evaluator import scalars
from launch.local import cpu_environment, launch
from tests import events
from tests.runs import ROOT, emoji_config, run, train_command

MESH = {"mesh__data": 2, "mesh__expert": 2}
CHANGES = {**MESH, "train__num_steps": 6, "checkpoint__every": 4, "model__group": "16", "optimizer__warmup_steps": 2}
# Of every step: so the one at which the processes stop is always left to the next start.
EVALUATION = {
    "evaluation__every": 1,
    "evaluation__loss_images": 6,
    "evaluation__score": "retrieval",
    "evaluation__split": "train",
    "evaluation__captions": 3,
}

# Signals the process itself, as a pod's scheduler would, once it has done three steps.
PREEMPT_ONE = """
import os, signal, sys, threading, time
from pathlib import Path
def preempt():
    while not METRICS.exists() or METRICS.read_text().count("\\n") < 3:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
METRICS = Path(sys.argv.pop(1))
if os.environ["ECDIT_PROCESS_ID"] == "1":
    threading.Thread(target=preempt, daemon=True).start()
from ecdit.command_line import run_command
from ecdit.train import main
run_command(main)
"""


def losses(workdir):
    return {
        line["step"]: line["loss"] for line in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    }


def evaluated(workdir):
    """{step: (its numbers, the image of the prompts)} of what a run has written."""
    found = {}
    for path in (workdir / "evaluations").glob("*.json"):
        values = json.loads(path.read_text())
        assert path.stem == f"step_{values['step']:08d}"
        with Image.open(path.with_suffix(".png")) as image:
            found[values["step"]] = (scalars(values), np.asarray(image.convert("RGB")).astype(int))
    assert len(list((workdir / "evaluations").iterdir())) == 2 * len(found)
    return found


def announced(*logs):
    """The steps whose evaluation was printed, once for each time."""
    began, ended = (
        [int(step) for log in logs for step in re.findall(pattern, log, re.MULTILINE)]
        for pattern in (r"^evaluating step (\d+)$", r"^step (\d+) evaluated: ")
    )
    assert began == ended
    return began


CONFIG = ROOT / "tests/data/emoji_and_shapes_config.py"


def mixture_command(workdir, data, **changes):
    """The command line of a tiny training run on the mixture of emoji and shapes."""
    arguments = train_command(workdir, data, **changes)
    return [f"--config={CONFIG}" if argument.startswith("--config=") else argument for argument in arguments]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The mixture, prepared."""
    directory = tmp_path_factory.mktemp("mixture")
    prepare(mixture(directory).data)
    return directory


def mixture(directory):
    values = emoji_config()
    values.data = runpy.run_path(str(CONFIG))["get_config"]().data
    values.data.directory = str(directory)
    return make_experiment(values)


# Reads rows of the mixture on all devices of all processes, and writes those that this process holds.
READ = """
import itertools, json, sys
from pathlib import Path
import numpy as np
from ecdit import runtime
from tests.system.test_processes import BATCH, mixture

directory, first, batches, out = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4]
experiment = mixture(directory)
runtime.configure(experiment.runtime)
import jax
from ecdit.partitioning import make_mesh
from ecdit.runs.workload import device_batches
mesh, found = make_mesh(experiment.mesh), {}
for number, batch in enumerate(itertools.islice(device_batches(experiment, mesh, first), batches)):
    for name, array in batch.items():
        for shard in array.addressable_shards:
            for row, value in zip(range(array.shape[0])[shard.index[0]], np.asarray(shard.data), strict=True):
                found[f"{first + number * BATCH + row} {name}"] = value
np.savez(Path(out) / f"{first}_{jax.process_index()}_of_{jax.process_count()}.npz", **found)
"""
BATCH = 64


@pytest.mark.slow
def test_one_two_and_four_processes_and_restarts_read_the_same_rows(tmp_path, data):
    """By two processes, then four, then one, against one alone: each row of the mixture is the same, to the byte."""
    rows = {}
    for name, starts in {"one": [(1, 0, 6)], "two, four, one": [(2, 0, 2), (4, 128, 2), (1, 256, 2)]}.items():
        rows[name] = {}
        for processes, first, batches in starts:
            out = tmp_path / f"{name}_{first}"
            out.mkdir()
            command = [sys.executable, "-c", READ, str(data), str(first), str(batches), str(out)]
            assert launch(command, processes, devices=4 // processes, log_dir=out / "logs") == 0
            assert len(list(out.glob("*.npz"))) == processes
            for path in out.glob("*.npz"):
                with np.load(path) as found:
                    assert not rows[name].keys() & set(found)
                    rows[name] |= dict(found)
    one, restarted = rows.values()
    assert one.keys() == restarted.keys()
    assert len(one) == 6 * BATCH * 3  # image, tokens and size_crop of each row
    for name, value in one.items():
        np.testing.assert_array_equal(restarted[name], value, err_msg=name)
    emoji = sum(one[f"{row} size_crop"][0] == 72 for row in range(6 * BATCH))
    assert abs(emoji - Fraction(3, 10) * 6 * BATCH) < 1


@pytest.mark.slow
def test_two_processes_train_a_mixture_stop_together_and_resume_as_one_does(
    tmp_path, data, compilation_cache, monkeypatch
):
    """They evaluate to the same numbers and images too, and a step is evaluated once, also across the restart."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(compilation_cache))
    one, two, prompts = tmp_path / "one", tmp_path / "two", tmp_path / "prompts.txt"
    prompts.write_text("red heart\ntiger\na blue circle\n")
    changes = {**CHANGES, **EVALUATION, "evaluation__prompts": str(prompts)}
    result = run(mixture_command(one, data, **changes), cpu_environment(4))
    assert result.returncode == 0, result.stderr

    flags = mixture_command(two, data, **{**changes, "train__num_steps": 1000, "checkpoint__every": 1000})[3:]
    command = [sys.executable, "-c", PREEMPT_ONE, str(two / "metrics.jsonl"), *flags]
    code = launch(command, processes=2, devices=2, log_dir=tmp_path / "logs")
    logs = [(tmp_path / "logs" / f"process_{i}.log").read_text() for i in range(2)]
    assert code == PREEMPTED, logs[0][-3000:] + logs[1][-3000:]
    (stopped,) = (int(path.name) for path in (two / "checkpoints").iterdir())
    assert stopped >= 3
    assert f"saved step {stopped}" in logs[0]
    assert "step" not in [line[:4] for line in logs[1].splitlines()]  # process 0 alone reports
    assert announced(logs[1]) == []
    assert announced(logs[0]) == sorted(evaluated(two)) == list(range(1, stopped))

    found, expected = losses(two), losses(one)
    shared = sorted(set(found) & set(expected))
    assert len(shared) >= 3
    np.testing.assert_allclose([found[s] for s in shared], [expected[s] for s in shared], rtol=1e-5)

    # One process with the same devices goes on from what two have saved.
    two_wrote = {path: path.stat().st_mtime_ns for path in (two / "evaluations").iterdir()}
    more = {**changes, "train__num_steps": stopped + 2}
    result = run(mixture_command(two, data, **more), cpu_environment(4))
    assert result.returncode == 0, result.stderr
    assert f"resumed from step {stopped}" in result.stdout
    assert sorted(losses(two)) == list(range(1, stopped + 3))

    # The step that two stopped at is made up for, none is evaluated again, and all are what one process evaluates.
    steps = list(range(1, stopped + 3))
    assert announced(result.stdout) == steps[stopped - 1 :]
    assert {path: path.stat().st_mtime_ns for path in two_wrote} == two_wrote
    assert [step for step, _ in events.scalars(two)["eval/loss"]] == steps
    assert [step for step, name in events.images(two) if name == "prompts"] == steps
    found, expected = evaluated(two), evaluated(one)
    assert sorted(found) == steps
    shared = sorted(set(found) & set(expected))
    assert shared[-1] >= stopped
    for step in shared:
        numbers, image = found[step]
        assert numbers.keys() == expected[step][0].keys()
        assert {"eval/loss", "eval/loss/t_0.95", "eval/retrieval/r_at_5"} < numbers.keys()
        for name, value in expected[step][0].items():  # where rounding decides which token an expert takes: 1e-5
            assert numbers[name] == pytest.approx(value, rel=1e-4), (step, name)
        difference = np.abs(image - expected[step][1])  # as docs/sampling.md says: XLA rounds differently
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.01
