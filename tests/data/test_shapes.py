"""Tests the `shapes` data: rows are a function of (seed, row), held-out combinations never occur, captions are true."""

import collections
import dataclasses
import itertools
import json
import re

import numpy as np
import pytest

from ecdit.config import ConfigError, build
from ecdit.data import shape_captions, shape_rendering, shapes
from ecdit.data.shape_captions import NUMBERS, OPENINGS, PLURALS, VOCABULARY, WORDINGS, metadata_of
from ecdit.data.shape_rendering import coverage, render
from ecdit.data.shape_scenes import (
    COLORS,
    HELD_OUT_COLORS,
    HELD_OUT_RELATIONS,
    KINDS,
    KINDS_HELD_OUT,
    MARGIN,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    SMALLEST,
    TEXTURES,
    Box,
    Draws,
    Ground,
    Object,
    Scene,
    ShapesConfig,
    is_held_out,
    relations,
    scene_of,
)
from ecdit.data.shapes import example, fingerprint

TRAIN = ShapesConfig(image_size=32, ground="textured", split="train", kinds=KINDS)
HELD_OUT = ShapesConfig(image_size=32, ground="textured", split="held_out", kinds=KINDS_HELD_OUT)
ROWS = 1000
PLAIN = Ground((100, 110, 120), "plain", 12, 0.2, (1, 0), 0.0, (1.0,) * 25)


@pytest.fixture(scope="module", params=[TRAIN, HELD_OUT], ids=["train", "held_out"])
def scenes(request):
    return [scene_of(request.param, 7, row) for row in range(ROWS)]


def scenes_of(config, count=ROWS):
    return [scene_of(config, 7, row) for row in range(count)]


def same(a, b):
    return np.array_equal(a.image, b.image) and a.caption == b.caption and a.metadata == b.metadata


def test_a_row_is_a_function_of_seed_and_row():
    forwards = [example(TRAIN, 3, row) for row in range(20)]
    backwards = [example(TRAIN, 3, row) for row in reversed(range(20))][::-1]
    assert all(same(a, b) for a, b in zip(forwards, backwards, strict=True))
    assert not any(same(a, b) for a, b in itertools.combinations(forwards, 2))
    assert not any(same(example(TRAIN, 4, row), made) for row, made in enumerate(forwards))


def test_rows_have_no_end():
    rows = (0, 2**53, 2**53 + 1, 2**63, 2**64 - 2, 2**64 - 1)
    made = [example(TRAIN, 2**32 - 1, row) for row in rows]
    assert not any(same(a, b) for a, b in itertools.combinations(made, 2))


def test_neither_the_size_nor_the_ground_moves_a_scene():
    """An experiment compares images of two sizes, or with and without texture, of the same scenes."""
    large, plain = dataclasses.replace(TRAIN, image_size=64), dataclasses.replace(TRAIN, ground="plain")
    for row in range(50):
        scene = scene_of(TRAIN, 0, row)
        assert scene_of(large, 0, row) == scene
        assert scene_of(plain, 0, row).objects == scene.objects
        assert example(plain, 0, row).caption == example(TRAIN, 0, row).caption


def test_all_kinds_are_equally_frequent(scenes):
    kinds = collections.Counter(scene.kind for scene in scenes)
    share = 1 / len(kinds)
    assert set(kinds) in (set(KINDS), set(KINDS_HELD_OUT))
    # Five standard deviations of a binomial.
    assert all(abs(count / ROWS - share) < 5 * (share * (1 - share) / ROWS) ** 0.5 for count in kinds.values())


def test_a_kind_has_its_number_of_shapes(scenes):
    counts = collections.defaultdict(set)
    for scene in scenes:
        counts[scene.kind].add(len(scene.objects))
    expected = {"single_object": {1}, "colors": {1}, "two_object": {2}, "position": {2}, "color_attr": {2}}
    assert counts == {kind: expected.get(kind, {2, 3, 4}) for kind in counts}


