"""Emoji in nine styles: "hot dog, in the style of Noto".

The drawings are the SVGs of nine openly licensed sets (`emoji_packages`), and the names come from the package `emoji`.
The sets name their icons by the CLDR names with hyphens, which joins each name with its drawing in every set.
"""

import dataclasses
import functools
import importlib.metadata
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ecdit.data import DataError
from ecdit.data.emoji import names
from ecdit.data.emoji_packages import COMMAND, ICONS, INFO, STYLES, is_fetched, read_info
from ecdit.data.sources.protocol import Pair, Rejected
from ecdit.data.splits import place_of

DIRECTORY = "data/emoji_styles_source"
SIDE = 128  # px; twice the largest image that a config asks for, so that downsampling smooths edges


@dataclasses.dataclass(frozen=True)
class EmojiStyles:
    """Draws emoji with their name and style. Each style is a part, and keys are `<style>/<name>` (noto/hot-dog).

    The held-out keys test new pairs of known names and styles: for each name and each style, the pair that would be
    held out last always belongs to training. Which pair that is depends on the other pairs of that name or style.
    """

    directory: str = DIRECTORY  # output directory of `ecdit.fetch_emoji_styles`
    styles: tuple[str, ...] = tuple(STYLES)

    @property
    def attribution(self) -> str:
        """Returns the author and licence of each set, and the source of the names."""
        told = []
        for style in self.parts():
            info = read_info(Path(self.directory) / style)
            author, licence = info["author"], info["license"]
            told.append(
                f"{info['name']} {STYLES[style].version}, by {author['name']} ({author.get('url', 'no address')}): "
                f"{licence['title']} ({licence.get('url', licence['spdx'])})"
            )
        return (
            f"Graphics, each style by its own authors, from the packages @iconify-json: {'; '.join(told)}. "
            "Captions: Unicode CLDR short names, from the package emoji, New BSD licence."
        )

    def parts(self) -> tuple[str, ...]:
        """Returns the styles.

        Raises:
          DataError: a style is unknown, or its set is missing or has another version.
        """
        unknown = [style for style in self.styles if style not in STYLES]
        if unknown or not self.styles:
            found = ", ".join(unknown) or "none"
            raise DataError(f"styles must be one or more of {', '.join(STYLES)}, not {found}")
        missing = [style for style in self.styles if not is_fetched(Path(self.directory) / style, STYLES[style])]
        if missing:
            raise DataError(
                f"{self.directory} lacks the emoji sets {', '.join(missing)} at the versions of this release: run "
                f"{COMMAND} --out={self.directory} first"
            )
        return self.styles

    def stamp(self, part: str) -> str:
        """Returns the packages' versions and the files' sizes and times of all sets: the split depends on every set."""
        versions = [f"{name} {importlib.metadata.version(name)}" for name in ("emoji", "resvg-py")]
        paths = [Path(self.directory) / style / name for style in self.styles for name in (ICONS, INFO)]
        states = [f"{path.parent.name}/{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths]
        return "; ".join([part, *versions, *states])

    def read(self, part: str) -> Iterator[Pair | Rejected]:
        """Yields the pairs of a style, sorted by name; an SVG that cannot be rendered is rejected.

        Raises:
          DataError: the sets or a package are missing.
        """
        self.parts()
        try:
            import resvg_py
        except ModuleNotFoundError:
            raise DataError("drawing emoji needs the package resvg-py: pip install -e '.[emoji]'") from None
        kept = _always_trained(self.directory, self.styles)
        icons = _icons(self.directory, part)
        for name, words in sorted(_captions().items()):
            if name not in icons["icons"]:
                continue
            key = f"{part}/{name}"
            try:
                image = resvg_py.svg_to_bytes(
                    svg_string=svg(icons, name), width=SIDE, height=SIDE, skip_system_fonts=True
                )
            except ValueError as error:
                yield Rejected(key, "undecodable", str(error))
                continue
            caption = f"{words}, in the style of {STYLES[part].name}"
            split = "train" if key in kept else None
            yield Pair(key, bytes(image), {"caption": caption}, {"style": part, "name": words}, split)


def style_and_name(key: str) -> tuple[str, str] | None:
    """Returns style and name of a key, or None for a key of other data."""
    style, slash, name = key.partition("/")
    return (style, name) if slash and style in STYLES else None


def svg(icons: Mapping[str, Any], name: str) -> str:
    """Returns an icon of an Iconify set as an SVG, centred in a square, with black for parts without a colour."""
    icon = icons["icons"][name]
    left, top = (icon.get(key, icons.get(key, 0)) for key in ("left", "top"))
    width, height = (icon.get(key, icons.get(key, 16)) for key in ("width", "height"))
    side = max(width, height)
    box = f"{left - (side - width) / 2:g} {top - (side - height) / 2:g} {side:g} {side:g}"
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} viewBox="{box}">{icon["body"].replace("currentColor", "#000")}</svg>'


def hyphenated(words: str) -> str:
    """Returns the icon name of a CLDR name: womans-sandal for "woman's sandal"."""
    plain = unicodedata.normalize("NFKD", words).encode("ascii", "ignore").decode().lower()
    for sign, spelled in (("'", ""), ("*", "asterisk"), ("#", "number-sign")):
        plain = plain.replace(sign, spelled)
    return re.sub("[^a-z0-9]+", "-", plain).strip("-")


def always_trained(found: Mapping[str, set[str]]) -> set[str]:
    """Returns the keys that always belong to training: for each name and each style, the one with the highest hash.

    Args:
      found: the names that each style has.
    """
    lasts: dict[tuple[str, str], str] = {}
    for style, having in found.items():
        for name in having:
            key = f"{style}/{name}"
            for of in (("style", style), ("name", name)):
                lasts[of] = max(key, lasts.get(of, key), key=place_of)
    return set(lasts.values())


@functools.cache
def _always_trained(directory: str, styles: tuple[str, ...]) -> set[str]:
    return always_trained({style: _captions().keys() & _icons(directory, style)["icons"].keys() for style in styles})


@functools.cache
def _captions() -> dict[str, str]:
    return {hyphenated(words): words for words in names().values()}


def _icons(directory: str, style: str) -> dict[str, Any]:
    return json.loads((Path(directory) / style / ICONS).read_text(encoding="utf-8"))
