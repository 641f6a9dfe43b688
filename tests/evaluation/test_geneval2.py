"""Tests GenEval 2's scores by hand, and answers that do not fit the benchmark."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from ecdit.errors import UserError
from ecdit.evaluation.geneval2 import Prompt, geometric_mean, read_answers, read_benchmark, summarize

DATA = next((p / "shared/eval/geneval2" for p in Path(__file__).parents if (p / "shared/eval/geneval2").is_dir()), None)
TWO = [Prompt("two dogs", 3, ("count", "object")), Prompt("a cat", 4, ("object",))]


def test_scores_by_hand():
    """Prompt 1: 0.25 and 1, so AM 0.625 and GM 0.5. Prompt 2: 0.4."""
    found = summarize(TWO, {"a cat": [0.4], "two dogs": [0.25, 1.0]})
    assert found["am"] == pytest.approx(51.25)
    assert found["gm"] == pytest.approx(45)
    assert found["skills"] == {"object": pytest.approx(70), "count": pytest.approx(25)}
    assert found["atomicity"] == {"3": pytest.approx(50), "4": pytest.approx(40)}


def test_skills_are_means_over_questions_and_not_over_prompts():
    benchmark = [Prompt("a", 3, ("object",) * 3), Prompt("b", 3, ("object",))]
    assert summarize(benchmark, {"a": [1.0] * 3, "b": [0.0]})["skills"] == {"object": 75}


def test_nothing_is_clipped():
    found = summarize(TWO, {"two dogs": [1.5, 1.5], "a cat": [2.0]})
    assert found["am"] == pytest.approx(175)
    assert found["gm"] == pytest.approx(175)
    assert found["skills"] == {"object": pytest.approx(175), "count": pytest.approx(150)}


def test_one_zero_makes_the_geometric_mean_zero():
    assert geometric_mean([0.0, 1.0, 1.0]) == 0


def test_tiny_probabilities_keep_their_geometric_mean():
    """Their product, 1e-340, is no float64."""
    assert geometric_mean([1e-34] * 10) == pytest.approx(1e-34, rel=1e-12, abs=0)
    assert geometric_mean([5e-324]) == 5e-324
    assert math.prod([1e-34] * 10) == 0


def test_the_geometric_mean_is_scipy_s():
    gmean = pytest.importorskip("scipy.stats").gmean
    scores = np.random.default_rng(0).random((20, 7))
    np.testing.assert_allclose([geometric_mean(row) for row in scores], gmean(scores, axis=1), rtol=1e-13)


@pytest.fixture
def write(tmp_path):
    def lines(name, values):
        path = tmp_path / name
        path.write_text("".join(json.dumps(value) + "\n" for value in values))
        return path

    return lines


def test_answers_come_in_any_order(write):
    rows = [{"prompt": "a cat", "scores": [0.4]}, {"prompt": "two dogs", "scores": [0, 1]}]
    assert read_answers(write("answers.jsonl", rows), TWO) == {"a cat": [0.4], "two dogs": [0.0, 1.0]}


RIGHT = [{"prompt": "two dogs", "scores": [0, 1]}, {"prompt": "a cat", "scores": [0.4]}]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (RIGHT[:1], "answers.jsonl: 1 of 2 prompts have no scores; first 'a cat'"),
        ([*RIGHT, RIGHT[0]], "line 3: prompt = 'two dogs': stands twice"),
        ([{"prompt": "a cow", "scores": [1]}], "line 1: prompt = 'a cow': is none of the benchmark's 2 prompts"),
        ([{"prompt": "a cat", "scores": [1, 1]}], r"scores = \[1, 1\]: must be 1, one for .*another version"),
        ([{"prompt": "a cat", "scores": [-0.1]}], r"scores\[0\] = -0.1: must be a number from 0 to 6"),
        ([{"prompt": "a cat", "scores": [98.5]}], r"scores\[0\] = 98.5: must be a number from 0 to 6"),
        ([{"prompt": "a cat", "scores": [True]}], r"scores\[0\] = True"),
        ([{"prompt": "a cat", "scores": [None]}], r"scores\[0\] = None"),
        ([{"prompt": "a cat"}], "scores is missing: must be a list"),
    ],
)
def test_answers_that_do_not_fit_are_refused(write, rows, said):
    with pytest.raises(UserError, match=said):
        read_answers(write("answers.jsonl", rows), TWO)


LINE = {"prompt": "a cat", "atom_count": 3, "vqa_list": [["Is it a cat?", "Yes"]], "skills": ["object"]}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("skills", ["object", "count"], "skills = .*: must have 1, as vqa_list has"),
        ("skills", ["colour"], r"skills\[0\] = 'colour': must be one of object, attribute, count, position, verb"),
        ("skills", [], r"skills = \[\]: must have one or more"),
        ("atom_count", 0, "atom_count = 0: must be 1 or more"),
        ("atom_count", "3", "atom_count = '3': must be an integer"),
    ],
)
def test_a_benchmark_of_another_form_is_refused(write, key, value, said):
    with pytest.raises(UserError, match=f"benchmark.jsonl, line 1: {said}"):
        read_benchmark(write("benchmark.jsonl", [LINE | {key: value}]))


def test_a_prompt_of_the_benchmark_stands_once(write):
    with pytest.raises(UserError, match="line 2: prompt = 'a cat': stands twice"):
        read_benchmark(write("benchmark.jsonl", [LINE, LINE]))


def test_the_whole_benchmark_against_the_original_s_sums():
    """As soft_tifa_analysis.py adds up, for 800 prompts with random scores."""
    if DATA is None:
        pytest.skip("no shared/eval/geneval2 beside the checkout")
    gmean = pytest.importorskip("scipy.stats").gmean
    lines = [json.loads(text) for text in (DATA / "geneval2_data.jsonl").read_text().splitlines()]
    random = np.random.default_rng(0)
    scores = [random.random(len(line["skills"])).tolist() for line in lines]
    benchmark = read_benchmark(DATA / "geneval2_data.jsonl")
    found = summarize(benchmark, {line["prompt"]: row for line, row in zip(lines, scores, strict=True)})
    assert found["am"] == pytest.approx(100 * sum(sum(row) / len(row) for row in scores) / 800, rel=1e-12)
    assert found["gm"] == pytest.approx(100 * sum(gmean(row) for row in scores) / 800, rel=1e-12)
    for skill in ("object", "attribute", "count", "position", "verb"):
        pooled = [
            s
            for line, row in zip(lines, scores, strict=True)
            for k, s in zip(line["skills"], row, strict=True)
            if k == skill
        ]
        assert found["skills"][skill] == pytest.approx(100 * sum(pooled) / len(pooled), rel=1e-12)
    for count in range(3, 11):
        means = [gmean(row) for line, row in zip(lines, scores, strict=True) if line["atom_count"] == count]
        assert found["atomicity"][str(count)] == pytest.approx(100 * sum(means) / 100, rel=1e-12)
