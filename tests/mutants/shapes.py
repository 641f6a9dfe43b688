"""Mutants of the `shapes` data and its judge: rows, held-out combinations, images, captions and verdicts."""

from tests.mutants.mutant import Mutant

_SCENES, _RENDERING, _CAPTIONS = (f"ecdit/data/shape_{name}.py" for name in ("scenes", "rendering", "captions"))
_SHAPES, _JUDGE = "ecdit/data/shapes.py", "ecdit/evaluation/shapes_judge.py"


def _data(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/data/test_shapes.py::{name}" for name in names)


def _judge(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/evaluation/test_shapes_judge.py::{name}" for name in names)


MUTANTS = (
    Mutant(
        _SCENES,
        "key, counter = (np.array(words, np.uint64) for words in",
        "key, counter = (np.array(words, np.float64).astype(np.uint64) for words in",
        _data("test_rows_have_no_end"),
        "neighbouring rows beyond 2**53 are the same",
    ),
    Mutant(
        _SCENES,
        '    if kind in ("two_object", "color_attr") and is_held_out_relation(objects):',
        "    if False:",
        _data("test_training_rows_show_no_held_out_combination"),
        "training sees held-out arrangements under captions that do not name them",
    ),
    Mutant(
        _SCENES,
        "{(shape, relation, other), (other, OPPOSITE[relation], shape)} & set(",
        "{(shape, relation, other)} & set(",
        _data("test_training_rows_show_no_held_out_combination"),
        "training sees a held-out arrangement by its converse",
    ),
    Mutant(
        _SCENES,
        "[color for color in COLORS if color != HELD_OUT_COLORS[shape]]",
        "[*COLORS]",
        _data("test_training_rows_show_no_held_out_combination"),
    ),
    Mutant(
        _SCENES,
        '    if config.split == "held_out" and kind == "counting":\n        states_colors = True\n',
        "",
        _data("test_held_out_rows_state_exactly_one"),
        "half of the counted held-out scenes do not test their combination",
    ),
    Mutant(
        _SCENES,
        "np.maximum(np.abs(offset) - 0.1 * (2 * a.half + 2 * b.half), 0)",
        "np.maximum(np.abs(offset) - 0.1 * (a.half + b.half), 0)",
        _data("test_relations_are_genevals"),
    ),
    Mutant(
        _SCENES,
        "return [_box_in(draws, *cell) for cell in cells]",
        "return [_box_in(draws, *cell) for cell in sorted(cells)]",
        _data("test_a_pairs_first_shape_is_on_either_side"),
        "the order of a caption's shapes says where they are",
    ),
    Mutant(
        _SCENES,
        "far = dataclasses.replace(far, y=min(max(y, MARGIN + far.half), 1 - MARGIN - far.half))",
        "far = dataclasses.replace(far, y=far.y)",
        _data("test_the_stated_relation_holds_clearly_and_no_other"),
    ),
    Mutant(
        _RENDERING,
        "    return inner >= 4",
        "    return inner >= 5",
        _data("test_a_shape_has_its_area_and_touches_its_box"),
        "a star is a pentagon",
    ),
    Mutant(
        _RENDERING,
        "return rows, columns, counts / SAMPLES**2",
        "return rows, columns, (counts > 0) * 1.0",
        _data("test_edges_are_antialiased"),
    ),
    Mutant(
        _CAPTIONS,
        "include.reverse()",
        "include",
        _data("test_a_target_comes_before_what_refers_to_it"),
    ),
    Mutant(
        _CAPTIONS,
        '"count": include[0]["count"] + 1}]',
        '"count": include[0]["count"]}]',
        _data("test_captions_say_what_the_metadata_says"),
        "every true count is wrong",
    ),
    Mutant(
        _SHAPES,
        "        digest.update(json.dumps(made.metadata).encode())\n",
        "",
        _data("test_the_fingerprint_changes_with_what_defines_the_rows"),
        "data with other captions has the same fingerprint",
    ),
    Mutant(
        _JUDGE,
        "1.1 * np.quantile(np.abs(share[free]), 0.9)",
        "2 * np.median(np.abs(share[free]))",
        _judge("test_textures_are_no_part_of_a_shape"),
        "stripes of which most are light grow the shapes that they touch",
    ),
    Mutant(
        _JUDGE,
        "return [labels == names[place] for place in order if counts[place] >= smallest]",
        "return [labels == names[place] for place in order]",
        _judge("test_a_speck_is_no_shape"),
    ),
    Mutant(
        _JUDGE,
        "        if fit >= _WORST_FIT:",
        "        if True:",
        _judge("test_a_bar_is_no_shape"),
    ),
    Mutant(
        _JUDGE,
        "box = Box(x / size, (y - unit.center * half) / size, half / size)",
        "box = Box(x / size, y / size, half / size)",
        _judge("test_shape_color_and_box_are_read_back"),
    ),
    Mutant(
        _JUDGE,
        "chosen = [found for found in of_shape if color in (None, found.color)][:count]",
        "chosen = [found for found in of_shape[:count] if color in (None, found.color)]",
        _judge("test_rules"),
    ),
    Mutant(
        _JUDGE,
        '        if found >= item["count"]:',
        '        if found > item["count"]:',
        _judge("test_rules"),
    ),
)
