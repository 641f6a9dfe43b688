"""Tests the benchmarks' arithmetic with made-up timings, and runs each at a tiny size. Nothing tests a speed."""

import argparse
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from ecdit.partitioning import make_mesh
from ecdit.runs.trained_run import Run
from ecdit.system import make_system
from tests import runs
from tests.benchmarks import (
    bookkeeping,
    checkpoints,
    curve,
    ec_over_dense,
    fits,
    interruption,
    jpeg_decoding,
    moe_layer,
    step,
    stored_states,
    timing,
)

# Three rounds, on a machine that is slow in the second one.
SECONDS = {"a": [2.0, 20.0, 9.0], "b": [1.0, 16.0, 2.0]}


def test_a_ratio_pairs_the_turns_of_a_round():
    """2, 1.25 and 4.5; the ratio of the medians is 4.5, that of the sums 31 / 19."""
    assert timing.paired_ratio(SECONDS["a"], SECONDS["b"]) == 2.0
    assert timing.paired_ratio([1.0, 16.0, 2.0], [4.0, 4.0, 4.0]) == 0.5


def test_rounds_without_a_partner_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        timing.paired_ratio([1.0, 2.0], [1.0])


def test_a_case_has_all_candidates_against_the_denominator_and_itself():
    case = timing.case("small", SECONDS, "b", note=1)
    assert case["ratios"] == {"a": 2.0, "b": 1.0}
    assert case["milliseconds"] == {"a": 9000.0, "b": 2000.0}
    assert case["denominator"] == "b"
    assert case["note"] == 1


def test_the_fastest_has_the_lowest_median():
    assert timing.fastest({"a": [1.0, 9.0, 9.0], "b": [5.0, 5.0, 5.0], "c": [1.0, 1.0, 1.0]}, ["a", "b"]) == "b"


def test_runs_are_summarized_by_median_lowest_and_highest():
    runs = [
        {"x": timing.case("small", {"a": [ratio], "b": [1.0]}, "b", percent={"data": ratio})} for ratio in (3, 1, 2)
    ]
    summary = timing.summarize(runs)["x"]
    assert summary["ratios"] == {
        "a": {"median": 2, "min": 1, "max": 3},
        "b": {"median": 1, "min": 1, "max": 1},
    }
    assert summary["milliseconds"]["a"] == {"median": 2000, "min": 1000, "max": 3000}
    assert summary["percent"] == {"data": {"median": 2, "min": 1, "max": 3}}
    assert summary["denominators"] == ["b", "b", "b"]