def test_boxes_are_inside_apart_and_large_enough(scenes):
    for scene in scenes:
        for placed in scene.objects:
            box = placed.box
            assert box.half >= SMALLEST
            for center in (box.x, box.y):
                assert center - box.half > MARGIN - 1e-9
                assert center + box.half < 1 - MARGIN + 1e-9
        for a, b in itertools.combinations([placed.box for placed in scene.objects], 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) > a.half + b.half + 2 * MARGIN - 1e-9


def test_a_pairs_first_shape_is_on_either_side():
    """Else "a circle and a star" would say where they are."""
    boxes = [[placed.box for placed in scene.objects] for scene in scenes_of(TRAIN) if scene.kind == "two_object"]
    assert 0.35 < np.mean([a.x < b.x for a, b in boxes]) < 0.65
    assert 0.35 < np.mean([a.y < b.y for a, b in boxes]) < 0.65


# relations


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        ((-0.4, 0.0), ("left of",)),
        ((0.4, 0.0), ("right of",)),
        ((0.0, -0.4), ("above",)),
        ((0.0, 0.4), ("below",)),
        ((-0.4, -0.4), ("left of", "above")),
        # The sides are 0.2, so 0.04 is taken from each direction: 0.26 / 0.5 holds and 0.24 / 0.5 does not.
        ((0.3, 0.4), ("right of", "below")),
        ((0.28, 0.4142463), ("below",)),
        ((0.04, 0.04), ()),
    ],
)
def test_relations_are_genevals(offset, expected):
    assert relations(Box(0.5 + offset[0], 0.5 + offset[1], 0.1), Box(0.5, 0.5, 0.1)) == expected


def test_relations_take_the_sides_of_both_boxes():
    """A tenth of 0.2 + 0.6 is 0.08: (0.1 - 0.08) / 0.1 is less than half."""
    assert relations(Box(0.6, 0.5, 0.1), Box(0.5, 0.5, 0.1)) == ("right of",)
    assert relations(Box(0.6, 0.5, 0.1), Box(0.5, 0.5, 0.3)) == ()


def test_the_stated_relation_holds_clearly_and_no_other(scenes):
    for scene in scenes:
        if scene.kind == "position":
            a, b = (placed.box for placed in scene.objects)
            assert relations(a, b) == (scene.relation,)
            # Measuring both boxes wrong by a pixel of 32 does not change it.
            for dx, dy in itertools.product((-1 / 32, 1 / 32), repeat=2):
                assert relations(dataclasses.replace(a, x=a.x + dx, y=a.y + dy), b) == (scene.relation,)


# held-out combinations


def states(scene):
    """The held-out combinations in a scene's caption: (shape, colour) and (shape, relation, shape)."""
    pairs = {(placed.shape, placed.color) for placed in scene.objects if scene.states_colors}
    stated = pairs & set(HELD_OUT_COLORS.items())
    if scene.relation:
        a, b = (placed.shape for placed in scene.objects)
        stated |= {(a, scene.relation, b), (b, OPPOSITE[scene.relation], a)} & set(HELD_OUT_RELATIONS)
    return stated


def test_training_rows_show_no_held_out_combination():
    for scene in scenes_of(TRAIN, 3000):
        assert not {(placed.shape, placed.color) for placed in scene.objects} & set(HELD_OUT_COLORS.items())
        for a, b in itertools.permutations(scene.objects, 2):
            assert not {(a.shape, name, b.shape) for name in relations(a.box, b.box)} & set(HELD_OUT_RELATIONS)


def test_training_rows_show_every_other_combination():
    found, related = set(), set()
    for scene in scenes_of(TRAIN, 3000):
        found |= {(placed.shape, placed.color) for placed in scene.objects}
        for a, b in itertools.permutations(scene.objects, 2):
            related |= {(a.shape, name, b.shape) for name in relations(a.box, b.box) if a.shape != b.shape}
    assert found == set(itertools.product(SHAPES, COLORS)) - set(HELD_OUT_COLORS.items())
    converses = {(b, OPPOSITE[name], a) for a, name, b in HELD_OUT_RELATIONS}
    everything = {(a, name, b) for a, b in itertools.permutations(SHAPES, 2) for name in RELATIONS}
    assert related == everything - set(HELD_OUT_RELATIONS) - converses


