"""Tests the accelerator's benchmark: its plan of rows, its predictions, and a tiny run with few packages."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from ecdit.chips import Limits
from ecdit.system import make_system
from tests import runs
from tests.benchmarks import accelerator, accelerator_device, accelerator_rows, roofline
from tests.benchmarks.paper import paper_experiment

GUESS = {"train": 100.0, "layer": 10.0}
# What the benchmark must do without: it reads no data, parses no config flags and saves nothing.
REFUSED = (
    "array_record",
    "clu",
    "grain",
    "ml_collections",
    "PIL",
    "safetensors",
    "sentencepiece",
    "seqio",
    "tensorboardX",
    "tensorflow",
    "tensorflow_datasets",
    "tqdm",
)
SHIM = f"""
import sys
from pathlib import Path

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {REFUSED}:
            raise ModuleNotFoundError(f"refused: {{name}}", name=name)

sys.meta_path.insert(0, Refuse())
"""


def planned(tmp_path, rows, takes, deadline):
    """The rows that ran with the seconds that they had, and the lines of the others."""
    clock, ran, lines = [0.0], [], accelerator.Lines(tmp_path / "lines")

    def run_row(row, seconds):
        ran.append((row, seconds))
        clock[0] += takes[row]
        return "broken" if row.endswith("broken") else None

    accelerator.run_rows(rows, run_row, lines, GUESS, deadline, now=lambda: clock[0])
    return ran, lines.read()


def test_rows_run_in_order_while_they_are_likely_to_be_done(tmp_path):
    takes = {"train/a": 120.0, "train/b": 1.0, "layer/a": 5.0}
    ran, lines = planned(tmp_path, list(takes), takes, deadline=230.0)
    assert ran == [("train/a", 230.0), ("layer/a", 110.0)], "a second one of 120 s would not be done"
    assert lines == [{"row": "train/b", "skipped": "takes about 120 s, 110 s are left"}]


def test_a_kind_takes_as_long_as_its_longest_row(tmp_path):
    takes = {"train/a": 20.0, "train/b": 30.0, "train/c": 1.0, "train/d": 1.0}
    ran, _ = planned(tmp_path, list(takes), takes, deadline=110.0)
    assert [row for row, _ in ran] == ["train/a", "train/b", "train/c", "train/d"], "not the guess of 100"
    ran, _ = planned(tmp_path, list(takes), takes | {"train/c": 35.0}, deadline=110.0)
    assert [row for row, _ in ran] == ["train/a", "train/b", "train/c"]


def test_a_row_that_fails_teaches_no_time_and_the_rest_goes_on(tmp_path):
    takes = {"layer/broken": 1.0, "layer/a": 1.0}
    ran, lines = planned(tmp_path, list(takes), takes, deadline=10.5)
    assert [row for row, _ in ran] == ["layer/broken"]
    assert [line.get("error", line.get("skipped")) for line in lines] == ["broken", "takes about 10 s, 10 s are left"]


def test_rows_are_chosen_by_their_beginnings():
    assert accelerator.chosen_rows("layer/8E,train/XL-8E") == ["train/XL-8E", "train/XL-8E-token_choice", "layer/8E"]
    assert accelerator.chosen_rows("") == list(accelerator.ROWS)
    with pytest.raises(SystemExit, match="no row begins with trian; rows are attention"):
        accelerator.chosen_rows("train,trian")


def test_a_process_is_ended_when_the_time_is_up_with_those_it_started(tmp_path):
    log, child = tmp_path / "log", tmp_path / "child"
    error = accelerator.run_process(["bash", "-c", f"sleep 600 & echo $! > {child}; wait"], dict(os.environ), log, 0.5)
    assert error == "ended after 0 s: the time was up"
    state = Path(f"/proc/{child.read_text().strip()}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_process_that_fails_leaves_the_end_of_its_output(tmp_path):
    log = tmp_path / "log"
    assert accelerator.run_process(["bash", "-c", "echo fine"], dict(os.environ), log, 60) is None
    error = accelerator.run_process(["bash", "-c", "echo cause >&2; exit 3"], dict(os.environ), log, 60)
    assert error == "exit code 3: ...cause\n"
    assert log.read_text() == "fine\ncause\n"


@pytest.mark.parametrize(("limit", "batch"), [(10 + 256, 256), (10 + 255, 128), (0, 8), (1e9, 4096)])
def test_the_largest_batch_is_told_by_two_small_ones(limit, batch):
    """10 bytes, and one for each image."""
    assert accelerator_rows.largest_batch({32: 42, 64: 74}, limit) == batch


def test_ratios_are_of_an_images_time_at_batches_of_each_ones_own():
    def line(name, batch, rate, device="NVIDIA H200"):
        spread = {"median": rate, "min": rate - 10, "max": rate + 10}
        return {"row": f"train/{name}", "batch": batch, "images_per_second": spread, "device": device}

    [found] = accelerator.ratios([line("XL-dense", 256, 100), line("XL-8E", 128, 80)])
    assert found["row"] == "ratios/train/XL-8E"
    assert found["time_over_dense"] == {"median": 100 / 80, "min": 90 / 90, "max": 110 / 70}
    assert found["predicted_by_flops"] == pytest.approx(flops_ratio())
    h200 = Limits("", 989e12, 141e9, 4.8e12)
    bounds = [
        roofline.seconds(roofline.training_work(paper_experiment(name), batch), h200) / batch
        for name, batch in (("XL-8E", 128), ("XL-dense", 256))
    ]
    assert found["predicted_by_roofline"] == pytest.approx(bounds[0] / bounds[1])
    [unknown] = accelerator.ratios([line("XL-dense", 8, 100, "cpu"), line("XL-8E", 8, 80, "cpu")])
    assert unknown["predicted_by_roofline"] is None
    assert accelerator.ratios([line("XL-8E", 8, 80)]) == [], "nothing to compare with"


def flops_ratio():
    """Of training with the tower's forward pass."""
    from ecdit.components import total_flops
    from ecdit.system import make_system

    def flops(name):
        system = make_system(paper_experiment(name).system)
        return 3 * total_flops(system.denoiser_flops("train")) + system.parts.text.flops(128).flops

    return flops("XL-8E") / flops("XL-dense")


