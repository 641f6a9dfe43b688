"""Scores of images that a run draws of captions of its data: shapes by the judge, retrieval among its images."""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from ecdit.config import require
from ecdit.data import DataError
from ecdit.data.config import DataConfig
from ecdit.data.generated import GENERATED, Ground, Shapes, Split
from ecdit.data.images import decode_stored
from ecdit.data.prepared import caption_of, open_prepared, stored_records
from ecdit.data.shape_scenes import KINDS, KINDS_HELD_OUT, ShapesConfig
from ecdit.data.shapes import example
from ecdit.evaluation.retrieval import fixed_choice, recall, target_ranks
from ecdit.evaluation.shapes_judge import judge

SEED = 0x5EED  # of the shapes' captions: those of rows that a run of another seed does not read

# Captions to images, uint8[n, h, w, 3].
Draw = Callable[[Sequence[str]], UInt8[np.ndarray, "n h w 3"]]


def shapes_of(data: DataConfig) -> Shapes:
    """Returns the shapes that the data is of.

    Raises:
      ConfigError: it is of something else, which the judge does not know.
    """
    made = GENERATED.get(data.task)
    known = ", ".join(name for name, one in GENERATED.items() if isinstance(one, Shapes))
    require(isinstance(made, Shapes), "data.task", data.task, f"the judge knows {known}")
    assert isinstance(made, Shapes)
    return made


def score_shapes(data: DataConfig, captions: int, split: Split, draw: Draw) -> dict[str, Any]:
    """Returns the share of images of `captions` captions of each kind that the judge accepts: see `scores`."""
    asked = [(kind, *one) for kind, one in wanted(data.image_size, shapes_of(data).ground, split, captions)]
    images = draw([caption for _, caption, _ in asked])
    verdicts = [judge(image, metadata).correct for image, (_, _, metadata) in zip(images, asked, strict=True)]
    return scores([kind for kind, _, _ in asked], verdicts)


def wanted(
    image_size: int, ground: Ground, split: Split, count: int
) -> list[tuple[str, tuple[str, Mapping[str, Any]]]]:
    """Returns the kind, caption and metadata of `count` rows of each kind: the same for every run."""
    kinds = KINDS if split == "train" else KINDS_HELD_OUT
    found = []
    for kind in kinds:
        config = ShapesConfig(image_size, ground, split, (kind,))
        rows = (example(config, SEED, row) for row in range(count))
        found += [(kind, (row.caption, row.metadata)) for row in rows]
    return found


def scores(kinds: Sequence[str], verdicts: Sequence[bool]) -> dict[str, Any]:
    """Returns the share of correct images of each kind, and the mean over kinds as `overall`, as GenEval does."""
    correct = collections.defaultdict(list)
    for kind, verdict in zip(kinds, verdicts, strict=True):
        correct[kind].append(verdict)
    shares = {kind: sum(found) / len(found) for kind, found in correct.items()}
    return {"overall": sum(shares.values()) / len(shares), "kinds": shares}


class RetrievalSet(NamedTuple):
    """Images that samples are looked up among, and the captions that are sampled."""

    keys: list[str]  # of the records
    images: UInt8[np.ndarray, "N h w 3"]  # those of the split first
    num_targets: int  # images of the split
    chosen: Int[np.ndarray, " n"]  # places of the true images
    captions: list[str]


def load_retrieval(data: DataConfig, count: int, split: Split) -> RetrievalSet:
    """Reads the images and chooses `count` captions of the split, always the same ones; 0 or too many for all.

    Training captions are looked up among the training images, held-out ones among all.

    Raises:
      DataError: the data has no stored record in the split.
    """
    prepared = open_prepared(data)
    targeted = list(stored_records(prepared, split))
    if not targeted:
        raise DataError(f"the data has no stored record in the split {split}: see data.prepare.held_out")
    records = targeted if split == "train" else [*targeted, *stored_records(prepared, "train")]
    chosen = fixed_choice(len(targeted), min(count or len(targeted), len(targeted)))
    return RetrievalSet(
        keys=[record.key for record in records],
        images=np.stack([decode_stored(record.image) for record in records]),
        num_targets=len(targeted),
        chosen=chosen,
        captions=[caption_of(data, records[i].captions) for i in chosen],
    )


def score_retrieval(loaded: RetrievalSet, draw: Draw) -> dict[str, Any]:
    """Returns how often the image of a caption is the nearest to the sample, or one of the five nearest."""
    ranks = target_ranks(draw(loaded.captions), loaded.images, loaded.chosen)
    return {f"r_at_{k}": float(recall(ranks, k)) for k in (1, 5)}
