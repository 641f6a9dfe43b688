"""DSG: the share of a prompt's questions that a judge answers with yes, where the questions they depend on are too.

Cho et al.: Davidsonian Scene Graph (arXiv 2310.18235). The rules are those of dsg/vqa_utils.py, dsg/data_utils.py and
scripts/t2i_eval_dsg1k.py of github.com/j-min/DSG at commit 7330119. Differences on purpose:
- A dependency on a question that there is not makes the item null, and no mean counts it; the original ends with a
  KeyError, unless another parent has been answered with no before.
- An answer that is missing, or stands twice, is an error. In the original an item without answers scores 0.
"""

from collections.abc import Mapping

import numpy as np

from ecdit.evaluation.questions import Item


def share(item: Item) -> float | None:
    """Returns the share of questions answered "yes" whose parents all were too; None if a parent does not exist.

    Parents count with their own answers, whatever their parents': zeros do not cascade. One malformed cell drops the
    dependencies of the whole item, as in the original.
    """
    own = {question.number: question.scores()[0] for question in item.questions}
    if any(question.parents is None for question in item.questions):
        return float(np.mean(list(own.values())))
    if item.unknown_parents():
        return None
    asked = [(question.number, *(question.parents or ())) for question in item.questions]
    return float(np.mean([min(own[number] for number in numbers) for numbers in asked]))


def summarize(shares: Mapping[str, float | None]) -> dict:
    """Returns `items`, and `overall`: the mean over those that are not null, or null if all are."""
    scored = [share for share in shares.values() if share is not None]
    return {"items": dict(shares), "overall": float(np.mean(scored)) if scored else None}
