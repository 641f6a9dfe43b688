"""Configs of data, and sources small enough to prepare in a moment."""

import dataclasses
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

from ecdit.data.config import DataConfig, PrepareConfig
from ecdit.data.filters import Filters
from ecdit.data.sources.protocol import Pair, Rejected
from ecdit.data.tokenizer import PromptTokens, load_tokenizer

FILTERS = Filters(min_side=0, max_aspect=0.0, min_caption=0, max_caption=0, columns={})
PREPARE = PrepareConfig(
    image_format="png", quality=95, background="white", max_pixels=10_000_000, held_out=0.0, filters=FILTERS
)


def tokenize(path, captions, length):
    """The tokens of captions by a tokenizer's file, int32, padded."""
    return PromptTokens(load_tokenizer(path), length)(captions)


def make_config(directory="nowhere", **changes):
    """A DataConfig; a change of `prepare` is a dict."""
    prepare = dataclasses.replace(PREPARE, **changes.pop("prepare", {}))
    values = {
        "module": "",
        "task": "emoji",
        "directory": str(directory),
        "image_size": 32,
        "prepare": prepare,
        "captions": {"caption": 1.0},
        "tokenizer": "",
        "second_tokenizer": "",
        "vocab_size": 1024,
        "caption_length": 12,
        "latent_channels": 0,
        "latents": "",
        "placeholder_ok": False,
        "text_states": "",
        "caption_dropout": 0.1,
        "flip_probability": 0.5,
        "crop_padding": 2,
        "num_threads": 2,
        "prefetch": 2,
    }
    return DataConfig(**{**values, **changes})


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


@dataclasses.dataclass(frozen=True)
class Counted:
    """`count` pairs in parts: the image of pair i is grey of level i % 256, its captions "image i" and "number i"."""

    count: int
    per_part: int = 10
    spoiled: tuple[int, ...] = ()  # pairs whose image is cut short

    attribution = "grey by rule"

    def parts(self):
        return tuple(f"part {i}" for i in range(-(-self.count // self.per_part)))

    def stamp(self, part):
        return f"{self}"

    def read(self, part) -> Iterator[Pair | Rejected]:
        first = int(part.split()[1]) * self.per_part
        for i in range(first, min(first + self.per_part, self.count)):
            image = png(np.full((8, 8, 3), i % 256, np.uint8))
            image = image[:40] if i in self.spoiled else image
            yield Pair(f"key{i}", image, {"caption": f"image {i}", "other": f"number {i}"}, {"number": i})


MODULE = """
from ecdit.data.tasks import add_mixture, add_task
from tests.data.example import Counted

add_task("{name}", Counted({arguments}))
"""


def module(tmp_path, name, arguments, more=""):
    """A file that registers `Counted(arguments)` as the task `name`."""
    path = tmp_path / f"{name}.py"
    path.write_text(MODULE.format(name=name, arguments=arguments) + more)
    return str(path)
