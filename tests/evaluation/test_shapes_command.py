"""Tests the captions and the counts of `evaluate shapes`."""

import json
import types

import numpy as np
import pytest

from ecdit.commands import shapes
from ecdit.data.shape_scenes import KINDS, KINDS_HELD_OUT, ShapesConfig
from ecdit.data.shapes import example
from ecdit.errors import UserError
from ecdit.evaluation.run_scores import scores, wanted
from ecdit.evaluation.shapes_judge import judge
from ecdit.experiment import make_experiment
from tests.evaluation.test_scorer_commands import run
from tests.runs import config_file


def true_images(split, kinds, count):
    """The images of the captions that are asked for."""
    configs = [ShapesConfig(32, "plain", split, (kind,)) for kind in kinds]
    return [example(config, 0x5EED, row).image for config in configs for row in range(count)]


@pytest.mark.parametrize(("split", "kinds"), [("train", KINDS), ("held_out", KINDS_HELD_OUT)])
def test_every_kind_has_as_many_captions_and_the_true_images_score_one(split, kinds):
    """The captions are of rows whose images are known: with these in place of samples nearly all are correct."""
    asked = wanted(32, "plain", split, 20)
    assert [kind for kind, _ in asked] == [kind for kind in kinds for _ in range(20)]
    assert len({caption for _, (caption, _) in asked}) > 15 * len(kinds)
    pairs = zip(true_images(split, kinds, 20), asked, strict=True)
    verdicts = [judge(image, metadata).correct for image, (_, (_, metadata)) in pairs]
    assert scores([kind for kind, _ in asked], verdicts)["overall"] >= 0.99
    blank = np.full((32, 32, 3), 128, np.uint8)
    assert not any(judge(blank, metadata).correct for _, (_, metadata) in asked)


def test_overall_is_the_mean_over_kinds_by_hand():
    found = scores(["position", "position", "position", "colors"], [True, False, False, True])
    assert found["kinds"] == {"position": pytest.approx(1 / 3), "colors": 1.0}
    assert found["overall"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(("split", "kinds"), [("train", KINDS), ("held_out", KINDS_HELD_OUT)])
def test_the_command_judges_what_the_run_draws(monkeypatch, tmp_path, split, kinds):
    """In place of a run that draws: the true images, of which the command has to ask for the split's captions."""
    opened = types.SimpleNamespace(experiment=make_experiment(config_file("shapes").get_config()), step=3)
    drawn = np.stack(true_images(split, kinds, 6))
    monkeypatch.setattr(shapes, "open_run", lambda workdir, changes, step: opened)
    monkeypatch.setattr(shapes, "each_image_alone", lambda run: run)
    monkeypatch.setattr(shapes, "sample_run", lambda run, texts, repeats, sampling: drawn)
    run("shapes", "--workdir=W", "--captions=6", f"--split={split}", "--seed=2", f"--json={tmp_path}/found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["kinds"]) == list(kinds)
    assert found["overall"] >= 0.95
    assert (found["step"], found["split"], found["protocol"]["seed"]) == (3, split, 2)


@pytest.mark.parametrize(
    ("name", "change", "allowed"),
    [
        ("shapes", "sampling.seed=3", "the seed must be given by --seed"),
        ("retrieval", "sampling.seed=3", "the seed must be given by --seed"),
        ("shapes", "data.directory=D", "must be a key of sampling, or one of text.weights, "),
        (
            "retrieval",
            "model.width=3",
            "must be a key of sampling, or one of text.weights, .*, data.directory: other values",
        ),
        ("loss", "sampling.num_steps=3", "must be one of text.weights, .*, data.directory: other values"),
    ],
)
def test_a_change_that_no_evaluation_takes_ends_it_before_it_opens_the_run(tmp_path, name, change, allowed):
    with pytest.raises(UserError, match=f"--set={change}: {allowed}"):
        run(name, f"--workdir={tmp_path}/none", f"--set={change}")
