"""Tests tables, power laws and plots of runs with made-up metrics."""

import csv
import dataclasses
import errno
import hashlib
import importlib.util
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecdit.config import to_dict
from ecdit.errors import UserError
from ecdit.runs.provenance import record_start
from launch.sweeps.collecting import collect, read_result, why_left_out
from launch.sweeps.fitting import fit_power_law
from launch.sweeps.points import INPUTS, SweepPoint
from launch.sweeps.running import is_done
from tests.runs import tiny

WIDTH, FFN = "config.model.width", "config.model.ffn"


def test_a_power_law_and_its_errors_as_computed_by_hand():
    """ln x = 0, 1, 2 and ln y = 3, 1, 2.

    Slope: (-1 x 1 + 1 x 0) / 2 = -1/2. Residuals from 5/2 - ln x / 2: 1/2, -1, 1/2, of squares 3/2 over 3 - 2 degrees
    of freedom. Error of the slope: sqrt(3/2 / 2); of ln y at ln x = 1: sqrt(3/2 / 3), at 0: sqrt(3/2 (1/3 + 1/2)).
    """
    law = fit_power_law(np.exp([0.0, 1, 2]).tolist(), np.exp([3.0, 1, 2]).tolist())
    assert law.points == 3
    np.testing.assert_allclose([law.b, law.b_error, law.a], [0.5, math.sqrt(0.75), math.exp(2.5)], rtol=1e-12)
    np.testing.assert_allclose(law.b_interval, 12.706 * math.sqrt(0.75), rtol=1e-12)
    np.testing.assert_allclose(law.log_error(np.exp([1.0, 0])), [math.sqrt(0.5), math.sqrt(1.25)], rtol=1e-12)
    np.testing.assert_allclose(law.at(np.exp([2.0])), [math.exp(1.5)], rtol=1e-12)


def test_an_exact_power_law_is_found_without_an_error():
    law = fit_power_law([1e6, 4e6, 1e7, 5e7], [3 * x**-0.25 for x in (1e6, 4e6, 1e7, 5e7)])
    np.testing.assert_allclose([law.a, law.b], [3, 0.25], rtol=1e-9)
    assert law.b_error < 1e-9


def test_fewer_than_three_sizes_or_nearly_equal_ones_have_no_fit():
    assert fit_power_law([1, 2, 2], [3, 2, 2.1]) is None
    assert fit_power_law([1, 1.05, 1.2], [3, 2, 1]) is None
    assert fit_power_law([1, 1.2, 1.5], [3, 2, 1]) is not None


@pytest.fixture
def points():
    """Three widths, dense and with experts, of ten steps."""
    made = []
    for ffn in ("dense", "expert_choice"):
        for width in (32, 64, 128):
            experiment = tiny(model__width=width, model__ffn=ffn, train__num_steps=10)
            made.append(SweepPoint(f"width-{width}-{ffn}", (), {}, experiment, {WIDTH: width, FFN: ffn}, ffn))
    return made


def write_run(directory, point, losses, tail="", **config):
    """A run of the point, or of one that differs from it in `config`."""
    (directory / point.name).mkdir()
    values = dataclasses.replace(point.experiment, **config)
    (directory / point.name / "config.json").write_text(json.dumps(to_dict(values)))
    # Last the loss with what balances experts, which must not count.
    rows = [{"step": step, "flow_loss": loss, "loss": 99.0} for step, loss in enumerate(losses, 1)]
    (directory / point.name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)


def test_the_final_loss_is_the_mean_over_the_last_steps(tmp_path, points):
    write_run(tmp_path, points[0], [9, 9, 9, 9, 9, 9, 4, None, 1, 2], '{"step": 11, "flo')
    result = read_result(points[0], tmp_path / points[0].name, share=0.4)
    assert (result.step, result.finished) == (10, True)
    np.testing.assert_allclose([result.loss, result.loss_error], [7 / 3, math.sqrt(7 / 3 / 3)], rtol=1e-12)
    assert len(result.losses) == 9
    twenty = tiny(model__width=32, model__ffn="dense", train__num_steps=20)
    longer = dataclasses.replace(points[0], experiment=twenty)
    assert read_result(longer, tmp_path / points[0].name, share=0.6).left_out == ""
    assert read_result(longer, tmp_path / points[0].name, share=0.6).loss is None


