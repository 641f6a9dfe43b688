"""Tests the captions and the counts of `evaluate shapes`."""

import numpy as np
import pytest

from ecdit.data.shape_scenes import KINDS, KINDS_HELD_OUT, ShapesConfig
from ecdit.data.shapes import example
from ecdit.evaluation.run_scores import scores, wanted
from ecdit.evaluation.shapes_judge import judge


@pytest.mark.parametrize(("split", "kinds"), [("train", KINDS), ("held_out", KINDS_HELD_OUT)])
def test_every_kind_has_as_many_captions_and_the_true_images_score_one(split, kinds):
    """The captions are of rows whose images are known: with these in place of samples nearly all are correct."""
    asked = wanted(32, "plain", split, 20)
    assert [kind for kind, _ in asked] == [kind for kind in kinds for _ in range(20)]
    assert len({caption for _, (caption, _) in asked}) > 15 * len(kinds)
    images = [
        example(ShapesConfig(32, "plain", split, (kind,)), 0x5EED, row).image for kind in kinds for row in range(20)
    ]
    verdicts = [judge(image, metadata).correct for image, (_, (_, metadata)) in zip(images, asked, strict=True)]
    assert scores([kind for kind, _ in asked], verdicts)["overall"] >= 0.99
    blank = np.full((32, 32, 3), 128, np.uint8)
    assert not any(judge(blank, metadata).correct for _, (_, metadata) in asked)


def test_overall_is_the_mean_over_kinds_by_hand():
    found = scores(["position", "position", "position", "colors"], [True, False, False, True])
    assert found["kinds"] == {"position": pytest.approx(1 / 3), "colors": 1.0}
    assert found["overall"] == pytest.approx(2 / 3)