def test_a_part_takes_the_longer_of_its_flops_and_its_bytes():
    chip = Limits("", peak_flops=10.0, hbm_bytes=0.0, hbm_bandwidth=2.0)
    assert roofline.seconds([roofline.Work("a", 100.0, 4.0), roofline.Work("b", 10.0, 6.0)], chip) == 10.0 + 3.0


@pytest.mark.parametrize("name", ["XL-dense", "XL-8E", "XXL-16E", "M-dense"])
def test_predictions_count_the_matrices_that_the_model_has(name):
    experiment = paper_experiment(name)
    shapes = make_system(experiment.system).shapes()["denoiser"]
    small = 0.001  # norms, biases, block tables, the mask token
    real = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert sum(roofline.weights(experiment.model, 1280).values()) == pytest.approx(real, rel=small)


def test_the_expert_layers_bytes_by_hand():
    """Width 2, 8 hidden units: a slot moves 4 numbers to dispatch, 20 by products, 16 by GELU, 4 by norm and gate, and
    10 to combine.
    """
    assert roofline.ffn_numbers(2, 8) == 2 * (2 + 8) + 2 * 8
    assert roofline.slot_numbers(2, 8) == 4 + 36 + 4 + 10
    model = paper_experiment("XL-8E").model
    works = roofline.layer_work(model, 1000)
    [experts, _] = works["experts"]
    [dense] = works["dense"]
    d, f = 1152, 4608
    assert experts.flops == dense.flops == 3 * 1000 * 2 * 2 * d * (2 * f)
    assert dense.bytes == 3 * 2 * 1000 * (2 * d + 4 * 2 * f) + 24 * 2 * d * 2 * f
    assert experts.bytes == 3 * 2 * 2000 * (11 * d + 4 * f) + 24 * 2 * d * f * 8


