"""Registers the package's tasks with seqio. Imports TensorFlow: import this module only while preparing.

The file that `data.module` names does the same for your own data; its mixtures may use the tasks here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import seqio

from ecdit.data.emoji import Emoji
from ecdit.data.emoji_styles import EmojiStyles
from ecdit.data.generated import GENERATED
from ecdit.data.sources.protocol import Source
from ecdit.data.sources.tfds import TfdsBuilder
from ecdit.data.tensorflow_pairs import MadeWhenRead, PairsSource


def add_task(name: str, source: Source, preprocessors: Sequence[Callable[..., Any]] = ()) -> None:
    """Registers a source of image-text pairs as the seqio Task `name`.

    Args:
      name: the name in `data.task` and in mixtures.
      source: a source of `ecdit.data.sources` or of your own.
      preprocessors: seqio preprocessors on `tensorflow_pairs.SIGNATURE`; without any, pairs bypass TensorFlow.
    """
    _register(name, PairsSource(source), preprocessors)


def add_mixture(name: str, rates: Sequence[tuple[str, float]]) -> None:
    """Registers the seqio Mixture `name` from pairs of a task's name and its rate."""
    seqio.MixtureRegistry.add(name, list(rates))


def _register(name: str, source: Any, preprocessors: Sequence[Callable[..., Any]] = ()) -> None:
    seqio.TaskRegistry.add(name, source=source, preprocessors=list(preprocessors), output_features={})


_SOURCES = {
    "emoji": Emoji(),
    "emoji_styles": EmojiStyles(),
    # Keeps all five captions of an image; training draws each equally often.
    "coco": TfdsBuilder("coco_captions", image="image", captions=("captions/text",), key="image/filename"),
}
for _name, _source in _SOURCES.items():
    add_task(_name, _source)
for _name in GENERATED:
    _register(_name, MadeWhenRead())
PACKAGED = frozenset((*_SOURCES, *GENERATED))  # tasks that no file of a user registers
