"""Defines a source of data for preparation: it has parts, and yields pairs of an image and its captions from each.

A source is a frozen dataclass that can be pickled, because several processes read its parts. The names of its parts do
not change, because a resumed preparation finds them by name.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol

import numpy as np

from ecdit.data import DataError
from ecdit.data.reasons import entry

Scalar = int | float | str | bool | None
Texts = dict[str, str]  # captions by field
Columns = dict[str, Scalar]


@dataclasses.dataclass(frozen=True)
class Pair:
    """An image with its captions, as found in a source."""

    key: str
    image: bytes | np.ndarray  # encoded as found, or uint8[H, W, 3]
    captions: Texts  # by field; a list field `captions` becomes captions.0, captions.1 ...
    columns: Columns  # other values for filters: aesthetic, punsafe ...
    split: Literal["train", "held_out"] | None = None  # None assigns it by the key's hash (`ecdit.data.splits`)


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A rejected record, or damaged bytes that may have held records."""

    name: str  # its place: "00012.tar:000120034.jpg", "pairs.csv:row 17"
    reason: str  # from ecdit.data.reasons.REASONS
    detail: str

    def __post_init__(self):
        entry(self.reason)


Keep = Callable[[Pair], bool]


class Source(Protocol):
    """Yields pairs for preparation."""

    @property
    def attribution(self) -> str:
        """Returns who made the data and under which licence; the manifest stores it."""
        ...

    def parts(self) -> tuple[str, ...]:
        """Returns the names of the parts in reading order. Each part can be read on its own.

        Raises:
          DataError: there is nothing to read.
        """
        ...

    def read(self, part: str) -> Iterator[Pair | Rejected]:
        """Yields the records of a part, always in the same order. It yields a Rejected for a damaged record.

        Raises:
          DataError: the part cannot be read at all, or the source's predicate raised.
        """
        ...

    def stamp(self, part: str) -> str:
        """Returns a string that changes with the names, sizes and times of a part's files."""
        ...


def judged(pair: Pair, name: str, keep: Keep | None) -> Pair | Rejected:
    """Returns `pair`, or a Rejected called `name` if the user's predicate `keep` refuses it.

    Raises:
      DataError: the predicate raised.
    """
    if keep is None:
        return pair
    try:
        kept = keep(pair)
    except Exception as error:  # `keep` is the user's code and may raise anything
        raise DataError(f"keep raised {type(error).__name__} for key {pair.key!r} ({name}): {error}") from error
    return pair if kept else Rejected(name, "predicate", "keep returned false")


def split_fields(fields: Mapping[str, Any], captions: Callable[[str], bool]) -> tuple[Texts, Columns]:
    """Splits a record's fields into captions and columns.

    Args:
      fields: the record.
      captions: returns whether a field of that name is a caption, if it is a string or a list. Of a list only the
        strings are captions, each with its own index; others, such as null, say that there is none.

    Returns:
      The captions, stripped of white space and including empty ones, and the other fields that are scalars.
    """
    texts, columns = {}, {}
    for name, value in fields.items():
        if captions(name) and isinstance(value, str):
            texts[name] = value
        elif captions(name) and isinstance(value, list | tuple):
            texts |= {f"{name}.{place}": item for place, item in enumerate(value) if isinstance(item, str)}
        elif value is None or isinstance(value, int | float | str | bool):
            columns[name] = value
    return texts, columns


def with_captions(key: str, image: bytes | np.ndarray, texts: Texts, columns: Columns, name: str) -> Pair | Rejected:
    """Returns the pair with its captions that are not blank, stripped, or a Rejected called `name` if all are."""
    kept = {field: stripped for field, text in texts.items() if (stripped := text.strip())}
    if not kept:
        reason = "empty caption" if texts else "no caption"
        return Rejected(name, reason, f"fields: {', '.join([*texts, *columns]) or 'none'}")
    for field, text in itertools.chain(kept.items(), columns.items()):
        if isinstance(text, str) and not is_unicode(text):
            return Rejected(name, "not UTF-8", f"lone surrogates in {field}")
    for field in itertools.chain(kept, columns):
        if not is_unicode(field):
            return Rejected(name, "not UTF-8", f"lone surrogates in name {field!r}")
    return Pair(key, image, kept, columns)


def is_unicode(text: str) -> bool:
    """Returns whether UTF-8 can encode `text`. It cannot encode lone surrogates, which JSON and bad bytes may leave."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def parse_object(text: str) -> dict[str, Any]:
    """Returns a JSON object.

    Raises:
      ValueError: the text is no JSON, is nested too deeply, or is no object.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"is a {type(value).__name__}, not an object")
    return value
