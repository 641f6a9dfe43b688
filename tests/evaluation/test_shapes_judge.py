"""The judge of the `shapes` data: right on images of two rasterisers, and GenEval's rules by hand.

The whole measurement is tests/benchmarks/shapes_judge.py; a slow test here holds it to its bounds.
"""

import collections
import dataclasses

import numpy as np
import pytest

from ecdit.data.shape_captions import metadata_of
from ecdit.data.shape_rendering import render
from ecdit.data.shape_scenes import (
    COLORS,
    KINDS,
    KINDS_HELD_OUT,
    SHAPES,
    Box,
    Ground,
    Object,
    Scene,
    ShapesConfig,
    scene_of,
)
from ecdit.evaluation import shapes_judge
from ecdit.evaluation.shapes_judge import Found, Verdict, find_objects, judge, verdict
from tests.benchmarks.shapes_judge import CHANGES, RASTERISERS, Rates, draw_with_pillow, false_metadata, measure, table

TEXTURED = ShapesConfig(32, "textured", "train", KINDS)
PLAIN = Ground((120, 125, 130), "plain", 0, 0.2, (1, 0), 0.0, (0.0,) * 25)
TOP, LEFT, RIGHT = Box(0.25, 0.2, 0.15), Box(0.25, 0.75, 0.15), Box(0.75, 0.75, 0.15)


def found(shape, color, box=LEFT, fit=1.0):
    return Found(shape, color, box, fit)


def wants(*include, exclude=()):
    return {"tag": "", "prompt": "", "include": list(include), "exclude": list(exclude)}


def item(shape, count=1, **more):
    return {"class": shape, "count": count, **more}


# rules

STAR_BY_RING = (item("ring"), item("star", position=["left of", 0]))


@pytest.mark.parametrize(
    ("objects", "metadata", "reason"),
    [
        ([found("star", "red")], wants(item("star")), ""),
        ([], wants(item("star")), "expected star>=1, found 0"),
        ([found("star", "red")], wants(item("star"), item("ring")), "expected ring>=1, found 0"),
        ([found("star", "red")] * 3, wants(item("star", 2), exclude=[item("star", 3)]), "expected star<3, found 3"),
        ([found("star", "red")] * 3, wants(item("star", 2)), ""),
        ([found("star", "red")], wants(item("star", color="red")), ""),
        ([found("star", "red")], wants(item("star", color="blue")), "expected blue star>=1, found red"),
        (
            [found("star", "red"), found("star", "blue", fit=0.8)],
            wants(item("star", 2, color="blue")),
            "expected blue star>=2, found blue, red",
        ),
        # The surest star is red, and there is a blue one.
        ([found("star", "red"), found("star", "blue", fit=0.8)], wants(item("star", color="blue")), ""),
        ([found("star", "red", LEFT), found("ring", "red", RIGHT)], wants(*STAR_BY_RING), ""),
        (
            [found("star", "red", RIGHT), found("ring", "red", LEFT)],
            wants(*STAR_BY_RING),
            "expected star left of target, found right of target",
        ),
        (
            [found("star", "red", TOP), found("ring", "red", RIGHT)],
            wants(item("ring"), item("star", position=["below", 0])),
            "expected star below target, found left of and above target",
        ),
        (
            [found("star", "red", LEFT), found("ring", "red", LEFT)],
            wants(*STAR_BY_RING),
            "expected star left of target, found neither target",
        ),
        (
            [found("star", "red", LEFT)],
            wants(*STAR_BY_RING),
            "expected ring>=1, found 0\nno target for star to be left of",
        ),
        (
            [found("star", "red", LEFT), found("ring", "red", RIGHT)],
            wants(item("ring", color="blue"), item("star", position=["left of", 0])),
            "expected blue ring>=1, found red\nno target for star to be left of",
        ),
        # The target is the surest ring, which is on the right.
        (
            [found("star", "red", LEFT), found("ring", "red", TOP, 0.8), found("ring", "red", RIGHT, 0.9)],
            wants(*STAR_BY_RING),
            "",
        ),
    ],
)
def test_rules(objects, metadata, reason):
    assert verdict(objects, metadata) == Verdict(not reason, reason)


# what is seen


