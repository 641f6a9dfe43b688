"""Tests GenEval's rules: a case by hand for each branch, and correct images of all its prompts."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from ecdit.errors import UserError
from ecdit.evaluation.geneval import CLASSES, Verdict, confident, judge, relations, summarize
from ecdit.evaluation.geneval_lines import image_of, judge_lines

DATA = next((p / "shared/eval/geneval" for p in Path(__file__).parents if (p / "shared/eval/geneval").is_dir()), None)


def box(x, y, score=0.95, size=10.0):
    """A square box around (x, y)."""
    return [x - size / 2, y - size / 2, x + size / 2, y + size / 2, score]


def line(include, detections, colors=None, exclude=None, tag="two_object"):
    metadata = {"tag": tag, "include": include, "prompt": "a photo"}
    if exclude is not None:
        metadata["exclude"] = exclude
    return {"filename": "0.png", "metadata": metadata, "detections": detections, "colors": colors or {}}


def verdict(*args, **kwargs):
    """(correct, reason)."""
    found = judge(image_of(line(*args, **kwargs)))
    return found.correct, found.reason


def test_objects_that_are_there():
    assert verdict([{"class": "dog", "count": 1}], {"dog": [box(0, 0)], "cat": [box(9, 9)]}) == (True, "")


def test_too_few_objects():
    assert verdict([{"class": "dog", "count": 2}], {"dog": [box(0, 0)]}) == (False, "expected dog>=2, found 1")
    assert verdict([{"class": "dog", "count": 1}], {}) == (False, "expected dog>=1, found 0")
    assert verdict([{"class": "dog", "count": 1}], {"dog": []}) == (False, "expected dog>=1, found 0")


def test_more_objects_than_asked_for_are_right():
    assert verdict([{"class": "dog", "count": 1}], {"dog": [box(0, 0), box(9, 9)]})[0]


def test_each_clause_has_its_reason():
    include = [{"class": "dog", "count": 1}, {"class": "cat", "count": 3}]
    assert verdict(include, {"cat": [box(0, 0)]}) == (False, "expected dog>=1, found 0\nexpected cat>=3, found 1")


@pytest.mark.parametrize(("number", "right"), [(1, False), (2, True), (3, False)])
def test_counting_has_a_lower_and_an_upper_bound(number, right):
    clauses = [{"class": "clock", "count": 2}], {"clock": [box(20 * i, 0) for i in range(number)]}
    correct, reason = verdict(*clauses, exclude=[{"class": "clock", "count": 3}], tag="counting")
    assert correct == right
    assert reason == {1: "expected clock>=2, found 1", 2: "", 3: "expected clock<3, found 3"}[number]


def test_counting_counts_only_scores_above_nine_tenths():
    found = {"clock": [box(0, 0, 0.91), box(20, 0, 0.9), box(40, 0, 0.5)]}
    assert verdict([{"class": "clock", "count": 2}], found, tag="counting")[1] == "expected clock>=2, found 1"
    assert verdict([{"class": "clock", "count": 3}], found, tag="two_object")[0]


@pytest.mark.parametrize(("score", "right"), [(0.3, False), (0.30000001, False), (0.3000001, True), (0.29, False)])
def test_scores_are_compared_strictly_and_in_float32(score, right):
    """0.30000001 is above 0.3 in float64; in float32 both are the same number."""
    assert verdict([{"class": "dog", "count": 1}], {"dog": [box(0, 0, score)]})[0] == right


def test_at_most_sixteen_objects_of_a_class_count():
    found = {"dog": [box(i, 0) for i in range(20)]}
    assert verdict([{"class": "dog", "count": 16}], found)[0]
    assert verdict([{"class": "dog", "count": 17}], found) == (False, "expected dog>=17, found 16")
    excluded = verdict([{"class": "dog", "count": 1}], found, exclude=[{"class": "dog", "count": 4}])
    assert excluded == (False, "expected dog<4, found 16")


def test_exact_duplicates_count():
    assert verdict([{"class": "dog", "count": 2}], {"dog": [box(0, 0), box(0, 0)]})[0]


def test_the_best_boxes_come_first_whatever_the_order_of_the_file():
    scores = np.array([0.4, 0.99, 0.1, 0.6], np.float32)
    np.testing.assert_array_equal(confident(scores, "colors"), [1, 3, 0])


def test_the_colour_is_that_of_the_best_box():
    found = {"car": [box(0, 0, 0.5), box(20, 0, 0.9)]}
    red = [{"class": "car", "count": 1, "color": "red"}]
    assert verdict(red, found, {"car": ["blue", "red"]}) == (True, "")
    reason = "expected red car>=1, found 0 red; and 1 blue"
    assert verdict(red, found, {"car": ["red", "blue"]}) == (False, reason)


def test_colours_are_named_in_the_order_of_the_classifier():
    found = {"car": [box(20 * i, 0, 0.9 - i / 100) for i in range(4)]}
    red = [{"class": "car", "count": 4, "color": "red"}]
    reason = "expected red car>=4, found 1 red; and 1 red, 2 green, 1 white"
    assert verdict(red, found, {"car": ["white", "green", "red", "green"]}) == (False, reason)


def test_a_box_without_a_colour_is_none_of_the_ten():
    red = [{"class": "car", "count": 1, "color": "red"}]
    expected = (False, "expected red car>=1, found 0 red; and ")
    assert verdict(red, {"car": [box(0, 0)]}, {"car": [None]}) == expected


def test_too_few_objects_have_no_second_reason_for_their_colour():
    red = [{"class": "car", "count": 2, "color": "red"}]
    assert verdict(red, {"car": [box(0, 0)]}, {"car": ["blue"]}) == (False, "expected car>=2, found 1")


@pytest.mark.parametrize(
    ("x", "y", "held"),
    [
        (-40, 0, ["left of"]),
        (40, 0, ["right of"]),
        (0, -40, ["above"]),
        (0, 40, ["below"]),
        (40, 40, ["right of", "below"]),
        (-40, -40, ["left of", "above"]),
        # 2 of an offset are within the slack of 0.1 (10 + 10): r = (1, 0) and |o| = 3; 1/3 is not beyond 0.5.
        (3, 0, []),
        (4, 0, []),  # 2/4 is 0.5, not beyond it
        (4.5, 0, ["right of"]),  # 2.5/4.5
        (1.5, 0, []),
        (2.0005, 0, []),  # r = 0.0005
        # The divisor is the norm of the offset before its revision: r = (4, 8), |o| = 11.66; 4/11.66 = 0.34.
        (6, 10, ["below"]),
    ],
)
def test_relations_by_hand(x, y, held):
    assert relations(np.float32(box(x, y)), np.float32(box(0, 0))) == held


def test_relations_count_the_sizes_of_both_boxes():
    """Slack 0.1 (10 + 90) = 10 of an offset of 19: 9/19 is not beyond 0.5. Of one size alone it would be."""
    assert relations(np.float32(box(19, 0)), np.float32(box(0, 0, size=90.0))) == []
    assert relations(np.float32(box(19, 0)), np.float32(box(0, 0, size=10.0))) == ["right of"]


def test_a_box_without_a_relation_is_named_with_two_spaces():
    include = [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["above", 0]}]
    found = {"dog": [box(0, 0)], "cat": [box(1, 0)]}
    assert verdict(include, found) == (False, "expected cat above target, found  target")


def test_a_relation_that_holds_beside_another_is_right():
    include = [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["above", 0]}]
    assert verdict(include, {"dog": [box(0, 0)], "cat": [box(40, -40)]}) == (True, "")
    below = [include[0], {"class": "cat", "count": 1, "position": ["below", 0]}]
    reason = "expected cat below target, found right of and above target"
    assert verdict(below, {"dog": [box(0, 0)], "cat": [box(40, -40)]}) == (False, reason)


def test_a_relation_holds_of_every_pair_and_the_first_that_fails_is_the_reason():
    include = [{"class": "dog", "count": 2}, {"class": "cat", "count": 2, "position": ["left of", 0]}]
    dogs = [box(0, 0, 0.9), box(100, 0, 0.8)]
    assert verdict(include, {"dog": dogs, "cat": [box(-90, 0, 0.9), box(-50, 0, 0.8)]}) == (True, "")
    reason = "expected cat left of target, found right of target"
    assert verdict(include, {"dog": dogs, "cat": [box(-50, 0, 0.9), box(50, 0, 0.8)]}) == (False, reason)


def test_a_target_that_was_not_found_is_the_reason():
    include = [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["above", 0]}]
    reason = "expected dog>=1, found 0\nno target for cat to be above"
    assert verdict(include, {"cat": [box(0, 0)]}) == (False, reason)


def test_the_target_is_the_clause_of_that_number():
    include = [{"class": c, "count": 1} for c in ("dog", "bus")]
    include.append({"class": "cat", "count": 1, "position": ["right of", 1]})
    found = {"dog": [box(100, 0)], "bus": [box(0, 0)], "cat": [box(50, 0)]}
    assert verdict(include, found) == (True, "")


def test_a_wrong_colour_leaves_the_position_unsaid():
    include = [{"class": "dog", "count": 1}]
    include.append({"class": "cat", "count": 1, "color": "red", "position": ["above", 0]})
    found = {"dog": [box(0, 0)], "cat": [box(0, 50)]}
    reason = "expected red cat>=1, found 0 red; and 1 blue"
    assert verdict(include, found, {"cat": ["blue"]}) == (False, reason)


STEPS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


def right_line(metadata):
    """Detections that a prompt asks for, and no others: boxes of 10 px, 50 px from their targets."""
    places, detections, colors = [], {}, {}
    for number, clause in enumerate(metadata["include"]):
        x, y = 1000.0 * number, 0.0
        if "position" in clause:
            relation, target = clause["position"]
            (dx, dy), (x, y) = STEPS[relation], places[target]
            x, y = x + 50 * dx, y + 50 * dy
        places.append((x, y))
        boxes = [box(x + 20 * i, y) for i in range(clause["count"])]
        detections.setdefault(clause["class"], []).extend(boxes)
        colors.setdefault(clause["class"], []).extend([clause.get("color")] * clause["count"])
    return {"filename": "0.png", "metadata": metadata, "detections": detections, "colors": colors}


@pytest.fixture(scope="module")
def benchmark():
    if DATA is None:
        pytest.skip("no shared/eval/geneval beside the checkout")
    lines = (DATA / "evaluation_metadata.jsonl").read_text().splitlines()
    return [json.loads(text) for text in lines]


def test_every_prompt_of_the_benchmark_has_images_that_are_right_and_wrong(benchmark):
    """553 prompts: an image with what is asked for is right; one without one of its objects says which is missing."""
    tags = set()
    for metadata in benchmark:
        made = right_line(metadata)
        assert judge(image_of(made)).correct, metadata
        tags.add(metadata["tag"])
        for clause in metadata["include"]:
            kept = lambda values, name=clause["class"]: {n: v for n, v in values.items() if n != name}  # noqa: E731
            missing = made | {"detections": kept(made["detections"]), "colors": kept(made["colors"])}
            found = judge(image_of(missing))
            assert not found.correct
            assert f"expected {clause['class']}>={clause['count']}, found 0" in found.reason.split("\n")
    assert len(tags) == 6


def test_the_classes_are_the_original_s(benchmark):
    assert (DATA / "object_names.txt").read_text().split("\n")[:80] == list(CLASSES)


def test_the_score_is_the_mean_of_the_tasks_and_not_of_the_images():
    """Three of four and none of one: 3/8, where 3 of 5 images are right."""
    tasks = [("colors", True)] * 3 + [("counting", False), ("colors", False)]
    found = summarize([Verdict("", tag, "", correct, "") for tag, correct in tasks])
    assert found == {"tasks": {"colors": 0.75, "counting": 0.0}, "overall": 0.375}


GOOD = line([{"class": "dog", "count": 1}], {"dog": [box(0, 0)]})


def changed(path, value):
    """GOOD with another value at a path such as "metadata.include.0.count"; no value takes the key away."""
    made = json.loads(json.dumps(GOOD))
    *parents, last = [int(key) if key.isdecimal() else key for key in path.split(".")]
    holder = made
    for key in parents:
        holder = holder[key]
    if value is KeyError:
        del holder[last]
    else:
        holder[last] = value
    return made


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("metadata", KeyError, "metadata is missing"),
        ("filename", 3, "filename = 3: must be a string"),
        ("detections", KeyError, "detections is missing"),
        ("colors", [], r"colors = \[\]: must be an object"),
        ("metadata.include", KeyError, "metadata.include is missing: must be a list; there is tag, prompt"),
        ("metadata.include", [], r"metadata.include = \[\]: must ask for something"),
        ("metadata.tag", KeyError, "metadata.tag is missing"),
        ("metadata.prompt", KeyError, "metadata.prompt is missing"),
        ("metadata.exclude", {}, "metadata.exclude = {}: must be a list"),
        ("metadata.include.0", "dog", r"metadata.include\[0\] = 'dog': must be an object"),
        ("metadata.include.0.class", "dgo", r"metadata.include\[0\].class = 'dgo': unknown class; .*computer mouse"),
        ("metadata.include.0.count", 0, r"metadata.include\[0\].count = 0: must be 1 or more"),
        ("metadata.include.0.count", True, r"metadata.include\[0\].count = True: must be an integer"),
        (
            "metadata.include.0.colour",
            "red",
            r"include\[0\].colour = 'red': unknown key; there are class, count, color",
        ),
        ("metadata.include.0.color", "mauve", r"include\[0\].color = 'mauve': must be one of red, orange"),
        ("metadata.include.0.position", ["above", 0], r"position = \['above', 0\]: must be .* earlier clause"),
        ("metadata.include.0.position", ["over", 0], r"relations: left of, right of, above, below"),
        ("metadata.exlude", [{"class": "dog", "count": 1}], r"metadata\.exlude = .*: unknown key; there are tag, incl"),
        ("metadata.exclude", [{"class": "dog", "count": 2, "color": "red"}], r"exclude\[0\].color = 'red': unknown"),
        ("detections.mouse", [], "detections = 'mouse': unknown class"),
        ("detections.dog", {}, "detections.dog = {}: must be a list"),
        ("detections.dog.0", [0, 0, 1, 1], r"detections.dog\[0\] = .*: must be five numbers"),
        ("detections.dog.0.4", "0.9", r"detections.dog\[0\] = .*: must be five numbers"),
        ("detections.dog.0.0", 1e300, "detections.dog = .*: must be numbers that float32 holds"),
        ("colors.mouse", [], "colors = 'mouse': unknown class"),
        ("colors.dog", [], r"colors.dog = \[\]: must have one entry for each of 1 boxes"),
        ("colors.dog", ["mauve"], r"colors.dog\[0\] = 'mauve': must be null or one of red"),
        ("colors.dog", "red", "colors.dog = 'red': must be a list"),
    ],
)
def test_lines_that_cannot_be_judged_are_refused(path, value, said, tmp_path):
    assert judge(image_of(GOOD)).correct
    file = tmp_path / "detections.jsonl"
    file.write_text(json.dumps(changed(path, value)) + "\n")
    with pytest.raises(UserError, match=rf"detections.jsonl, line 1: .*{said}"):
        judge_lines(file)


def test_a_colour_that_is_asked_for_and_not_there_is_refused():
    red = line([{"class": "dog", "count": 1, "color": "red"}], {"dog": [box(0, 0)]})
    with pytest.raises(UserError, match=r"colors\.dog is missing: must be a list"):
        judge(image_of(red))
    nothing_there = line([{"class": "dog", "count": 1, "color": "red"}], {"dog": [box(0, 0, 0.1)]})
    assert judge(image_of(nothing_there)).reason == "expected dog>=1, found 0"


def test_an_image_stands_once(tmp_path):
    file = tmp_path / "detections.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(GOOD)}\n")
    with pytest.raises(UserError, match=r"line 3: filename = '0.png': stands in line 1 already"):
        judge_lines(file)


def test_verdicts_keep_the_order_of_the_file(tmp_path):
    file = tmp_path / "detections.jsonl"
    file.write_text("".join(json.dumps(GOOD | {"filename": name}) + "\n" for name in "cab"))
    assert [dataclasses.astuple(found)[0] for found in judge_lines(file)] == ["c", "a", "b"]