def test_a_part_of_a_sweep_is_collected_with_fits_of_what_is_finished(tmp_path, points):
    counts = [point.counts() for point in points]
    for point, count in zip(points[:3], counts, strict=False):
        write_run(tmp_path, point, [5.0] * 8 + [count.activated_params**-0.5] * 2)
    write_run(tmp_path, points[3], [1.0] * 10)
    write_run(tmp_path, points[4], [1.0] * 7)
    files = collect(points, tmp_path, share=0.2)
    assert [file.name for file in files] == [
        *("sweep.csv", "sweep.md"),
        *("loss_steps.png", "loss_flops.png", "loss_params.png"),
    ]
    for file in files[2:]:
        with Image.open(file) as image:
            assert np.asarray(image.convert("L")).std() > 5
    rows = list(csv.DictReader((tmp_path / "sweep.csv").read_text().splitlines()))
    assert [row["loss"] != "" for row in rows] == [True] * 4 + [False] * 2
    assert [row["step"] for row in rows] == ["10"] * 4 + ["7", "0"]
    assert [row[WIDTH] for row in rows] == ["32", "64", "128"] * 2
    assert [int(row["activated_params"]) for row in rows] == [count.activated_params for count in counts]
    flops = sum(part["flops"] for part in counts[0].flops_per_image.values())
    assert float(rows[0]["flops"]) == flops
    text = (tmp_path / "sweep.md").read_text()
    assert "Not finished, and in no fit: width-64-expert_choice (7 of 10 steps), width-128-expert_choice (0 of" in text
    assert "| dense | activated parameters of the denoiser | 3 | 0.5000 ± 0.0000 | 0.5000 to 0.5000 | 1 |" in text
    assert "| expert_choice |" not in text  # one finished point is no series to fit
    assert "no offset" in text
    assert "over the last 20% of the steps" in text


