"""Tests TensorBoard's files, the profile's window, and refusals before a run starts."""

import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from ecdit.config import ConfigError, to_dict
from ecdit.errors import UserError
from ecdit.files import replace_text
from ecdit.reporting import profiling, writers
from ecdit.reporting.profiling import Profile
from ecdit.reporting.writers import TensorBoard, check_writers
from ecdit.runs.provenance import record_start
from tests.events import events, images, scalars
from tests.runs import tiny


def test_a_resumed_run_hides_the_steps_that_it_does_again(tmp_path):
    for start, steps in ((0, range(1, 8)), (4, range(5, 10))):
        board = TensorBoard(tmp_path, start)
        for step in steps:
            board.scalars(step, {"loss": 100 * start + step})
        board.close()
    shown = [(step, float(step)) for step in range(1, 5)] + [(step, 400.0 + step) for step in range(5, 10)]
    assert scalars(tmp_path)["loss"] == shown
    assert [event.file_version for event in events(tmp_path)].count("brain.Event:2") == 2


def test_what_was_written_is_there_before_the_file_is_closed(tmp_path):
    board = TensorBoard(tmp_path, 0)
    Image.new("RGB", (5, 3), "red").save(tmp_path / "a.png")
    board.scalars(2, {"loss": math.nan, "coverage_0/layer_1": 0.5})
    board.image(2, "samples", tmp_path / "a.png")
    assert images(tmp_path) == [(2, "samples")]
    assert scalars(tmp_path)["coverage_0/layer_1"] == [(2, 0.5)]
    assert math.isnan(scalars(tmp_path)["loss"][0][1])
    board.close()


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.raises(UserError, match=rf"writing {tmp_path}/tensorboard failed"):
        TensorBoard(tmp_path, 0)


def test_the_id_of_a_run_of_wandb_is_whole_or_drawn_anew(tmp_path, monkeypatch):
    """A process is killed while it writes the id; an older version left an empty file then."""
    ids = []
    fake = {"Image": None, "Error": ValueError, "Settings": dict, "init": lambda **known: ids.append(known["id"])}
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(**fake))

    def killed(path, text):
        path.touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            writers.WeightsAndBiases("project", {}, tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "wandb_id").touch()
    for _ in range(2):
        writers.WeightsAndBiases("project", {}, tmp_path)
    assert re.fullmatch("[0-9a-f]{8}", ids[0])
    assert ids == [ids[0]] * 2


def test_a_missing_wandb_is_named(monkeypatch):
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None)
    check_writers("")
    with pytest.raises(ConfigError, match=r"config\.train\.wandb_project = 'emoji': .*pip install -e '\.\[wandb\]'"):
        check_writers("emoji")


@pytest.mark.parametrize(
    ("start", "first", "count", "traced"),
    [
        (0, 3, 2, [3, 4]),
        (0, 1, 3, [2, 3]),  # a start's first step compiles
        (2, 1, 4, [4]),  # resumed from step 2
        (0, 8, 5, [8, 9]),  # the run ends before the window does
        (5, 2, 2, []),
        (0, 3, 0, []),
    ],
)
def test_the_steps_of_the_window_are_traced(tmp_path, monkeypatch, start, first, count, traced):
    """A run of nine steps; each is what happens after `before`."""
    on, steps = [], []
    monkeypatch.setattr(profiling.jax.profiler, "start_trace", on.append)
    monkeypatch.setattr(profiling.jax.profiler, "stop_trace", on.pop)  # which refuses where nothing was started
    config = dataclasses.replace(tiny().train, profile_start=first, profile_steps=count)
    profile = Profile(config, tmp_path, start)
    for step in range(start + 1, 10):
        profile.before(step, ())
        assert on in ([], [tmp_path / "profile"])
        steps += [step] * len(on)
    profile.close()
    profile.close()
    assert (steps, on) == (traced, [])


@pytest.mark.parametrize(
    ("key", "value", "others"),
    [
        ("images_every", -1, {}),
        ("profile_steps", -1, {}),
        ("profile_start", -1, {}),
        ("profile_start", 0, {"train__profile_steps": 1}),
    ],
)
def test_impossible_values_are_refused_by_name(key, value, others):
    with pytest.raises(ConfigError, match=rf"config\.train\.{key} = {value}"):
        tiny(**{f"train__{key}": value}, **others)


def test_a_list_of_starts_that_cannot_be_written_leaves_the_old_one(tmp_path):
    """A full disk, or a kill in the middle of writing: the next start must be able to read it."""
    record_start(to_dict(tiny()), tmp_path, 0, {"config": "a.py"})
    before = (tmp_path / "overrides.json").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_text", lambda self, text: self.write_bytes(text[:9].encode()) and fail())
        with pytest.raises(UserError, match=r"writing .*config\.json failed: full"):
            record_start(to_dict(tiny()), tmp_path, 5, {"config": "b.py"})
        with pytest.raises(UserError, match=r"writing .*overrides\.json failed: full"):
            replace_text(tmp_path / "overrides.json", "new")
    assert (tmp_path / "overrides.json").read_text() == before
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(json.dumps(to_dict(tiny())))


def fail():
    raise OSError("full")


def test_a_damaged_list_of_starts_is_named(tmp_path):
    for text in ("[{", '{"step": 0}'):
        (tmp_path / "overrides.json").write_text(text)
        with pytest.raises(UserError, match=r"overrides\.json is damaged"):
            record_start(to_dict(tiny()), tmp_path, 0, {})
    (tmp_path / "overrides.json").unlink()
    record_start(to_dict(tiny()), tmp_path, 3, {"config": "a.py:b"})
    (only,) = json.loads((tmp_path / "overrides.json").read_text())
    assert (only["step"], only["config"]) == (3, "a.py:b")
