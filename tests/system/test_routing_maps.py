"""Tests the files and refusals of `python -m ecdit.routing_maps` on a tiny run with random weights."""

import csv
import json

import jax
import numpy as np
import pytest
from PIL import Image

from ecdit.config import to_dict
from ecdit.runs.trained_run import open_run, sample_run
from ecdit.sampling.image_folder import alone_in
from ecdit.sampling.routing_tables import counts_of
from ecdit.system import make_system
from tests.forking import run_forked
from tests.runs import command, keep_small_tokenizer, run, save_ema, tiny

PROMPTS = ["red heart", "<b>owl</b>", "red heart"]


def make_run(workdir, data, **changes):
    """A workdir of which only EMA weights are left; they are random everywhere, zeros at the start would hide much."""
    experiment = tiny(data__directory=str(data), sampling__num_steps=3, sampling__batch_size=8, **changes)
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(to_dict(experiment)))
    rng = np.random.default_rng(4)
    shapes = jax.eval_shape(make_system(experiment.system).init, jax.random.key(0))
    ema = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(x.dtype), shapes)
    save_ema(workdir, ema, step=7, config=to_dict(experiment), vocabulary=keep_small_tokenizer(workdir))
    return workdir


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, emoji_data):
    return make_run(tmp_path_factory.mktemp("routing") / "run", emoji_data)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("routing") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


def test_it_writes_arrays_tables_maps_and_a_page(workdir, prompts, tmp_path, cpu_env):
    out = tmp_path / "out"
    flags = [f"--workdir={workdir}", f"--prompts={prompts}", f"--out={out}", "--repeats=2", "--page_images=4"]
    result = run(command("routing_maps", *flags, "--page_times=2", "--last_steps=9"), cpu_env())
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[-1].startswith(f"6 images in {out}; routing.html (0.")
    assert lines[-1].endswith(" MB) shows 4 of them at 2 of 3 times")
    assert len(lines) == 1 + 2 + 1  # a line for each sparse layer

    opened = open_run(workdir)
    repeated = [prompt for prompt in PROMPTS for _ in range(2)]
    repeats = [0, 1, 0, 1, 2, 3]  # the prompt that stands there twice goes on, as in ecdit.sample
    images, counts = sample_run(opened, repeated, repeats, with_experts=True)
    with np.load(out / "routing.npz") as arrays:
        found = dict(arrays)
    assert found["prompts"].tolist() == [f"{p} ({r})" for p, r in zip(repeated, repeats, strict=True)]
    np.testing.assert_allclose(found["times"], [1, 2 / 3, 1 / 3])
    # On other devices and in another program: the last bits differ, and near-ties.
    assert (found["counts"] != counts).mean() < 0.005
    assert np.abs(found["images"].astype(int) - images).max() <= 1
    np.testing.assert_array_equal(found["counts"], counts_of(found["gates"]))
    assert found["gates"].shape == (6, 3, 2, 16, 4)
    assert found["coverage"].shape[:2] == (3, 2)
    np.testing.assert_allclose(found["coverage"].sum(axis=2), 1)
    np.testing.assert_allclose(found["busiest"], found["counts"].max(axis=3) / 4)
    assert found["expert_patches"].shape == (2, 4, 8, 8, 3)
    # Each of 4 experts takes 8 of an image's 16 tokens.
    np.testing.assert_array_equal(found["expert_tokens"], np.full((2, 4, 6), 8))
    np.testing.assert_allclose(found["expert_gates"].sum(axis=(1, 2)), found["gates"].sum(axis=(0, 1, 3, 4)) / 3, 1e-5)

    rows = list(csv.DictReader((out / "coverage.csv").read_text().splitlines()))
    assert [(row["time"], row["layer"]) for row in rows] == [(t, n) for t in ("1", "0.6667", "0.3333") for n in "12"]
    for i in range(6):
        with Image.open(out / f"{i:05d}.png") as image:
            np.testing.assert_array_equal(image, found["images"][i])
        assert (out / f"{i:05d}_experts.png").exists()
    page = (out / "routing.html").read_text()
    assert "<b>owl" not in page
    assert "Step 7 of " in page
    assert "in the last 3 of 3 steps" in page


def refused(cpu_env, *flags):
    result = run_forked(command("routing_maps", *flags), cpu_env())
    assert result.returncode == 2, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()[-1]


def test_a_dense_model_has_no_experts_to_show(prompts, emoji_data, tmp_path, cpu_env):
    dense = make_run(tmp_path / "dense", emoji_data, model__ffn="dense")
    said = refused(cpu_env, f"--workdir={dense}", f"--prompts={prompts}", f"--out={tmp_path}/out")
    assert said == f"error: --workdir={dense}: the model is dense, it has no experts"
    assert not (tmp_path / "out").exists()


def test_bad_input_is_refused_before_anything_is_drawn(workdir, prompts, tmp_path, cpu_env):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    known = [f"--workdir={workdir}", f"--prompts={prompts}"]
    assert "take an empty directory" in refused(cpu_env, *known, f"--out={full}")
    assert "must be a key of sampling" in refused(cpu_env, *known, f"--out={tmp_path}/a", "--set=model.depth=2")
    assert "must be a directory of this machine" in refused(cpu_env, *known, "--out=gs://bucket/maps")
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert "no prompts" in refused(cpu_env, f"--workdir={workdir}", f"--prompts={empty}", f"--out={tmp_path}/a")
    assert [path.name for path in full.iterdir()] == ["mine.txt"]
    assert not (tmp_path / "a").exists()
    taken = tmp_path / "taken"
    taken.mkdir()
    with alone_in(taken):  # as by another call that is still drawing
        assert "another process is drawing into it" in refused(cpu_env, *known, f"--out={taken}")
