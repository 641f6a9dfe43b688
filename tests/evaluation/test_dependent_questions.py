"""Tests DSG and DPG-Bench by hand: scores of answers to questions that depend on each other."""

import json

import numpy as np
import pytest

from ecdit.errors import UserError
from ecdit.evaluation import dpg, dsg
from ecdit.evaluation.questions import item_of, parse_parents, read_items


def dsg_item(*rows, item_id="a"):
    """An item of (id, dependency, answer)."""
    questions = [{"id": number, "dependency": cell, "answer": answer} for number, cell, answer in rows]
    return item_of({"item_id": item_id, "questions": questions}, "answer", with_tuple=False)


def dpg_item(*rows, item_id="a"):
    """An item of (id, dependency, answers by letter), all of one category unless a fourth entry names it."""
    answers = {"y": "yes", "n": "no"}
    questions = [
        {
            "id": row[0],
            "dependency": row[1],
            "tuple": row[3] if len(row) > 3 else "entity - whole (dog)",
            "answers": [answers[letter] for letter in row[2]],
        }
        for row in rows
    ]
    return item_of({"item_id": item_id, "questions": questions}, "answers", with_tuple=True)


@pytest.mark.parametrize(
    ("cell", "parents"),
    [
        ("0", ()),
        ("1", (1,)),
        ("1,2", (1, 2)),
        (" 1 , 2 ", (1, 2)),
        ("0,4", (4,)),
        ("2,0", (2,)),
        (3, (3,)),
        ("5, right", None),
        ("", None),
        ("-", None),
    ],
)
def test_cells_of_the_dependency_column(cell, parents):
    assert parse_parents(cell) == parents


def test_dsg_counts_exact_yes_alone():
    assert dsg.share(dsg_item((1, "0", "yes"), (2, "0", "Yes"), (3, "0", "yes."), (4, "0", "no"))) == 0.25


def test_dsg_takes_parents_by_their_own_answers():
    """2 falls with its parent 1. 3 depends on 2, whose own answer is yes, so it counts: zeros do not cascade."""
    assert dsg.share(dsg_item((1, "0", "no"), (2, "1", "yes"), (3, "2", "yes"))) == pytest.approx(1 / 3)


def test_dsg_needs_each_parent():
    assert dsg.share(dsg_item((1, "0", "yes"), (2, "0", "no"), (3, "1,2", "yes"), (4, "1", "yes"))) == 0.5
    assert dsg.share(dsg_item((1, "0", "yes"), (2, "0", "no"), (3, "2,1", "yes"), (4, "1", "yes"))) == 0.5


def test_dsg_takes_a_parent_that_comes_later():
    assert dsg.share(dsg_item((1, "2", "yes"), (2, "0", "no"))) == 0


def test_dsg_drops_all_dependencies_of_an_item_with_a_malformed_one():
    rows = [(1, "0", "no"), (2, "1", "yes"), (3, "1", "yes")]
    assert dsg.share(dsg_item(*rows)) == 0
    assert dsg.share(dsg_item(*rows, (4, "1, air", "yes"))) == 0.75


def test_an_unknown_parent_makes_an_item_null_and_no_mean_counts_it():
    shares = {"a": dsg.share(dsg_item((1, "0", "yes"), (2, "9", "yes"))), "b": 1.0, "c": 0.5}
    assert dsg.summarize(shares) == {"items": {"a": None, "b": 1.0, "c": 0.5}, "overall": 0.75}
    assert dsg.summarize({"a": None}) == {"items": {"a": None}, "overall": None}


def test_dsg_is_the_mean_of_items_and_not_of_questions():
    long = dsg_item(*[(i, "0", "yes") for i in range(1, 10)])
    short = dsg_item((1, "0", "no"))
    assert dsg.summarize({"a": dsg.share(long), "b": dsg.share(short)})["overall"] == 0.5


def test_dpg_zeros_cascade():
    """3 depends on 2, which fell with 1; DSG would count it."""
    item = dpg_item((1, "0", "n"), (2, "1", "y"), (3, "2", "y"), (4, "0", "y"))
    np.testing.assert_array_equal(dpg.cascade(dpg.own_scores(item), item.questions)[:, 0], [0, 0, 0, 1])
    assert dpg.score(item) == 25


def test_dpg_cascades_in_the_order_of_the_file_and_not_of_ids():
    """3 stands before its parent 2, so it counts with 2's own answer; after it, it falls."""
    rows = {1: (1, "0", "n"), 2: (2, "1", "y"), 3: (3, "2", "y")}
    assert dpg.score(dpg_item(rows[1], rows[3], rows[2])) == pytest.approx(100 / 3)
    assert dpg.score(dpg_item(rows[1], rows[2], rows[3])) == 0
    assert dpg.score(dpg_item(rows[3], rows[2], rows[1])) == pytest.approx(100 / 3)  # 2 falls, by 1's own answer


def test_dpg_has_a_score_for_each_image():
    """Image 1 answers yes, yes; image 2 no, (yes); image 3 yes, no."""
    item = dpg_item((1, "0", "yny"), (2, "1", "yyn"))
    np.testing.assert_array_equal(dpg.cascade(dpg.own_scores(item), item.questions), [[1, 0, 1], [1, 0, 0]])
    assert dpg.score(item) == 50


def test_dpg_s_zero_beside_other_ids_is_ignored():
    assert dpg.score(dpg_item((1, "0", "n"), (2, "0,1", "y"), (3, "1,0", "y"))) == 0
    assert dpg.score(dpg_item((1, "0", "y"), (2, "0,1", "y"))) == 100