def test_candidates_take_turns_in_every_round():
    calls = []
    candidates = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    seconds = timing.take_turns(candidates, rounds=20, calls=2, warmup=1)
    assert calls[:3] == ["a", "b", "c"], "the warm-up"
    turns = [calls[i : i + 2] for i in range(3, len(calls), 2)]
    assert all(first == second for first, second in turns), "a turn is one candidate's"
    orders = [tuple(turn[0] for turn in turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert [sorted(order) for order in orders] == [["a", "b", "c"]] * 20
    assert len(set(orders)) > 1, "the order changes"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 20, "b": 20, "c": 20}


def test_a_childs_environment_has_no_flags_of_its_parent(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_something")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.setenv("JAX_NUMPY_RANK_PROMOTION", "raise")
    monkeypatch.setenv("PATH_TO_KEEP", "here")
    environment = timing.child_environment()
    assert not {"XLA_FLAGS", "MALLOC_ARENA_MAX", "JAX_NUMPY_RANK_PROMOTION"} & set(environment)
    assert environment["PATH_TO_KEEP"] == "here"
    assert environment["JAX_PLATFORMS"] == "cpu"


def test_a_steps_parts_are_shares_of_the_loop():
    seconds = {"loop": 10.0, "forward": 2.0, "gradients": 6.0, "update": 1.5, "ema": 0.5, "report": 0.25}
    rounds = {name: [value, 3 * value] for name, value in {**seconds, "wait_in_loop": 0.25}.items()}
    assert step.percentages(rounds) == pytest.approx(
        {
            "data": 2.5,
            "forward": 20.0,
            "backward": 40.0,
            "optimizer": 10.0,
            "ema": 5.0,
            "logging": 2.5,
            "sum_of_parts": 80.0,
            "outside_forward_and_backward": 40.0,
            "outside_by_parts": 25.0,
        }
    )


def benchmark(name, env, tmp_path, *options):
    """What one run of a benchmark wrote, and printed."""
    path = tmp_path / "result.json"
    command = [sys.executable, "-m", f"tests.benchmarks.{name}", "--runs=1", "--quick", f"--json={path}", *options]
    done = runs.run(command, env)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


def check_case(case, names):
    assert set(case["ratios"]) == set(case["milliseconds"]) == names
    denominator = case["denominator"]
    assert case["ratios"][denominator] == 1.0
    for name, seconds in case["seconds"].items():
        assert case["ratios"][name] == timing.paired_ratio(seconds, case["seconds"][denominator])


def test_moe_layer(cpu_env, tmp_path):
    result, shown = benchmark("moe_layer", cpu_env(), tmp_path, "--rounds=2", "--calls=1", "--sizes=16x2x16x4")
    [run] = result["runs"]
    case = run["cases"]["16x2x16x4"]
    dense = {"feed_forward", "plain", "flat", "recomputed", "halves"}
    check_case(case, dense | {"moe", "moe_expert_norm"})
    assert case["denominator"] in dense
    assert set(case["relative_error"]) == dense | {"moe"}
    assert max(case["relative_error"].values()) < 1e-4
    assert "--xla_cpu_enable_fast_math=true" in run["environment"]["xla_flags"]
    assert run["environment"]["keep_host_memory"] is True
    assert result["summary"]["16x2x16x4"]["ratios"]["moe"]["median"] == case["ratios"]["moe"]
    for word in ("jax: ", "xla_flags: ", "float32", "1 runs, 2 rounds", "hidden 64"):
        assert word in shown


def test_sizes_of_unequal_flops_are_refused():
    moe_layer.check_slots("even", tokens=10, experts=4)
    with pytest.raises(SystemExit, match="odd: 4 experts have 20 slots for 9 tokens"):
        moe_layer.check_slots("odd", tokens=9, experts=4)


def test_candidates_that_disagree_are_refused():
    moe_layer.check_agreement("all", {"a": 0.0, "b": 1e-6})
    with pytest.raises(SystemExit, match=r"some: relative errors above .*'b': 0.5, 'c': nan"):
        moe_layer.check_agreement("some", {"a": 0.0, "b": 0.5, "c": float("nan")})


def test_the_relative_error_is_that_of_the_worst_leaf():
    """1 of 4 in the first leaf, 1 of 2 in the second."""
    found, expected = (
        {"a": np.array([1.0, 4.0]), "b": np.array([3.0])},
        {"a": np.array([2.0, 4.0]), "b": np.array([2.0])},
    )
    assert moe_layer.relative_error(found, expected) == 0.5
    assert np.isnan(moe_layer.relative_error({**found, "b": np.array([np.nan])}, expected))


def test_dispatch(cpu_env, tmp_path):
    options = ("--rounds=2", "--calls=1", "--groups=16", "--tokens=64", "--width=16", "--experts=4")
    result, _ = benchmark("dispatch", cpu_env(), tmp_path, *options)
    [run] = result["runs"]
    names = {"gather", "one_hot"}
    if run["environment"]["torch"] != "not installed: left out":
        names |= {"torch_gather", "torch_one_hot"}
    case = run["cases"]["group_16"]
    check_case(case, names)
    assert case["denominator"] == "gather"
    assert set(case["relative_error"]) == names
    assert max(case["relative_error"].values()) < 1e-4


@pytest.mark.slow
def test_probe(cpu_env, emoji_data, tmp_path):
    result, shown = benchmark(
        "probe", cpu_env(), tmp_path, "--rounds=3", "--calls=10", "--tiny", f"--data={emoji_data}"
    )
    [run] = result["runs"]
    case = run["cases"]["step"]
    check_case(case, {"probe", "emoji"})
    assert case["denominator"] == "emoji", "so that the ratio is that of steps per second"
    assert "fast_math" in run["environment"]["xla_flags"]
    assert "fast_math" not in run["environment"]["xla_flags of the probe"]
    for side in ("probe", "emoji"):
        assert case["steps_per_second"][side] == pytest.approx(1000 / case["milliseconds"][side])
        assert f"{result['summary']['step']['steps_per_second'][side]['median']:.3f}" in shown
        losses = case["losses"][side]
        assert len(losses) == 3 + 3 * 10
        assert np.isfinite(losses).all()
    probe_losses = case["losses"]["probe"]
    assert np.mean(probe_losses[-10:]) < 0.9 * np.mean(probe_losses[:10]), "it learns"


@pytest.mark.slow
def test_step(cpu_env, emoji_data, tmp_path):
    options = ("--rounds=2", "--calls=2", "--tiny", f"--data={emoji_data}")
    result, shown = benchmark("step", cpu_env(), tmp_path, *options)
    case = result["runs"][0]["cases"]["step"]
    alone = {"train_step", "forward", "gradients", "update", "ema", "report", "next_batch", "wait_in_loop"}
    check_case(case, alone | {"loop"})
    assert case["denominator"] == "loop"
    assert case["percent"] == step.percentages(case["seconds"])
    assert f"{case['percent']['forward']:6.2f}" in shown


def test_a_step_is_compared_with_its_operations():
    """Twice the time for 1.6 times the operations is a quarter too much."""
    assert ec_over_dense.percentages(2.0, 1.6) == pytest.approx({"flops": 160.0, "over_flops": 25.0})


def test_experts_add_as_many_operations_as_their_slots_and_router_have():
    """Tiny: two of four layers, 8 tokens of which each has two slots instead of one row, and a router 32 x 4."""
    arguments = argparse.Namespace(tiny=True, data="data")
    sparse, dense = (ec_over_dense.training_flops(ec_over_dense.with_ffn(ffn, arguments)) for ffn in ec_over_dense.FFNS)
    assert sparse - dense == pytest.approx(3 * 2 * 2 * 8 * (2 * 32 * 128 + 32 * 4))


@pytest.mark.slow
def test_ec_over_dense(cpu_env, emoji_data, tmp_path):
    options = ("--rounds=2", "--calls=1", "--tiny", f"--data={emoji_data}")
    result, shown = benchmark("ec_over_dense", cpu_env(), tmp_path, *options)
    case = result["runs"][0]["cases"]["step"]
    check_case(case, {"expert_choice", "dense"})
    assert case["denominator"] == "dense"
    assert "GFLOP" in case["sizes"]
    assert case["percent"] == ec_over_dense.percentages(case["ratios"]["expert_choice"], case["percent"]["flops"] / 100)
    assert f"{case['percent']['over_flops']:6.2f}" in shown


def test_a_save_is_a_share_of_the_steps_between_two():
    """A save adds 6 s and 2 s to turns of 10 steps of 2 s, and 10 s to one of 4 s: of 50 steps 6 %, 2 % and 5 %."""
    rounds = [
        {"saving": 2.6, "not_saving": 2.0, "checksums": 0.01},
        {"saving": 2.2, "not_saving": 2.0, "checksums": 0.03},
        {"saving": 5.0, "not_saving": 4.0, "checksums": 0.04},
    ]
    assert checkpoints.percentages(rounds, 10) == pytest.approx({"checkpoints": 5.0, "checksums": 0.2})


@pytest.mark.slow
def test_checkpoints(cpu_env, emoji_data, tmp_path):
    options = ("--rounds=2", "--calls=2", "--tiny", f"--data={emoji_data}")
    result, _ = benchmark("checkpoints", cpu_env(), tmp_path, *options)
    (case,) = result["runs"][0]["cases"].values()
    assert set(case["seconds"]) == {"saving", "not_saving", "checksums"}
    assert set(case["percent"]) == {"checkpoints", "checksums"}


@pytest.mark.slow
def test_bookkeeping(cpu_env, emoji_data, tmp_path):
    options = ("--rounds=2", "--calls=3", "--tiny", f"--data={emoji_data}")
    result, _ = benchmark("bookkeeping", cpu_env(), tmp_path, *options)
    case = result["runs"][0]["cases"]["step"]
    check_case(case, {"booked", "bare"})
    assert case["percent"] == bookkeeping.percentages(
        case["seconds"], case["empty_seconds"], case["percent"]["threads beside the steps"] / 100
    )
    assert 0 < case["percent"]["threads beside the steps"] < 100


def test_the_share_of_bookkeeping_by_hand():
    seconds = {"booked": [2.2, 4.0, 1.0], "bare": [2.0, 4.0, 1.0]}
    empty = {"booked": [0.03, 0.09, 0.05], "bare": [0.01, 0.01, 0.01]}
    found = bookkeeping.percentages(seconds, empty, 0.001)
    assert found == pytest.approx(
        {"the hooks, from whole steps": 0.0, "the hooks alone": 2.0, "threads beside the steps": 0.1}
    )


@pytest.mark.slow
def test_first_step(cpu_env, emoji_data, tmp_path):
    result, _ = benchmark("first_step", cpu_env(), tmp_path, "--tiny", f"--data={emoji_data}")
    cases = result["runs"][0]["cases"]
    check_case(cases["command"], {"cold", "warm"})
    assert cases["command"]["denominator"] == "cold"
    for cache in ("cold", "warm"):
        seconds = {name: values[0] for name, values in cases[f"phases, {cache} cache"]["seconds"].items()}
        whole = seconds.pop("all")
        assert whole == pytest.approx(sum(seconds.values()))
        assert seconds["compile_step"] > 0
        assert seconds["python_and_imports"] < whole < cases["command"]["seconds"][cache][0] + 60


def test_a_fit_is_the_mean_of_its_last_steps():
    """Losses 1 to 150: the last hundred are 51 to 150. Two layers."""
    rows = [{"flow_loss": n, "router_grad_norm": [n, 3 * n], "bad_steps": 2} for n in range(1, 151)]
    assert fits.means(map(json.dumps, rows)) == {"loss": 100.5, "router_grad": 201.0, "bad_steps": 2}


def test_optimizers_are_compared_at_their_best_rates(monkeypatch, tmp_path):
    """The loss is the distance from the second rate, but for AdamW's: there the third is best."""
    done = []

    def fit(arguments, name, changes, core):
        done.append(name)
        rates = fits.ALONE if "momentum 0" in name or "adamw" in name else fits.RMSPROP
        best = rates[2 if changes.get("optimizer.name") == "adamw" else 1]
        return {"loss": abs(changes["optimizer.learning_rate"] - best) + changes["seed"]}

    monkeypatch.setattr(fits, "fit", fit)
    found = fits.optimizers(argparse.Namespace(workdir=tmp_path))
    assert len(done) == len(set(done)) == 3 * 6 + 2 * 6
    assert {name: len(values) for name, values in found.items() if len(values) > 1} == {
        **{f"{name}, rate 0.0001": 3 for name in fits.OPTIMIZERS if name not in ("adamw", "rmsprop, momentum 0")},
        "rmsprop, momentum 0, rate 0.001": 3,
        "adamw, rate 0.002": 3,
    }
    assert found["rmsprop, rate 0.0001"] == [{"loss": 0.0}, {"loss": 1.0}, {"loss": 2.0}]
    assert fits.table(found)[2:4] == [
        "| rmsprop, rate 5e-05 | 0.0001 |",
        "| rmsprop, rate 0.0001 | 0.0000 1.0000 2.0000 |",
    ]


@pytest.mark.slow
def test_fits_train_and_read_the_emoji_config(cpu_env, emoji_data, tmp_path, monkeypatch):
    for key, value in cpu_env().items():
        monkeypatch.setenv(key, value)
    arguments = argparse.Namespace(what="optimizers", workdir=tmp_path, steps=2, data=str(emoji_data), tiny=True)
    changes = {"optimizer.name": "adamw", "optimizer.learning_rate": 1e-3, "seed": 3}
    core = min(os.sched_getaffinity(0))
    found = fits.fit(arguments, "adamw, seed 3", changes, core)
    assert set(found) == {"loss", "router_grad", "bad_steps"}
    config = json.loads((tmp_path / "adamw, seed 3" / "config.json").read_text())
    assert (config["optimizer"]["name"], config["seed"], config["train"]["num_steps"]) == ("adamw", 3, 2)
    lines = (tmp_path / "adamw, seed 3" / "metrics.jsonl").read_text()
    assert fits.fit(arguments, "adamw, seed 3", changes, core) == found, "done: only read"
    assert (tmp_path / "adamw, seed 3" / "metrics.jsonl").read_text() == lines


def test_a_curve_has_minutes_from_the_first_step_and_a_point_for_each_checkpoint(monkeypatch, tmp_path):
    times = {1: 100.0, 2: 160.0, 3: 280.0}
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {k}, "time": {v}}}\n' for k, v in times.items()))
    for name in ("2", "3", "3.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    monkeypatch.setattr(curve, "evaluate", lambda workdir, step: {"r_at_1": step / 10, "r_at_5": step / 4})
    (tmp_path / "overrides.json").write_text("[{}, {}]")
    with pytest.raises(SystemExit, match="was started 2 times"):
        curve.measure(tmp_path)
    (tmp_path / "overrides.json").write_text("[{}]")
    points = curve.measure(tmp_path)
    assert points == [
        {"step": 2, "minutes": 1.0, "r_at_1": 0.2, "r_at_5": 0.5},
        {"step": 3, "minutes": 3.0, "r_at_1": 0.3, "r_at_5": 0.75},
    ]
    assert curve.table(points)[2:] == ["| 2 | 1.0 | 20.0% | 50.0% |", "| 3 | 3.0 | 30.0% | 75.0% |"]


def test_states_stored_in_int8_change_losses_more_than_in_bfloat16():
    """Of a model that attends to its captions: all its weights are random. Losses differ, image by image."""
    experiment = runs.tiny(mesh__data=1, model__depth=2, model__extra_blocks=1, model__ffn="dense")
    system, mesh = make_system(experiment.system), make_mesh(experiment.mesh, jax.devices()[:1])
    run = Run(experiment, system, mesh, runs.random_params(system), 0, "", "", "", {})
    rng, n = np.random.default_rng(0), 5
    rows = {
        "image": rng.integers(0, 256, (n, 32, 32, 3)).astype(np.uint8),
        "tokens": rng.integers(3, 200, (n, experiment.data.caption_length)).astype(np.int32),
        "size_crop": np.full((n, 4), 72, np.float32),
    }
    found = stored_states.measure(run, rows)
    assert list(found) == ["as they are", "bfloat16", "int8"]
    assert (found["as they are"]["difference"], found["as they are"]["spread"]) == (0, 0)
    changed = {kind: np.linalg.norm(row["by_time"]) for kind, row in found.items()}
    assert 0 < changed["bfloat16"] < changed["int8"] < 0.1 * found["as they are"]["loss"]
    for row in found.values():
        assert row["loss"] - found["as they are"]["loss"] == pytest.approx(row["difference"], abs=1e-6)
        assert np.mean(row["by_time"]) == pytest.approx(row["difference"])


def test_the_benchmark_of_data_measures_every_case(cpu_env, tmp_path):
    """Tiny: that every loader that is installed reads the tars, not how fast."""
    options = ("--runs=1", "--rounds=2", "--calls=1", "--tiny", f"--json={tmp_path}/data.json")
    command = [sys.executable, "-m", "tests.benchmarks.data", *options]
    done = subprocess.run(command, cwd=runs.ROOT, env=cpu_env(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "data.json").read_text())
    assert {"images", "latents", "prepare"} == set(found["cases"])
    assert {"ours", "tf.data"} <= set(found["cases"]["images"]["ratios"])
    assert set(found["resume"][0]) == {"0", "1000000000"}


def test_jpeg_decoding(monkeypatch):
    """All decoders that are installed read the same pixels; the ratio is against the fastest peer."""
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)  # the test's process keeps its cores
    found = jpeg_decoding.measure(argparse.Namespace(images=2, side=16, quality=90, rounds=2, calls=1))
    case = found["cases"]["jpeg"]
    assert {"decode_stored", "simplejpeg", "pillow"} <= set(case["ratios"])
    assert case["denominator"] != "decode_stored"


def test_interruption(tmp_path):
    """What is read a second time for want of a position is counted, and of our own loader nothing is."""
    interruption.write_data(tmp_path, None)
    assert interruption.interrupted(sys.executable, "ours", tmp_path, 4) == {"repeated": 0, "lost": 0}
    trained = [key for host in (0, 1) for key in _first_batch(tmp_path, host)]
    assert interruption.counted([*trained, *trained]) == {"repeated": 64, "lost": 576}


def _first_batch(place, host):
    return next(interruption.read_ours(place, host, 2, ""))[0]
