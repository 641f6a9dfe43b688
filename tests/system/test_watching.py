"""Tests a training run's output in real processes: files, TensorBoard, Weights & Biases."""

import importlib.util
import json
import re

import numpy as np
import pytest
from PIL import Image

from launch.local import cpu_environment
from tests.events import events, images, scalars
from tests.forking import run_forked
from tests.runs import ROOT, command, run, train_command

HAS_WANDB = importlib.util.find_spec("wandb") is not None
WATCHED = {
    "checkpoint__every": 4,
    "train__images_every": 3,
    "train__log_every": 2,
    "train__profile_start": 2,
    "train__profile_steps": 2,
    "train__wandb_project": "emoji" if HAS_WANDB else "",
}


@pytest.fixture(scope="module")
def env(compilation_cache, tmp_path_factory):
    home = str(tmp_path_factory.mktemp("home"))
    quiet = {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "HOME": home,
        "PYTHONWARNINGS": "error::DeprecationWarning:ecdit",
    }
    return {**cpu_environment(1), **quiet, "JAX_COMPILATION_CACHE_DIR": str(compilation_cache)}


@pytest.fixture(scope="module")
def starts(tmp_path_factory, emoji_data, env):
    """(workdir, results) of four steps, and of the same run gone on to seven."""
    workdir = tmp_path_factory.mktemp("watched") / "run"
    results = [run(train_command(workdir, emoji_data, train__num_steps=n, **WATCHED), env) for n in (4, 7)]
    for result in results:
        assert result.returncode == 0, result.stderr
    return workdir, results


def test_a_line_tells_speed_waits_and_time_left(starts):
    line = [line for line in starts[1][0].stdout.splitlines() if line.startswith("step ")][-1]
    number = r"\d+(\.\d+)?"
    assert re.fullmatch(
        rf"step 4/4  loss {number}  grad {number}  {number} images/s  {number} GFLOP/s model  data wait {number} s  "
        r"\d:\d\d:\d\d left",
        line,
    ), line


def test_what_takes_long_is_said_before_it_begins(starts):
    """In this order, by the start that draws images after step 3 and at its end."""
    lines, place = starts[1][0].stdout.splitlines(), -1
    for begin in (
        "1 CPU device",
        "compiling, then step 1",
        "step 2/4",
        "drawing the images of step 3",
        "step 4/4",
        "drawing the images of step 4",
        "done: step 4",
    ):
        (place,) = (i for i, line in enumerate(lines) if line.startswith(begin) and i > place)
    assert "compiling, then step 5" in starts[1][1].stdout


def test_metrics_have_the_speeds(starts):
    rows = [json.loads(line) for line in (starts[0] / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 8))
    for row in rows:
        assert row["data_seconds"] >= 0
        assert "peak_share" not in row, "nobody knows this machine's peak"
        if row["images_per_second"] is not None:
            flops = row["model_flops_per_second"] / row["images_per_second"]
            assert flops == pytest.approx(rows[1]["model_flops_per_second"] / rows[1]["images_per_second"])


def test_tensorboard_has_every_scalar_once(starts):
    found = scalars(starts[0])
    layered = ("coverage_0", "coverage_1", "coverage_2", "coverage_3_or_more", "coverage_most", "router_grad_norm")
    for name in (
        "loss",
        "flow_loss",
        "grad_norm",
        "data_seconds",
        *(f"{n}/layer_{i}" for n in layered for i in (1, 2)),
    ):
        assert [step for step, _ in found[name]] == [2, 4, 6, 7], name
    rows = [json.loads(line) for line in (starts[0] / "metrics.jsonl").read_text().splitlines()]
    by_step = {row["step"]: row for row in rows}
    for step, value in found["coverage_0/layer_2"]:
        assert value == pytest.approx(by_step[step]["coverage_0"][1])
    assert len(list((starts[0] / "tensorboard").iterdir())) == 2, "one file for each start"
    assert sum(event.HasField("session_log") for event in events(starts[0])) == 2


def test_images_are_files_and_in_tensorboard(starts):
    steps = (3, 4, 6, 7)
    files = {path.name for path in (starts[0] / "samples").iterdir()}
    assert files == {f"step_{step:08d}{kind}.png" for step in steps for kind in ("", "_experts")}
    assert images(starts[0]) == [(step, name) for step in steps for name in ("samples", "experts")]
    with Image.open(starts[0] / "samples" / "step_00000007_experts.png") as page:
        # A column for the image, two layers and three stages; four captions.
        assert page.size == (8 + 6 * 136, 32 + 4 * 160 + 48)
        assert np.asarray(page).std() > 20


def test_the_profile_is_of_the_steps_in_the_window(starts):
    """Steps 2 and 3, both by the first start."""
    (trace,) = (starts[0] / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 10_000


def test_overrides_are_listed_by_start(starts):
    first, second = json.loads((starts[0] / "overrides.json").read_text())
    assert (first["step"], second["step"]) == (0, 4)
    assert first["config"] == f"{ROOT}/configs/emoji.py"
    assert (first["overrides"]["train.num_steps"], second["overrides"]["train.num_steps"]) == (4, 7)
    assert first["overrides"]["model.width"] == 32
    assert {"ecdit", "jax", "flax"} <= set(first["versions"])


def test_wandb_keeps_one_run_for_a_workdir(starts):
    if not HAS_WANDB:
        pytest.skip("wandb is not installed: pip install -e '.[wandb]'")
    run_id = (starts[0] / "wandb_id").read_text()
    logged = sorted((starts[0] / "wandb").glob("offline-run-*"))
    assert [path.name.endswith(f"-{run_id}") for path in logged] == [True, True]
    images = {path.name.split("_")[0] for path in (starts[0] / "wandb").rglob("media/images/*.png")}
    assert images == {"samples", "experts"}


def test_sample_draws_the_experts_of_given_prompts(starts, tmp_path, env):
    flags = [f"--workdir={starts[0]}", "--prompt=tiger", "--repeats=2", f"--out={tmp_path}/out", "--experts"]
    result = run(command("sample", *flags), env)
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "out" / "experts.png") as page:
        assert page.size == (8 + 6 * 136, 32 + 2 * 160 + 48)


def test_sample_refuses_to_draw_the_experts_of_a_dense_model(starts, tmp_path, env):
    values = json.loads((starts[0] / "config.json").read_text())
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps(values | {"model": values["model"] | {"ffn": "dense"}}))
    flags = [f"--workdir={tmp_path}/run", "--prompt=tiger", f"--out={tmp_path}/out", "--experts"]
    result = run_forked(command("sample", *flags), env)
    assert result.returncode == 2
    assert "is dense, it has no experts to count" in result.stderr
    assert not (tmp_path / "out").exists()
