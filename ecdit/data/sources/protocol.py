"""What a source gives to the preparation of data: parts, and pairs of image and captions in each.

A source is a frozen dataclass that can be pickled, because several processes read its parts, and its parts have names
that last, because an interrupted preparation goes on with them.
"""

import dataclasses
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
    columns: Columns  # other values, to filter by: aesthetic, punsafe ...
    split: Literal["train", "held_out"] | None = None  # None: by a hash of the key (`ecdit.data.splits`)


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A record that is left out, or bytes in which records may have been lost."""

    name: str  # where: "00012.tar:000120034.jpg", "pairs.csv:row 17"
    reason: str  # of ecdit.data.reasons.REASONS
    detail: str

    def __post_init__(self):
        entry(self.reason)


Keep = Callable[[Pair], bool]


class Source(Protocol):
    """Where pairs come from."""

    @property
    def attribution(self) -> str:
        """Who made the data and under which licence; it goes into the manifest."""
        ...

    def parts(self) -> tuple[str, ...]:
        """Returns the names of the parts in reading order; each can be read on its own.

        Raises:
          DataError: there is nothing to read.
        """
        ...

    def read(self, part: str) -> Iterator[Pair | Rejected]:
        """Yields the records of a part, always in the same order; a damaged one is a Rejected, not an error.

        Raises:
          DataError: the part cannot be read at all, or the source's predicate raised.
        """
        ...

    def stamp(self, part: str) -> str:
        """Returns a string that changes with the files behind a part, by their names, sizes and times."""
        ...


def judged(pair: Pair, name: str, keep: Keep | None) -> Pair | Rejected:
    """Returns `pair`, or a Rejected called `name` where the user's predicate `keep` refuses it.

    Raises:
      DataError: the predicate raised.
    """
    if keep is None:
        return pair
    try:
        kept = keep(pair)
    except Exception as error:  # the user's code: whatever it raises is for the user to read
        raise DataError(f"keep raised {type(error).__name__} for key {pair.key!r} ({name}): {error}") from error
    return pair if kept else Rejected(name, "predicate", "keep returned false")


def split_fields(fields: Mapping[str, Any], captions: Callable[[str], bool]) -> tuple[Texts, Columns]:
    """Splits a record's fields into captions and columns.

    Args:
      fields: the record.
      captions: whether a field of that name, if it is a string or a list of strings, is a caption.

    Returns:
      Captions, stripped of white space around them, with the empty ones; and the other fields that are scalars.
    """
    texts, columns = {}, {}
    for name, value in fields.items():
        if captions(name) and isinstance(value, str):
            texts[name] = value.strip()
        elif captions(name) and isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            texts |= {f"{name}.{place}": item.strip() for place, item in enumerate(value)}
        elif value is None or isinstance(value, int | float | str | bool):
            columns[name] = value
    return texts, columns


def with_captions(key: str, image: bytes | np.ndarray, texts: Texts, columns: Columns, name: str) -> Pair | Rejected:
    """Returns the pair with those of its captions that are not empty, or a Rejected called `name` if none is left."""
    kept = {field: text for field, text in texts.items() if text}
    if not kept:
        reason = "empty caption" if texts else "no caption"
        return Rejected(name, reason, f"fields: {', '.join([*texts, *columns]) or 'none'}")
    for field, text in [*kept.items(), *columns.items(), *((f"name {field!r}", field) for field in [*kept, *columns])]:
        if isinstance(text, str) and not is_unicode(text):
            return Rejected(name, "not UTF-8", f"lone surrogates in {field}")
    return Pair(key, image, kept, columns)


def is_unicode(text: str) -> bool:
    """Returns whether UTF-8 can write `text`: JSON and undecodable bytes leave lone surrogates, which it cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_object(text: str) -> dict[str, Any]:
    """Returns a JSON object.

    Raises:
      ValueError: the text is no JSON, is nested too deeply, or is another value than an object.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"is a {type(value).__name__}, not an object")
    return value
