"""Tests a run of two phases by the real commands, stopped before, at and after the boundary."""

import json
import shutil

import jax
import numpy as np
import pytest

from ecdit.runs.trained_run import open_run, saved_experiment
from tests.forking import run_forked
from tests.runs import ROOT, TINY, command
from tests.system.test_resume import saved

STEPS, BOUNDARY = 6, 3
CONFIG = """
from tests.runs import emoji_config

def get_config():
    config = emoji_config()
    config.phases = (
        {{
            "after": {boundary},
            "changes": {{
                "model.latent_size": 16,
                "model.mask_ratio": 0.25,
                "model.capacity_factor": 1.0,
                "data.image_size": 16,
                "data.directory": "{small}",
                "train.batch_size": 8,
                "optimizer.learning_rate": 1e-3,
            }},
        }},
    )
    return config
"""


@pytest.fixture(scope="module")
def train(tmp_path_factory, emoji_data, compilation_cache):
    """train(workdir) runs or resumes the phased run there."""
    from launch.local import cpu_environment

    directory = tmp_path_factory.mktemp("phases")
    config = directory / "config.py"
    config.write_text(CONFIG.format(boundary=BOUNDARY, small=directory / "small"))
    env = {**cpu_environment(1), "JAX_COMPILATION_CACHE_DIR": str(compilation_cache), "PYTHONPATH": str(ROOT)}
    changes = {
        **TINY,
        "data.directory": emoji_data,
        "train.num_steps": STEPS,
        "checkpoint.every": 1,
        "checkpoint.keep": 99,
        "optimizer.warmup_steps": 1,
    }
    flags = [f"--config.{key}={value}" for key, value in changes.items()]

    def train(workdir):
        result = run_forked(command("train", f"--config={config}", f"--workdir={workdir}", *flags), env)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return train


@pytest.fixture(scope="module")
def uninterrupted(train, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert f"phase from step {BOUNDARY + 1} to {STEPS}" in train(workdir)
    return workdir


@pytest.mark.parametrize("stopped", [BOUNDARY - 1, BOUNDARY, BOUNDARY + 1])
def test_a_run_that_stopped_near_the_boundary_ends_bitwise_equal(stopped, train, uninterrupted, tmp_path):
    workdir = shutil.copytree(uninterrupted, tmp_path / "run")
    for step in range(stopped + 1, STEPS + 1):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    assert f"resumed from step {stopped}" in train(workdir)
    experiment = saved_experiment(workdir)
    (state, meta), (expected, expected_meta) = (saved(place, experiment, STEPS) for place in (workdir, uninterrupted))
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert meta == expected_meta
    lines, expected_lines = (
        [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        for place in (workdir, uninterrupted)
    )
    assert [(line["step"], line["loss"]) for line in lines] == [(line["step"], line["loss"]) for line in expected_lines]


def test_each_phase_trains_what_it_says(uninterrupted):
    experiment = saved_experiment(uninterrupted)
    (before, meta), (after, last_meta) = (saved(uninterrupted, experiment, step) for step in (BOUNDARY, STEPS))
    assert (meta.next_row, last_meta.next_row) == (16 * BOUNDARY, 16 * BOUNDARY + 8 * (STEPS - BOUNDARY))
    assert meta.dataset != last_meta.dataset  # of the images of each phase
    assert int(after.step) == int(before.step) + STEPS - BOUNDARY
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before.params["denoiser"], after.params["denoiser"])
    assert moved["head"]["bias"] > 1e-3  # at the second phase's rate: the first one's is a tenth
    sizes = []
    for step in (BOUNDARY, STEPS):
        sizes.append(open_run(uninterrupted, ["mesh.data=8", "sampling.batch_size=8"], step).experiment.data.image_size)
    assert sizes == [32, 16]
