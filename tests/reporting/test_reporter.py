"""Tests that metrics.jsonl has complete lines, one per step, after any interruption."""

import dataclasses
import json
import math
from types import SimpleNamespace

import jax
import pytest

from ecdit.errors import UserError
from ecdit.partitioning import make_mesh
from ecdit.reporting import metrics_file as lines
from ecdit.reporting import reporter as reporting
from ecdit.reporting import speed
from ecdit.reporting.metrics_file import drop_lines_after, open_lines, read_lines
from ecdit.reporting.reporter import Reporter, first_line, forecast, named_scalars
from ecdit.reporting.speed import Speed, Stopwatch, flops_text
from ecdit.system import make_system
from tests.runs import tiny

CONFIG = dataclasses.replace(tiny().train, num_steps=12, batch_size=4, log_every=5)
METRICS = {"loss": 0.5, "grad_norm": 1.0, "bad_in_row": 0, "bad_leaf": -1}
BEFORE = '{"step": 1, "x": 1}\n{"step": 2, "x": 1}\n{"step": 3, "x": 1}\n'


def make_reporter(workdir, start=0, peak=None, writers=(), **changes):
    """Of steps with 4 images and 8 TFLOPs."""
    reporter = Reporter(workdir, start, dataclasses.replace(CONFIG, **changes), ["w"], writers)
    reporter.begin(Stopwatch(4, 8e12, peak))
    return reporter


class Clock:
    """time.monotonic of a step every `seconds`."""

    def __init__(self, monkeypatch, seconds):
        self.now, self.seconds = 0.0, seconds
        monkeypatch.setattr(reporting.time, "monotonic", self)

    def __call__(self):
        self.now += self.seconds
        return self.now


@pytest.mark.parametrize(
    ("text", "step", "left"),
    [
        (BEFORE, 2, '{"step": 1, "x": 1}\n{"step": 2, "x": 1}\n'),
        (BEFORE, 9, BEFORE),
        (BEFORE, 0, ""),
        (BEFORE + '{"step": 4, "x', 9, BEFORE),  # torn by a kill
        (BEFORE + '{"step": 4, "x": 1}', 9, BEFORE),  # whole but for its end: it would run into the next line
        ("", 9, ""),
    ],
)
def test_a_resumed_run_keeps_the_lines_up_to_its_step(tmp_path, text, step, left):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    drop_lines_after(path, step)
    assert path.read_text() == left
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", [0, 3, 4, 6, 8, 9, 12])
def test_a_resumed_run_keeps_the_parts_up_to_its_step(tmp_path, monkeypatch, step):
    """Those of a bucket, as files."""
    line = lambda k: f'{{"step": {k}}}\n'  # noqa: E731
    monkeypatch.setattr(lines, "is_remote", lambda path: True)
    (tmp_path / "metrics").mkdir()
    for first, last in ((1, 4), (5, 8), (9, 9), (10, 12)):
        (tmp_path / f"metrics/{first:08d}.jsonl").write_text("".join(map(line, range(first, last + 1))))
    foreign = ("notes.jsonl", "00000003.jsonl.bak", "\u00b2.jsonl", "2024")
    for name in foreign:
        (tmp_path / "metrics" / name).write_text('{"step": 7}\n')
    parts = open_lines(tmp_path, step)
    assert [row["step"] for row in read_lines(tmp_path)] == list(range(1, step + 1))
    for k in range(step + 1, 20):
        parts.write(line(k).encode())
    parts.close()
    assert (tmp_path / f"metrics/{step + 1:08d}.jsonl").read_text() == "".join(map(line, range(step + 1, 20)))
    assert [row["step"] for row in read_lines(tmp_path)] == list(range(1, 20))
    assert [(tmp_path / "metrics" / name).read_text() for name in foreign] == ['{"step": 7}\n'] * 4


def test_the_lines_of_a_run_on_a_disk_are_read_but_for_a_torn_one(tmp_path):
    assert read_lines(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_lines(tmp_path) == [{"step": 1}, {"step": 2}]


def test_lines_are_there_before_the_file_is_closed(tmp_path, capsys):
    reporter = make_reporter(tmp_path)
    for step in range(1, 13):
        reporter.report(step, METRICS, 0.25)
        rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, step + 1))
        assert all(type(row["step"]) is int for row in rows)
    reporter.close()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed] == ["5/12", "10/12", "12/12"]