def test_held_out_rows_state_exactly_one():
    stated = [states(scene) for scene in scenes_of(HELD_OUT)]
    assert {len(each) for each in stated} == {1}
    assert set().union(*stated) == set(HELD_OUT_COLORS.items()) | set(HELD_OUT_RELATIONS)


def test_a_pair_of_shapes_has_at_most_one_held_out_relation():
    pairs = [frozenset((a, b)) for a, _, b in HELD_OUT_RELATIONS]
    assert len(set(pairs)) == len(pairs)
    assert set(HELD_OUT_COLORS) == set(SHAPES)


def test_a_relation_is_held_out_with_its_converse():
    assert is_held_out("circle", "left of", "square")
    assert is_held_out("square", "right of", "circle")
    assert not is_held_out("square", "left of", "circle")


# images


# By hand: of the box of 4; a pentagram of radius 1 has 1.12257 and is stretched by 1 / 0.951057 and 2 / 1.809017.
AREAS = {
    "circle": np.pi,
    "square": 4.0,
    "triangle": 2.0,
    "diamond": 2.0,
    "star": 1.12257 / 0.951057 * 2 / 1.809017,
    "cross": 4 * 0.51,
    "ring": 0.75 * np.pi,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_has_its_area_and_touches_its_box(shape):
    rows, columns, covered = coverage(shape, Box(0.5, 0.5, 0.25), 256)
    assert (rows, columns) == (slice(64, 192), slice(64, 192))
    assert covered.sum() / 64**2 == pytest.approx(AREAS[shape], rel=0.005)
    for side in (covered[:2], covered[-2:], covered[:, :2], covered[:, -2:]):
        assert side.max() > 0.2


def test_a_shape_is_the_right_way_up():
    for shape in ("triangle", "star"):
        covered = coverage(shape, Box(0.5, 0.5, 0.5), 64)[2]
        assert covered[:8].sum() < covered[-8:].sum(), shape
    for shape in SHAPES:
        covered = coverage(shape, Box(0.5, 0.5, 0.5), 64)[2]
        assert np.array_equal(covered, covered[:, ::-1]), shape


def test_edges_are_antialiased():
    """A square from 1.5 to 5.25 px of 32, and from 8 to 11.75 px."""
    scene = Scene("colors", (Object("square", "red", (200, 10, 20), box(1.5, 8, 3.75)),), PLAIN, True, None)
    image = render(scene, 32)
    ground, red = np.array(PLAIN.rgb), np.array((200, 10, 20))
    assert np.array_equal(image[9, 1:6], np.rint(ground + np.outer([0.5, 1, 1, 1, 0.25], red - ground)))
    assert np.array_equal(image[7:13, 3], np.rint(ground + np.outer([0, 1, 1, 1, 0.75, 0], red - ground)))
    inside = np.zeros((32, 32), bool)
    inside[8:12, 1:6] = True
    assert (image[~inside] == ground).all()


def box(left, top, side):
    """A box in px of 32."""
    return Box((left + side / 2) / 32, (top + side / 2) / 32, side / 64)


def test_an_image_shows_the_same_at_both_sizes():
    for scene in scenes_of(dataclasses.replace(TRAIN, ground="plain"), 20):
        halved = render(scene, 64).reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
        difference = np.abs(halved - render(scene, 32))
        assert difference.mean() < 1.5
        assert difference.max() < 30  # four sample points a side find edges to an eighth of a pixel


@pytest.mark.parametrize("texture", TEXTURES)
def test_textures_move_all_channels_by_up_to_the_contrast(texture):
    rows = [scene for scene in scenes_of(TRAIN, 200) if scene.ground.texture == texture]
    assert rows
    for scene in rows:
        moved = render(dataclasses.replace(scene, objects=()), 32).astype(int) - scene.ground.rgb
        assert 2 <= abs(moved).max() <= scene.ground.contrast
        assert (moved.max(axis=2) - moved.min(axis=2)).max() <= 1


def test_plain_ground_has_one_color():
    scene = scene_of(dataclasses.replace(TRAIN, ground="plain"), 0, 0)
    assert (render(dataclasses.replace(scene, objects=()), 32) == scene.ground.rgb).all()


def test_stripes_and_checks_have_their_period():
    """Of a quarter of 32 px: four pixels light, four dark."""
    half = [1] * 4 + [-1] * 4
    stripes = dataclasses.replace(PLAIN, texture="stripes", period=0.25)
    across = shape_rendering._pattern(stripes, (np.arange(32) + 0.5) / 32)
    assert np.array_equal(np.broadcast_to(across, (32, 32)), np.tile(half * 4, (32, 1)))
    checks = shape_rendering._pattern(dataclasses.replace(stripes, texture="checks"), (np.arange(32) + 0.5) / 32)
    assert np.array_equal(checks, np.outer(half * 4, half * 4))


def test_clouds_meet_their_lattice():
    lattice = tuple(np.linspace(-1, 1, 25))
    clouds = dataclasses.replace(PLAIN, texture="clouds", lattice=lattice)
    pattern = shape_rendering._pattern(clouds, np.array([0, 0.25, 0.375, 1]))
    values = np.array(lattice).reshape(5, 5)
    assert pattern[1, 0] == values[1, 0]
    assert pattern[0, 3] == values[0, 4]
    assert pattern[3, 2] == pytest.approx((values[4, 1] + values[4, 2]) / 2)


# captions

SINGULAR = "|".join(SHAPES)
PATTERN = re.compile(
    rf"(?:an? (?:picture|image|drawing) of )?"
    rf"(?:(?P<number>two|three|four)(?: (?P<colors>{'|'.join(COLORS)}))? (?P<plural>{'|'.join(PLURALS.values())})"
    rf"|an? (?:(?P<color0>{'|'.join(COLORS)}) )?(?P<shape0>{SINGULAR})"
    rf"(?: (?P<joint>and|with|(?:to the )?(?:left|right) of|above|over|below|under)"
    rf" an? (?:(?P<color1>{'|'.join(COLORS)}) )?(?P<shape1>{SINGULAR}))?)"
)
MEANINGS = {"over": "above", "under": "below", "to the left of": "left of", "to the right of": "right of"}


def parse(caption):
    """What a caption says, read apart from the code that wrote it: (include, exclude)."""
    match = PATTERN.fullmatch(caption)
    assert match, caption
    said = match.groupdict()
    colored = {"color": said["colors"]} if said["colors"] else {}
    if said["number"]:
        shape = next(shape for shape in SHAPES if PLURALS[shape] == said["plural"])
        count = {"two": 2, "three": 3, "four": 4}[said["number"]]
        return [{"class": shape, "count": count, **colored}], [{"class": shape, "count": count + 1}]
    items = [
        {"class": said[f"shape{i}"], "count": 1, **({"color": said[f"color{i}"]} if said[f"color{i}"] else {})}
        for i in (0, 1)
        if said[f"shape{i}"]
    ]
    relation = MEANINGS.get(said["joint"], said["joint"])
    if relation in RELATIONS:
        return [items[1], items[0] | {"position": [relation, 0]}], None
    return items, None


@pytest.mark.parametrize("config", [TRAIN, HELD_OUT], ids=["train", "held_out"])
def test_captions_say_what_the_metadata_says(config):
    for row in range(300):
        made = example(config, 1, row)
        include, exclude = parse(made.caption)
        assert include == made.metadata["include"]
        assert exclude == made.metadata.get("exclude")
        assert made.metadata["prompt"] == made.caption
        assert json.loads(json.dumps(made.metadata)) == made.metadata


def test_captions_say_what_the_scene_is():
    for row in range(300):
        scene, metadata = scene_of(TRAIN, 1, row), example(TRAIN, 1, row).metadata
        said = [(item["class"], item.get("color")) for item in metadata["include"] for _ in range(item["count"])]
        shown = [(placed.shape, placed.color if scene.states_colors else None) for placed in scene.objects]
        assert sorted(map(str, said)) == sorted(map(str, shown))
        assert metadata["tag"] == scene.kind


def test_articles():
    captions = [example(TRAIN, 0, row).caption for row in range(500)]
    assert any("an orange" in caption for caption in captions)
    assert not any(re.search(r"\ba [aeiou]|\ban [^aeiou]", caption) for caption in captions)


def test_captions_vary_in_wording():
    captions = [f"{example(TRAIN, 0, row).caption} " for row in range(500)]
    for opening in filter(None, OPENINGS):
        assert 80 < sum(caption.startswith(opening) for caption in captions) < 170
    for wording in itertools.chain(*WORDINGS.values(), ("and", "with")):
        assert any(f" {wording} a" in caption for caption in captions), wording
    numbered = [caption for caption in captions if any(f"{number} " in caption for number in NUMBERS.values())]
    colored = [caption for caption in numbered if any(color in caption for color in COLORS)]
    assert 0 < len(colored) < len(numbered)


def test_the_vocabulary_is_the_words_of_the_captions():
    words = {word for row in range(1000) for word in example(TRAIN, 0, row).caption.split()}
    assert words == set(VOCABULARY)
    assert len(set(VOCABULARY)) == len(VOCABULARY)


def test_a_target_comes_before_what_refers_to_it():
    star, ring = (Object(shape, "red", COLORS["red"], Box(0.5, 0.5, 0.2)) for shape in ("star", "ring"))
    metadata = metadata_of(Scene("position", (star, ring), PLAIN, False, "above"), "a star above a ring")
    assert metadata["include"] == [
        {"class": "ring", "count": 1},
        {"class": "star", "count": 1, "position": ["above", 0]},
    ]


# config and fingerprint


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"image_size": 16}, "image_size"),
        ({"kinds": ()}, "kinds"),
        ({"kinds": ("colors", "colors")}, "kinds"),
        ({"kinds": ("color",)}, "kinds"),
        ({"split": "held_out", "kinds": ("single_object",)}, "kinds"),
        ({"split": "test"}, "split"),
        ({"ground": "grass"}, "ground"),
    ],
)
def test_an_impossible_config_is_refused(change, key):
    with pytest.raises(ConfigError) as refused:
        build(ShapesConfig, dataclasses.asdict(TRAIN) | change)
    assert refused.value.key == key