def scene_with(*objects):
    placed = tuple(Object(shape, color, COLORS[color], box) for shape, color, box in objects)
    return Scene("two_object", placed, PLAIN, True, None)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("draw", [render, draw_with_pillow], ids=["own", "pillow"])
def test_shape_color_and_box_are_read_back(shape, size, draw):
    boxes = [Box(0.22, 0.23, 0.14), Box(0.69, 0.67, 0.27)]
    for one, other in (("red", "orange"), ("yellow", "green"), ("blue", "purple"), ("white", "black")):
        objects = find_objects(draw(scene_with((shape, one, boxes[0]), (shape, other, boxes[1])), size))
        assert [(each.shape, each.color) for each in objects] == [(shape, other), (shape, one)]
        for seen, box in zip(objects, boxes[::-1], strict=True):
            assert np.abs(np.subtract(dataclasses.astuple(seen.box), dataclasses.astuple(box))).max() < 0.3 / size
            assert seen.fit > 0.9


def test_nothing_is_seen_where_nothing_is():
    random = np.random.default_rng(0)
    empty = np.full((32, 32, 3), 128, np.uint8)
    images = [empty, random.integers(0, 256, (32, 32, 3)).astype(np.uint8)]
    images += [render(dataclasses.replace(scene_of(TEXTURED, 0, row), objects=()), 32) for row in range(40)]
    for image in images:
        assert find_objects(image) == []
    assert judge(empty, wants(item("star"))) == Verdict(False, "expected star>=1, found 0")


