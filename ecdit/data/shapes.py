"""Generates the `shapes` data: images of coloured shapes with captions, computed from (seed, row).

Nothing is stored, and rows never end. Every caption is exactly true of its image, and `ecdit.evaluation.shapes_judge`
decides from pixels alone whether a caption is true. docs/shapes.md describes the data.
"""

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ecdit.data import shape_scenes as scenes
from ecdit.data.shape_captions import VOCABULARY, caption_of, metadata_of
from ecdit.data.shape_rendering import render
from ecdit.data.shape_scenes import Draws, Scene, ShapesConfig, scene_of

VERSION = 1  # raise it when a change alters the images or captions of rows
_ROWS = 64  # rows in the fingerprint


@dataclasses.dataclass(frozen=True)
class Example:
    """One row of the data."""

    image: UInt8[np.ndarray, "H W 3"]
    caption: str
    metadata: dict[str, Any]  # the caption's claims, in GenEval's form


def example(config: ShapesConfig, seed: int, row: int) -> Example:
    """Returns the example of a row. It is the same on every host, and row 10^9 is as fast as row 0.

    Raises:
      ConfigError: a seed that is no uint32, or a row that is no uint64.
    """
    scene, caption = scene_and_caption(config, seed, row)
    return Example(render(scene, config.image_size), caption, metadata_of(scene, caption))


def scene_and_caption(config: ShapesConfig, seed: int, row: int) -> tuple[Scene, str]:
    """Returns the scene and the caption of a row without drawing it. Raises the errors of `example`."""
    scene = scene_of(config, seed, row)
    return scene, caption_of(scene, Draws(seed, row, "caption"))


def fingerprint(config: ShapesConfig) -> str:
    """Returns the sha256 of VERSION, config, held-out combinations, vocabulary and the first rows.

    The first rows change it with the code even if nobody raised VERSION.
    """
    tables = [VERSION, dataclasses.asdict(config), scenes.HELD_OUT_COLORS, scenes.HELD_OUT_RELATIONS, VOCABULARY]
    digest = hashlib.sha256(json.dumps(tables).encode())
    for row in range(_ROWS):
        made = example(config, 0, row)
        digest.update(made.image.tobytes())
        digest.update(json.dumps(made.metadata).encode())
    return digest.hexdigest()