def test_a_line_that_is_no_json_does_not_stop_the_run(tmp_path):
    """A disk that was full, or another program: the message or the repair may differ, a traceback may not be."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n\x00\x00\n{"step": 2}\n')
    make_reporter(tmp_path, 2).close()
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]


def test_the_time_left_of_a_run_of_days_is_not_cut_to_hours(tmp_path, capsys, monkeypatch):
    """Ten hours a step: after the second of 12, ten steps or 100 hours are left."""
    Clock(monkeypatch, 36_000.0)
    reporter = make_reporter(tmp_path, log_every=1)
    for step in (1, 2):
        reporter.report(step, METRICS, 0.25)
    reporter.close()
    line = capsys.readouterr().out.splitlines()[-1]
    assert "100:00:00 left" in line or "4 days, 4:00:00 left" in line, line


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("peak", [None, 40e12])
def test_speeds_by_hand(tmp_path, capsys, monkeypatch, peak):
    """Two seconds a step of 4 images and 8 TFLOPs, of which the first is not timed; waits of 0, 1, 2 s."""
    Clock(monkeypatch, 2.0)
    reporter = make_reporter(tmp_path, peak=peak, log_every=1)
    for step in (1, 2, 3):
        reporter.report(step, METRICS, float(step - 1))
    reporter.close()
    share = "  10.0% of peak" if peak else ""
    assert capsys.readouterr().out.splitlines() == [
        "step 1/12  loss 0.5000  grad 1.000  compiled",
        f"step 2/12  loss 0.5000  grad 1.000  2.0 images/s  4.0 TFLOP/s model{share}  data wait 1.000 s  0:00:20 left",
        f"step 3/12  loss 0.5000  grad 1.000  2.0 images/s  4.0 TFLOP/s model{share}  data wait 1.500 s  0:00:18 left",
    ]
    assert [row["images_per_second"] for row in rows(tmp_path)] == [None, 2.0, 2.0]
    assert [row["model_flops_per_second"] for row in rows(tmp_path)] == [None, 4e12, 4e12]
    assert [row["data_seconds"] for row in rows(tmp_path)] == [0.0, 1.0, 2.0]
    assert [row.get("peak_share", "unknown") for row in rows(tmp_path)] == (
        [None, 0.1, 0.1] if peak else ["unknown"] * 3
    )


def test_the_printed_speed_is_a_mean(tmp_path, capsys, monkeypatch):
    """Steps of 2 and 4 seconds are 3 on average: 4 images in it, and nine steps are left."""
    clock = Clock(monkeypatch, 2.0)
    reporter = make_reporter(tmp_path, log_every=1)
    for step in (1, 2, 3):
        clock.now += 2.0 * (step == 3)
        reporter.report(step, METRICS, 0.0)
    reporter.close()
    line = capsys.readouterr().out.splitlines()[-1]
    assert "  1.3 images/s  " in line
    assert "  0:00:27 left" in line
    assert [row["images_per_second"] for row in rows(tmp_path)] == [None, 2.0, 1.0]


def test_the_peak_is_that_of_all_devices(monkeypatch):
    monkeypatch.setattr(speed, "limits", lambda kind: SimpleNamespace(peak_flops=1e12))
    watch = speed.stopwatch(tiny().train.batch_size, make_system(tiny().system).training_flops())
    assert (watch.images, watch.peak) == (16, 8e12)


def test_the_time_that_images_take_is_no_step_s(tmp_path, monkeypatch):
    clock = Clock(monkeypatch, 2.0)
    reporter = make_reporter(tmp_path)
    for step in range(1, 5):
        reporter.report(step, METRICS, 0.0)
        if step == 2:
            clock.now += 100
            reporter.images(step, {})
    reporter.close()
    assert [row["images_per_second"] for row in rows(tmp_path)] == [None, 2.0, None, 2.0]


@pytest.mark.parametrize(
    ("step", "every", "num_steps", "said"),
    [
        # 0.5 s a step: 1990 steps are 995 s, 490 are 245 s.
        (10, 500, 2000, "the other 1990 steps will take about 17 min; the next images come after step 500, in 5 min"),
        (
            500,
            500,
            2000,
            "the other 1500 steps will take about 13 min; the next images come after step 500, in 0 min",
        ),
        (501, 500, 600, "the other 99 steps will take about 1 min; the next images come after step 600, in 1 min"),
        (10, 0, 130, "the other 120 steps will take about 1 min; the next images come after step 130, in 1 min"),
        (
            10,
            0,
            80_000,
            "the other 79990 steps will take about 11.1 hours; the next images come after step 80000, in 11.1 hours",
        ),
    ],
)
def test_a_forecast_by_hand(step, every, num_steps, said):
    config = dataclasses.replace(CONFIG, num_steps=num_steps, images_every=every)
    speed = Speed(0.5, 0.0, 8.0, 1e12, None)
    assert forecast(config, step, speed, draws=True) == said
    assert forecast(config, step, speed, draws=False) == said.partition(";")[0]


@pytest.mark.parametrize(
    ("sizes", "dtype", "said"),
    [
        ({"data": 1}, "bfloat16", "1 CPU device, bfloat16 compute, 2000 steps of 16 images"),
        (
            {"data": 2, "expert": 4},
            "float32",
            "8 CPU devices (data 2 x expert 4), float32 compute, 2000 steps of 16 images",
        ),
    ],
)
def test_the_first_line_says_on_what_and_how_long(sizes, dtype, said):
    experiment = tiny(model__dtype=dtype, **{f"mesh__{axis}": size for axis, size in sizes.items()})
    mesh = make_mesh(experiment.mesh, jax.devices()[: math.prod(sizes.values())])
    assert first_line(experiment.train, experiment.model.dtype, mesh) == f"{said}; the step is compiled first"


@pytest.mark.parametrize(
    ("rate", "text"),
    [(9.87e8, "1.0 GFLOP/s"), (9.87e11, "987.0 GFLOP/s"), (1e12, "1.0 TFLOP/s"), (2.5e16, "25.0 PFLOP/s")],
)
def test_rates_have_the_unit_that_fits(rate, text):
    assert flops_text(rate) == text


def test_layers_are_numbered_from_one_and_what_is_unknown_is_left_out():
    values = {"loss": 0.5, "coverage_0": [0.1, 0.2], "router_grad_norm": [], "images_per_second": None, "bad_leaf": -1}
    assert named_scalars(values) == {"loss": 0.5, "coverage_0/layer_1": 0.1, "coverage_0/layer_2": 0.2, "bad_leaf": -1}


class Broken:
    """A writer whose disk is full."""

    closed = False

    def scalars(self, step, values):
        raise UserError("full")

    def close(self):
        self.closed = True


def test_a_writer_that_fails_stops_the_run_and_is_closed(tmp_path):
    writer = Broken()
    reporter = make_reporter(tmp_path, writers=[writer])
    reporter.report(1, METRICS, 0.0)
    with pytest.raises(UserError, match="full"):
        reporter.report(5, METRICS, 0.0)
    reporter.close()
    assert writer.closed


GARBLED = (
    b'{"step": 1, "x": 1}\n\xff\xfe\n{"step": 3, "x": 1}\n{"step": 3, "x": 2}\n{"step": 2, "x": "\xff"}\n{"step": 6}\n'
)


def test_garbled_and_doubled_lines_are_repaired_and_gaps_are_told(tmp_path, capsys):
    """A byte that is no UTF-8 once stopped every restart."""
    (tmp_path / "metrics.jsonl").write_bytes(GARBLED)
    assert read_lines(tmp_path) == [{"step": 1, "x": 1}, {"step": 3, "x": 2}, {"step": 6}]
    make_reporter(tmp_path, 7).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1, "x": 1}\n{"step": 3, "x": 2}\n{"step": 6}\n'
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith(f"{tmp_path}/metrics.jsonl lacks the lines of steps 2, 4-5, 7: ")


def test_gaps_between_the_parts_of_a_bucket_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "is_remote", lambda path: True)
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics/00000001.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    (tmp_path / "metrics/00000005.jsonl").write_text('{"step": 5}\n')
    said = []
    open_lines(tmp_path, 5, said.append)
    assert [line.partition(":")[0] for line in said] == [f"{tmp_path}/metrics lacks the lines of steps 3-4"]


def test_a_file_without_a_fault_is_left_as_it_is(tmp_path):
    """Else a long run would write gigabytes at each start."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(BEFORE)
    before = path.stat().st_ino
    assert drop_lines_after(path, 3) == [1, 2, 3]
    assert path.stat().st_ino == before
