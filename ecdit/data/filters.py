"""Filters records during preparation by image size, caption length and numeric columns.

The functions return a reason of `ecdit.data.reasons`, or None if they accept the value.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ecdit.config import require
from ecdit.data import reasons


@dataclasses.dataclass(frozen=True)
class Filters:
    """Inclusive limits; 0 is no limit."""

    min_side: int  # px of the shorter side before resizing
    max_aspect: float  # longer side / shorter side
    min_caption: int  # characters
    max_caption: int  # characters
    columns: Mapping[str, Any]  # ranges by column: {"aesthetic": (5.0, 10.0)}; records without the number are rejected

    def __post_init__(self):
        for key in ("min_side", "min_caption", "max_caption"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "must be 0 (no limit) or more")
        aspect = self.max_aspect
        require(aspect == 0 or aspect >= 1, "max_aspect", aspect, "must be 0 (no limit) or at least 1")
        longest = self.max_caption
        require(
            longest == 0 or longest >= self.min_caption,
            "max_caption",
            longest,
            f"must be 0 (no limit) or at least min_caption = {self.min_caption}",
        )
        for name, limits in self.columns.items():
            allowed = "must be two numbers, lowest and highest"
            require(isinstance(limits, tuple | list) and len(limits) == 2, f"columns.{name}", limits, allowed)
            require(all(map(_is_number, limits)), f"columns.{name}", limits, allowed)
            require(limits[0] <= limits[1], f"columns.{name}", limits, f"{allowed}, in this order")


def size_reason(filters: Filters, height: int, width: int) -> str | None:
    """Returns why an image of this size (px, before resizing) is rejected, or None."""
    shorter, longer = sorted((height, width))
    if shorter < filters.min_side:
        return "too small"
    if filters.max_aspect and longer > filters.max_aspect * shorter:
        return "aspect ratio"
    return None


def caption_reason(filters: Filters, caption: str) -> str | None:
    """Returns why a caption is rejected, or None."""
    if len(caption) < filters.min_caption:
        return "caption too short"
    if filters.max_caption and len(caption) > filters.max_caption:
        return "caption too long"
    return None


def column_reason(filters: Filters, columns: Mapping[str, Any]) -> str | None:
    """Returns why a record with these columns is rejected, or None. Checks columns in the order of the config."""
    for name, (lowest, highest) in filters.columns.items():
        value = columns.get(name)
        if not _is_number(value):
            return reasons.no_column(name)
        if not lowest <= value <= highest:  # written so that NaN is out of range
            return reasons.column_out_of_range(name)
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
