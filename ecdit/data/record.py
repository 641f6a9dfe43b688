"""Encodes records and values of columns as msgpack."""

import dataclasses
from typing import Any

import numpy as np
from flax import serialization
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class Record:
    """An image with its captions, as prepared data stores it."""

    key: str
    image: bytes  # PNG, WebP or JPEG
    original_size: Int[np.ndarray, "2"]  # height and width in px, before it was resized
    crop: Int[np.ndarray, "2"]  # top and left in px of the resized image
    captions: dict[str, str]  # by field


def pack(values: dict[str, Any]) -> bytes:
    """Returns a map with string keys as msgpack: numbers, text, bytes, maps and numpy arrays."""
    return serialization.msgpack_serialize(values)


def unpack(data: bytes) -> dict[str, Any]:
    """Returns the map that `pack` encoded, with read-only arrays. Raises ValueError for other data."""
    values = serialization.msgpack_restore(data)
    if not isinstance(values, dict):
        raise ValueError("a record is no map")
    return values


def encode_record(record: Record) -> bytes:
    """Returns a record as msgpack."""
    return pack(
        {
            "key": record.key,
            "image": record.image,
            "original_size": record.original_size.astype(np.int32),
            "crop": record.crop.astype(np.int32),
            "captions": record.captions,
        }
    )


def decode_record(data: bytes) -> Record:
    """Returns a stored record. Raises ValueError if the data is no record."""
    try:
        return Record(**unpack(data))
    except TypeError as error:
        raise ValueError(f"a record has other fields: {error}") from None
