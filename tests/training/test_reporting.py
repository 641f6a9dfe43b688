"""metrics.jsonl: whole lines, one a step, whatever happened before."""

import dataclasses
import json

import pytest

from ecdit.training import reporting
from ecdit.training.experiment import TrainConfig
from ecdit.training.reporting import Reporter, drop_lines_after

CONFIG = TrainConfig(num_steps=12, batch_size=4, accumulation=1, ema_decay=0.9, max_bad_steps=3, log_every=5)
METRICS = {"loss": 0.5, "grad_norm": 1.0, "bad_in_row": 0, "bad_leaf": -1}
BEFORE = '{"step": 1, "x": 1}\n{"step": 2, "x": 1}\n{"step": 3, "x": 1}\n'


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


def test_lines_are_there_before_the_file_is_closed(tmp_path, capsys):
    reporter = Reporter(tmp_path, 0, CONFIG, ["w"])
    for step in range(1, 13):
        reporter.report(step, METRICS)
        rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, step + 1))
        assert all(type(row["step"]) is int for row in rows)
    reporter.close()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed] == ["5/12", "10/12", "12/12"]


def test_a_line_that_is_no_json_does_not_stop_the_run(tmp_path):
    """A disk that was full, or another program: the message or the repair may differ, a traceback may not be."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n\x00\x00\n{"step": 2}\n')
    Reporter(tmp_path, 2, CONFIG, ["w"]).close()
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]


def test_the_time_left_of_a_run_of_days_is_not_cut_to_hours(tmp_path, capsys, monkeypatch):
    """Ten hours a step: after the second of 12, ten steps or 100 hours are left."""
    clock = iter([36_000.0 * step for step in range(1, 20)])
    monkeypatch.setattr(reporting.time, "monotonic", lambda: next(clock))
    reporter = Reporter(tmp_path, 0, dataclasses.replace(CONFIG, log_every=1), ["w"])
    for step in (1, 2):
        reporter.report(step, METRICS)
    reporter.close()
    line = capsys.readouterr().out.splitlines()[-1]
    assert "100:00:00 left" in line or "4 days, 4:00:00 left" in line, line