def test_a_plot_that_cannot_be_written_leaves_the_old_one(tmp_path, points, monkeypatch):
    """A disk that is full after a few bytes."""

    def fill(path, data):
        with path.open("wb") as file:
            file.write(data[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    write_run(tmp_path, points[0], [1.0] * 10)
    collect(points[:1], tmp_path, share=0.2)
    before = (tmp_path / "loss_steps.png").read_bytes()
    monkeypatch.setattr(Path, "write_bytes", fill)
    with pytest.raises(UserError, match=r"writing .*loss_steps.png failed: .*No space left"):
        collect(points[:1], tmp_path, share=0.2)
    assert (tmp_path / "loss_steps.png").read_bytes() == before


def test_runs_that_are_not_what_the_sweep_says_are_left_out_and_listed(tmp_path, points):
    """Runs of another seed, of another width, without a step, with a step twice, without a config, of no point."""
    write_run(tmp_path, points[0], [1.0] * 10)
    write_run(tmp_path, points[1], [2.0] * 10, seed=points[1].experiment.seed + 1)
    write_run(tmp_path, points[2], [3.0] * 10, model=points[0].experiment.model)
    for point, steps in ((points[3], [1, 2, 3, 4, 6, 7, 8, 9, 10]), (points[4], [1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10])):
        write_run(tmp_path, point, [])
        rows = "".join(json.dumps({"step": step, "flow_loss": 1.0}) + "\n" for step in steps)
        (tmp_path / point.name / "metrics.jsonl").write_text(rows)
    write_run(tmp_path, points[5], [1.0] * 10)
    (tmp_path / points[5].name / "config.json").unlink()
    (tmp_path / "stranger").mkdir()
    (tmp_path / "stranger/config.json").write_text("{}")
    collect(points, tmp_path, share=0.2)
    rows = list(csv.DictReader((tmp_path / "sweep.csv").read_text().splitlines()))
    assert [row["loss"] for row in rows] == ["1.0", "", "", "", "1.0", ""]
    seed = points[1].experiment.seed
    expected = [
        "",
        f"its config differs: config.seed: saved {seed + 1}, now {seed}",
        "its config differs: config.model.width: saved 32, now 128",
        "its metrics have step 6 instead of step 5",
        "",  # a step that is there twice is taken once
        "it has no config.json",
    ]
    assert [row["left_out"] for row in rows] == expected
    text = (tmp_path / "sweep.md").read_text()
    left_out = [(point, why) for point, why in zip(points, expected, strict=True) if why]
    assert all(f"- {point.name}: {why}\n" in text for point, why in left_out)
    assert "no points of the sweep: stranger." in text
    with pytest.raises(
        UserError, match="no point of this sweep has been run there\n  width-64-dense: its config differs"
    ):
        collect(points[1:2], tmp_path, share=0.2)


@pytest.mark.parametrize("key", sorted(INPUTS))
def test_a_run_that_read_something_else_does_not_count_as_its_points(tmp_path, points, key):
    """Each of these keys may change on a resume, as log_every may, which changes nothing of the results."""
    group, _, name = key.partition(".")
    (tmp_path / "checkpoints/10").mkdir(parents=True)
    for changed, value, expected in (("train.log_every", 7, False), (key, "elsewhere", True)):
        saved = to_dict(points[0].experiment)
        saved[changed.partition(".")[0]][changed.partition(".")[2]] = value
        (tmp_path / "config.json").write_text(json.dumps(saved))
        now = to_dict(points[0].experiment)[group][name]
        line = f"config.{key}: saved 'elsewhere', now {now!r}"
        left_out = why_left_out(points[0], tmp_path, range(1, 11))
        assert left_out == (f"its config differs: {line}" if expected else "")
        if expected:
            with pytest.raises(UserError, match=re.escape(f"holds another run:\n  {line}\nTake another")):
                is_done(points[0], tmp_path)
        else:
            assert is_done(points[0], tmp_path)
    (tmp_path / "checkpoints/10").rename(tmp_path / "checkpoints/5")
    assert not is_done(points[0], tmp_path)  # it goes on, and compares what is there then


def test_a_run_that_read_another_version_of_a_user_s_file_does_not_count(tmp_path, points):
    module, workdir = tmp_path / "my_tasks.py", tmp_path / "run"
    module.write_text("version = 1\n")
    experiment = tiny(data__module=str(module), train__num_steps=10)
    point = dataclasses.replace(points[0], experiment=experiment)
    (workdir / "checkpoints/10").mkdir(parents=True)
    config = to_dict(experiment)
    (workdir / "config.json").write_text(json.dumps(config))
    assert is_done(point, workdir)  # an older version noted no files
    record_start(config, workdir, 0, {"files": experiment.user_files()})
    assert is_done(point, workdir)
    assert why_left_out(point, workdir, range(1, 11)) == ""
    module.write_text("version = 2\n")
    before = hashlib.sha256(b"version = 1\n").hexdigest()
    line = f"{module}: its sha256 was {before[:12]}, and is"
    assert why_left_out(point, workdir, range(1, 11)).startswith(f"it read other files: {line}")
    with pytest.raises(UserError, match=re.escape(f"holds another run:\n  {line}")):
        is_done(point, workdir)
    for damaged in ("[{", '[{"files": {"a": 1}}]', '[{"files": []}]'):
        (workdir / "overrides.json").write_text(damaged)
        assert "overrides.json is damaged" in why_left_out(point, workdir, range(1, 11))
        with pytest.raises(UserError, match=f"point {point.name}: .*overrides.json is damaged"):
            is_done(point, workdir)
    (workdir / "overrides.json").unlink()
    module.unlink()
    assert is_done(point, workdir)  # nothing was noted, so nothing is read
    assert why_left_out(point, workdir, range(1, 11)) == ""
    record_start(config, workdir, 0, {"files": {str(module): before}})
    with pytest.raises(UserError, match=f"point {point.name}: .*there is no such file"):
        is_done(point, workdir)
    assert "there is no such file" in why_left_out(point, workdir, range(1, 11))
    (workdir / "checkpoints/10").rename(workdir / "checkpoints/5")
    assert not is_done(point, workdir)  # it goes on, and compares the files then


def test_an_outage_leaves_no_run_out(tmp_path, points, monkeypatch):
    config = to_dict(points[0].experiment)
    record_start(config, tmp_path, 0, {"files": {}})
    assert why_left_out(points[0], tmp_path, range(1, 11)) == ""
    read_text = Path.read_text

    def read(path, *arguments, **options):
        if path.name == "overrides.json":
            raise ConnectionError("no route to host")
        return read_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", read)
    with pytest.raises(UserError, match=r"overrides\.json cannot be read: .*no route to host"):
        why_left_out(points[0], tmp_path, range(1, 11))


def test_without_matplotlib_there_are_tables_and_a_word_about_plots(tmp_path, points, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    write_run(tmp_path, points[0], [1.0] * 10)
    assert [file.name for file in collect(points[:1], tmp_path, share=0.2)] == ["sweep.csv", "sweep.md"]
    text = (tmp_path / "sweep.md").read_text()
    assert "matplotlib is not installed" in text
    assert "No power law: that takes" in text