@pytest.mark.parametrize(
    ("seed", "row", "key"), [(-1, 0, "seed"), (2**32, 0, "seed"), (0, -1, "row"), (0, 2**64, "row")]
)
def test_an_impossible_row_is_refused(seed, row, key):
    with pytest.raises(ConfigError) as refused:
        example(TRAIN, seed, row)
    assert refused.value.key == key


def test_the_fingerprint_is_that_of_the_config():
    config = dataclasses.replace(TRAIN, kinds=("colors",))
    assert fingerprint(config) == fingerprint(config)
    others = [
        dataclasses.replace(config, ground="plain"),
        dataclasses.replace(config, image_size=48),
        dataclasses.replace(config, kinds=("counting",)),
        dataclasses.replace(config, split="held_out"),
    ]
    assert len({fingerprint(other) for other in [config, *others]}) == 5


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (shapes, "VERSION", 2),
        (shapes, "VOCABULARY", (*VOCABULARY, "hexagon")),
        (shape_rendering, "CROSS_ARM", 0.4),
        (shape_captions, "JOINTS", ("beside", "with")),
    ],
)
def test_the_fingerprint_changes_with_what_defines_the_rows(monkeypatch, module, name, value):
    before = fingerprint(TRAIN)
    monkeypatch.setattr(module, name, value)
    assert fingerprint(TRAIN) != before


def test_draws_reach_both_ends():
    draws = Draws(0, 0, "scene")
    assert {draws.integer(2, 4) for _ in range(200)} == {2, 3, 4}
    numbers = [draws.uniform(-1, 3) for _ in range(1000)]
    assert -1 <= min(numbers) < -0.95
    assert 2.95 < max(numbers) < 3
