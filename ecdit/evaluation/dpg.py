"""DPG-Bench: the share of a long prompt's questions that a judge answers with yes, by image, from 0 to 100.

Hu et al.: ELLA (arXiv 2403.05135). The rules are those of dpg_bench/compute_dpg_bench.py of
github.com/TencentQQGYLab/ELLA at commit 3c228f1. Differences on purpose, so scores do not equal the original's exactly:
- Every question counts. The original leaves out the first row of its table.
- A category's score is the mean over all images. The original takes the last one's answers.
- A parent that does not exist makes the item null whatever the answers are. The original drops such an item only where
  the lookup fails, which it does not do after another parent that was answered with no.
- A dependency that is no list of integers is an error that names it.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from ecdit.errors import UserError
from ecdit.evaluation.questions import Item, Question


def own_scores(item: Item) -> Float[np.ndarray, "questions images"]:
    """Returns 1 for an answer that is exactly "yes", and 0 otherwise."""
    return np.array([question.scores() for question in item.questions])


def cascade(
    own: Float[np.ndarray, "questions images"], questions: Sequence[Question]
) -> Float[np.ndarray, "questions images"]:
    """Returns the scores after dependencies: a question is 0 if one of its parents is 0 when its turn comes.

    Turns follow the order of the file, so zeros cascade to later questions, and a parent that comes later counts with
    its own answer.
    """
    scores, row = own.copy(), {question.number: i for i, question in enumerate(questions)}
    for i, question in enumerate(questions):
        for parent in question.parents or ():
            scores[i] = np.where(scores[row[parent]] == 0, 0, scores[i])
    return scores


def score(item: Item) -> float | None:
    """Returns the mean over an item's images of the share of its questions, 0 to 100; None if a parent does not exist.

    Raises:
      UserError: a dependency is no list of integers.
    """
    for question in item.questions:
        if question.parents is None:
            raise UserError(f"item {item.item_id!r}, question {question.number}: dependency must be ids, such as '1,2'")
    if item.unknown_parents():
        return None
    return 100 * float(cascade(own_scores(item), item.questions).mean())


def category(question: Question) -> str:
    """Returns the level-2 category: the literal text before the bracket, spaces included."""
    return question.description.split("(")[0].strip()


def summarize(items: Sequence[Item], scores: Mapping[str, float | None]) -> dict:
    """Returns `items`, `overall` (their mean), and `l1` and `l2` (means over each category's questions), 0 to 100.

    Categories count answers before dependencies. Level 1 is the text before the first "-" of level 2. An item that is
    null counts nowhere; `overall` is null if all are.
    """
    l1: dict[str, list[float]] = {}
    l2: dict[str, list[float]] = {}
    for item in items:
        if scores[item.item_id] is None:
            continue
        for question, mean in zip(item.questions, own_scores(item).mean(axis=1), strict=True):
            name = category(question)
            l2.setdefault(name, []).append(mean)
            l1.setdefault(name.split("-")[0].strip(), []).append(mean)
    scored = [found for found in scores.values() if found is not None]
    return {
        "overall": float(np.mean(scored)) if scored else None,
        "items": dict(scores),
        "l1": _means(l1),
        "l2": _means(l2),
    }


def _means(groups: dict[str, list[float]]) -> dict[str, float]:
    return {name: 100 * float(np.mean(means)) for name, means in sorted(groups.items())}