def test_with_more_images_the_experts_weights_count_less():
    """Towards the ratio of FLOPs, from above: every expert is read once a step, however few tokens it takes."""
    chip = Limits("", 989e12, 80e9, 3.35e12)
    ratios = [
        roofline.seconds(roofline.sampling_work(paper_experiment("XL-32E"), batch), chip)
        / roofline.seconds(roofline.sampling_work(paper_experiment("XL-dense"), batch), chip)
        for batch in (1, 8, 64, 4096)
    ]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] > 3
    assert 1.2 < ratios[-1] < 1.5


@pytest.mark.parametrize("name", ["XL-8E-token_choice", "M-dense"])
def test_a_config_file_means_the_same_without_ml_collections(monkeypatch, name):
    usual = paper_experiment(name, train__batch_size=8)
    monkeypatch.setitem(sys.modules, "ml_collections", None)
    assert paper_experiment(name, train__batch_size=8) == usual
    assert usual.train.batch_size == 8


def test_random_captions_end_and_then_are_padding():
    config = paper_experiment("XL-dense")
    tokens = accelerator_device.random_tokens(np.random.default_rng(0), config, 500)
    assert tokens.shape == (500, 128)
    lengths = (tokens != 0).sum(axis=1)
    assert lengths.min() == 1
    assert lengths.max() == 128
    for row, length in zip(tokens, lengths, strict=True):
        assert row[length - 1] == 1
        assert (row[: length - 1] >= 3).all()
        assert not row[length:].any()


def tiny_run(env, tmp_path, *options):
    """The lines of a run at tiny sizes, where the packages of REFUSED cannot be imported."""
    (tmp_path / "sitecustomize.py").write_text(SHIM)
    out = tmp_path / "lines.jsonl"
    command = [sys.executable, "-m", "tests.benchmarks.accelerator", "--tiny", f"--out={out}", *options]
    done = subprocess.run(
        command,
        env={**env, "PYTHONPATH": str(tmp_path)},
        cwd=runs.ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    lines = accelerator.Lines(out).read()
    assert [json.loads(text) for text in done.stdout.splitlines()] == lines
    failed = [line for line in lines if "error" in line or "skipped" in line]
    assert not failed, out.with_suffix(".log").read_text()
    return {line["row"]: line for line in lines}


def spread_of(found):
    assert 0 < found["min"] <= found["median"] <= found["max"]
    return found


@pytest.mark.slow
def test_it_runs_with_jax_flax_optax_and_numpy(cpu_env, tmp_path):
    """A row of each kind; the kernels' row is first whether it is asked for or not, and says which to take."""
    rows = [
        "attention",
        "train/XL-8E-token_choice",
        "train_without_text/XL-8E-token_choice",
        "layer/8E",
        "sample/XL-8E",
    ]
    lines = tiny_run(cpu_env(), tmp_path, "--minutes=15", f"--rows={','.join(rows[1:])}")
    assert list(lines) == rows
    kernels, trained, alone, layer, sampled = lines.values()
    assert set(kernels["kinds"]) == {"plain", "fused"}
    assert all(kernel["error"] < 1e-5 for kernel in kernels["kinds"].values())
    assert {line["attention"] for line in (trained, layer, sampled)} == {kernels["chosen"]}
    assert trained["batch"] == accelerator_rows.TINY_BATCH
    rate = trained["batch"] / (spread_of(trained["milliseconds"])["median"] / 1e3)
    assert spread_of(trained["images_per_second"])["median"] == pytest.approx(rate, rel=0.5)
    assert trained["mfu"] is None, "no share of a peak that is not known"
    assert trained["loss"] == pytest.approx(2.0, abs=0.5), "an untrained head predicts 0: variances of noise and data"
    assert trained["step_bytes"] > 20 * trained["parameters"], "five arrays of float32"
    assert layer["one_hot_difference"] < 1e-5
    spread_of(layer["over_dense"]["token_choice"])
    assert {spread_of(rate)["median"] > 0 for rate in sampled["images_per_second"].values()} == {True}
    assert sampled["overhead_percent_by_flops"] > 0
    assert trained["text_gflops_per_image"] == 2 * alone["text_gflops_per_image"], "two tiny layers, and one"
    assert trained["denoiser_gflops_per_image"] == alone["denoiser_gflops_per_image"]