def test_any_image_can_be_judged():
    """A model may draw anything: ground of a shape's colour, no ground at all, blots."""
    random = np.random.default_rng(1)
    grounds = [np.full((32, 32, 3), rgb, np.uint8) for rgb in COLORS.values()]
    blots = [np.repeat(np.repeat(random.integers(0, 256, (n, n, 3)), 32 // n, 0), 32 // n, 1) for n in (2, 4, 8, 16)]
    for image in [*grounds, *blots]:
        judge(image.astype(np.uint8), wants(item("star")))
    for ground in grounds:
        assert find_objects(ground) == []


@pytest.mark.parametrize("texture", ["stripes", "checks"])
@pytest.mark.parametrize("shape", SHAPES)
def test_textures_are_no_part_of_a_shape(shape, texture):
    """The strongest texture moves the ground by an eighth of what is between it and black or white."""
    scene = scene_with((shape, "black", Box(0.3, 0.3, 0.15)), (shape, "white", Box(0.7, 0.7, 0.15)))
    for phase in (0.1, 0.3, 0.5, 0.7, 0.9):
        ground = dataclasses.replace(PLAIN, texture=texture, contrast=12, period=0.3, phase=phase)
        objects = find_objects(render(dataclasses.replace(scene, ground=ground), 32))
        assert {(each.shape, each.color) for each in objects} == {(shape, "black"), (shape, "white")}
        assert min(each.fit for each in objects) > 0.88


def test_a_speck_is_no_shape():
    image = render(scene_with(("star", "red", RIGHT)), 32)
    image[4:6, 4:7] = (215, 40, 40)
    assert [each.shape for each in find_objects(image)] == ["star"]


def test_two_shapes_grown_together_are_neither():
    """A model that draws this has not drawn two squares."""
    image = render(scene_with(("square", "red", Box(0.25, 0.25, 0.16)), ("square", "red", Box(0.56, 0.56, 0.16))), 32)
    assert [each for each in find_objects(image) if each.shape == "square"] == []


def test_a_bar_is_no_shape():
    image = render(scene_with(), 32)
    image[14:18, 3:29] = COLORS["red"]
    assert find_objects(image) == []


def test_regions_are_connected_over_corners():
    mask = np.array(
        [
            [1, 0, 0, 0, 1],
            [0, 1, 0, 0, 1],
            [0, 0, 0, 0, 1],
            [1, 1, 0, 0, 0],
        ],
        bool,
    )
    expected = np.full((4, 5), 20)
    expected[0, 0] = expected[1, 1] = 0
    expected[:3, 4] = 4
    expected[3, :2] = 15
    assert np.array_equal(shapes_judge._components(mask), expected)


def test_a_winding_line_is_one_region():
    """Back and forth over all rows: a label must travel its whole length."""
    line = np.zeros((31, 31), bool)
    line[::2] = True
    line[1::4, -1] = line[3::4, 0] = True
    labels = shapes_judge._components(line)
    assert (labels[line] == 0).all()
    assert (labels[~line] == line.size).all()


# images and captions


@pytest.mark.parametrize("drawn", RASTERISERS)
@pytest.mark.parametrize("size", [32, 64])
def test_true_captions_are_accepted_and_false_ones_rejected(drawn, size):
    rates = measure(drawn, "none", size, count=25, seed=5)
    assert rates.true == rates.accepted == 25
    assert rates.false == rates.rejected > 25 * 6


@pytest.mark.parametrize("changed", ["blur 0.5 px", "noise 10", "shift 1 px", "blur 0.5 px, noise 10, shift 1 px"])
def test_small_changes_of_an_image_are_borne(changed):
    rates = measure("own", changed, 32, count=15, seed=6)
    assert rates.accepted == rates.true
    assert rates.rejected == rates.false


def test_held_out_combinations_are_judged_as_others_are():
    config = ShapesConfig(32, "textured", "held_out", KINDS_HELD_OUT)
    for row in range(25):
        scene = scene_of(config, 0, row)
        objects = find_objects(render(scene, 32))
        assert verdict(objects, metadata_of(scene, "")) == Verdict(True, "")
        assert not any(verdict(objects, metadata).correct for _, metadata in false_metadata(scene))


# the measurement itself


def seen(scene):
    """What a judge without error would find."""
    return [found(placed.shape, placed.color, placed.box) for placed in scene.objects]


def test_false_captions_differ_in_one_attribute_and_are_false():
    for row in range(100):
        scene = scene_of(TEXTURED, 0, row)
        assert verdict(seen(scene), metadata_of(scene, "")).correct
        others = list(false_metadata(scene))
        assert not any(verdict(seen(scene), metadata).correct for _, metadata in others)
        # By hand, of 7 shapes, 8 colours, 4 relations and 3 counts.
        pair = scene.kind in ("two_object", "position", "color_attr")
        expected = {"shape": 2 * 5 if pair else 6}
        if scene.states_colors:
            expected["color"] = 7 * (2 if pair else 1) + (scene.kind == "color_attr")
        if scene.kind == "position":
            expected["position"] = 3
        if scene.kind == "counting":
            expected["count"] = 2
        assert collections.Counter(attribute for attribute, _ in others) == expected


def test_pillows_drawings_are_not_the_datas_own():
    """Else they would measure nothing: edges differ, insides do not."""
    scene = scene_of(ShapesConfig(32, "plain", "train", KINDS), 0, 1)
    own, other = render(scene, 32).astype(int), draw_with_pillow(scene, 32).astype(int)
    assert (own != other).any()
    assert np.abs(own - other).mean() < 3


def test_shifts_and_noise_are_what_they_say():
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    moved = CHANGES["shift 1 px"](image, None)
    assert np.array_equal(moved[1:, :-1], image[:-1, 1:])
    assert np.array_equal(moved[0, :-1], image[0, 1:])
    noisy = CHANGES["noise 10"](np.full((64, 64, 3), 128, np.uint8), np.random.default_rng(0))
    assert noisy.std() == pytest.approx(10, rel=0.05)
    assert noisy.mean() == pytest.approx(128, abs=0.5)


def test_the_table_has_percents():
    row = {"px": 32, "drawn": "own", "changed": "none", "true": 200, "accepted": 199, "false": 800, "rejected": 800}
    assert table([row]).splitlines()[-1] == "| 32 | own | none | 99.50 | 100.00 |"
    assert Rates(1, 2, 3, 4) + Rates(10, 20, 30, 40) == Rates(11, 22, 33, 44)


@pytest.mark.slow
@pytest.mark.parametrize("drawn", RASTERISERS)
@pytest.mark.parametrize("size", [32, 64])
def test_the_judge_is_right_in_99_5_percent(drawn, size):
    rates = measure(drawn, "none", size, count=400)  # docs/shapes.md has 2000 of each
    assert rates.accepted / rates.true >= 0.995
    assert rates.rejected / rates.false >= 0.995