def test_dpg_s_categories_count_all_images_and_all_rows_before_dependencies():
    """The last image's answers alone, which the original takes, would make every category 0."""
    items = [
        dpg_item((1, "0", "yn", "entity - whole (dog)"), (2, "1", "yn", "attribute - color (dog, red)")),
        dpg_item((1, "0", "nn", "entity - part (ear)"), (2, "1", "yy", "attribute - size (ear)"), item_id="b"),
    ]
    found = dpg.summarize(items, {item.item_id: dpg.score(item) for item in items})
    assert found["items"] == {"a": 50, "b": 0}
    assert found["overall"] == 25
    assert found["l2"] == {
        "attribute - color": 50,
        "attribute - size": 100,
        "entity - part": 0,
        "entity - whole": 50,
    }
    assert found["l1"] == {"attribute": 75, "entity": 25}


def test_dpg_s_category_names_are_the_literal_text():
    item = dpg_item(
        (1, "0", "y", "attribute-color (a)"), (2, "0", "n", "attribute - color (b)"), (3, "0", "y", "global")
    )
    found = dpg.summarize([item], {"a": dpg.score(item)})
    assert found["l2"] == {"attribute - color": 0, "attribute-color": 100, "global": 100}
    assert found["l1"] == {"attribute": 50, "global": 100}


def test_an_item_that_is_null_counts_in_no_mean_of_dpg():
    """Whatever the answers are: the original keeps the item where the first parent was answered with no."""
    items = [dpg_item((1, "0", "n"), (2, "1,9", "y")), dpg_item((1, "0", "y"), item_id="b")]
    found = dpg.summarize(items, {item.item_id: dpg.score(item) for item in items})
    whole = {"entity - whole": 100}
    assert found == {"overall": 100, "items": {"a": None, "b": 100}, "l1": {"entity": 100}, "l2": whole}
    alone = dpg.summarize(items[:1], {"a": None})
    assert alone == {"overall": None, "items": {"a": None}, "l1": {}, "l2": {}}


def test_dpg_refuses_a_malformed_dependency():
    with pytest.raises(UserError, match="item 'a', question 2: dependency must be ids"):
        dpg.score(dpg_item((1, "0", "y"), (2, "1, air", "y")))


def original_dpg(questions, image):
    """One crop's score, as compute_dpg_one_sample has it."""
    qid2scores = {question.number: question.scores()[image] for question in questions}
    for question in questions:
        if any(qid2scores[parent] == 0 for parent in question.parents):
            qid2scores[question.number] = 0
    return sum(qid2scores.values()) / len(qid2scores)


def test_dpg_scores_images_as_the_original_does():
    random = np.random.default_rng(0)
    for _ in range(200):
        count = int(random.integers(1, 8))
        ids = random.permutation(count) + 1
        rows = [
            (
                int(i),
                ",".join(map(str, random.integers(0, count + 1, random.integers(1, 3)))),
                random.choice(["ynyy", "nyny"]),
            )
            for i in ids
        ]
        item = dpg_item(*rows)
        expected = 100 * np.mean([original_dpg(item.questions, image) for image in range(4)])
        assert dpg.score(item) == pytest.approx(expected, abs=1e-12)


GOOD = {"item_id": "a", "questions": [{"id": 1, "dependency": "0", "answers": ["yes", "no"], "tuple": "global"}]}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("id", 0, r"questions\[0\].id = 0: must be an integer above 0"),
        ("id", "one", r"questions\[0\].id = 'one': must be an integer"),
        ("id", None, r"questions\[0\].id = None"),
        ("dependency", None, r"questions\[0\].dependency = None: must be a string"),
        ("answers", [], r"questions\[0\].answers = \[\]: must have one answer or more"),
        ("answers", ["yes", None], r"questions\[0\].answers = .*: must be strings"),
        ("answers", "yes", r"questions\[0\].answers = 'yes': must be a list"),
        ("tuple", 3, r"questions\[0\].tuple = 3: must be a string"),
    ],
)
def test_questions_that_cannot_be_scored_are_refused(key, value, said, tmp_path):
    (tmp_path / "items.jsonl").write_text(json.dumps(GOOD | {"questions": [GOOD["questions"][0] | {key: value}]}))
    with pytest.raises(UserError, match=rf"items.jsonl, line 1: {said}"):
        list(read_items(tmp_path / "items.jsonl", "answers", with_tuple=True))


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([GOOD, GOOD], "line 2: item_id = 'a': stands in line 1 already"),
        ([GOOD | {"questions": []}], r"questions = \[\]: must have one question"),
        ([GOOD | {"questions": GOOD["questions"] * 2}], r"questions\[1\].id = 1: stands twice"),
        ([GOOD | {"questions": ["q"]}], r"questions\[0\] = 'q': must be an object"),
        ([{"questions": GOOD["questions"]}], "item_id is missing"),
        (
            [GOOD | {"questions": [*GOOD["questions"], GOOD["questions"][0] | {"id": 2, "answers": ["yes"]}]}],
            "questions: have 1 and 2 answers",
        ),
    ],
)
def test_items_that_cannot_be_scored_are_refused(lines, said, tmp_path):
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match=rf"items.jsonl, .*{said}"):
        list(read_items(tmp_path / "items.jsonl", "answers", with_tuple=True))


def test_a_missing_answer_is_refused():
    with pytest.raises(UserError, match=r"questions\[0\].answer is missing"):
        item_of({"item_id": "a", "questions": [{"id": 1, "dependency": "0"}]}, "answer", with_tuple=False)


def test_ids_are_numbers_or_text():
    item = item_of({"item_id": 7, "questions": [{"id": "1", "dependency": 0, "answer": "yes"}]}, "answer", False)
    assert (item.item_id, item.questions[0].number, item.questions[0].parents) == ("7", 1, ())
