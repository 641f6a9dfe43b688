"""Makes records of pairs: checks them, and decodes, resizes and encodes their images."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, TypeVar

import numpy as np

from ecdit.data import images
from ecdit.data.config import DataConfig
from ecdit.data.filters import Filters, caption_reason, column_reason, size_reason
from ecdit.data.images import ImageRejected
from ecdit.data.record import Record
from ecdit.data.sources.protocol import Pair, Rejected

_RUN_PAIRS, _RUN_IMAGES, _RUN_BYTES = 256, 64, 4 << 20  # larger runs are hardly faster

Item = TypeVar("Item")


class _Decoded(NamedTuple):
    """A pair that has passed the filters, with its pixels and its captions that are kept."""

    pair: Pair
    image: images.Pixels
    captions: dict[str, str]


class _Fitted(NamedTuple):
    """The same with its image resized and cropped, and without the pixels that it had."""

    pair: Pair
    captions: dict[str, str]
    original_size: np.ndarray
    square: images.Pixels
    crop: np.ndarray


def records_of(
    pairs: Iterable[Pair | Rejected], config: DataConfig, part: str
) -> Iterator[tuple[Pair, Record] | Rejected]:
    """Yields the pairs with their records, or why they are rejected, in order.

    Each step takes a run of pairs at a time: reading, decoding, resizing, encoding, and what the caller does. If each
    pair went through all steps alone, those besides the image would take two to three times as long, because the code
    of a decoder and an encoder pushes theirs out of the processor's caches. A run ends at 256 pairs or about 4 MiB, and
    at 64 images or 4 MiB of pixels, before or after resizing.
    """
    square = 3 * config.image_size**2  # bytes
    for run in _runs(pairs, _RUN_PAIRS, _pair_bytes):
        decoded = (pair if isinstance(pair, Rejected) else _decode(pair, config, part) for pair in run)
        for few in _runs(decoded, _RUN_IMAGES, lambda one: max(one.image.nbytes, square)):
            fitted = [one if isinstance(one, Rejected) else _fit(one, config, part) for one in few]
            few.clear()  # frees the pixels before the next ones are decoded
            yield from [one if isinstance(one, Rejected) else _encode(one, config) for one in fitted]
        run.clear()  # frees its pairs before the next ones are read


def record_of(pair: Pair, config: DataConfig, part: str) -> Record | Rejected:
    """Returns the record of a pair, or why it is rejected."""
    (made,) = records_of([pair], config, part)
    return made if isinstance(made, Rejected) else made[1]


def _runs(
    items: Iterable[Item | Rejected], longest: int, size: Callable[[Item], int]
) -> Iterator[list[Item | Rejected]]:
    """Yields the items in lists of at most `longest`; a list ends when the sizes in it reach `_RUN_BYTES`."""
    run, total = [], 0
    for item in items:
        run.append(item)
        total += len(item.detail) if isinstance(item, Rejected) else size(item)
        del item  # so that it is freed with its run, before the next one is read
        if len(run) == longest or total >= _RUN_BYTES:
            yield run
            run, total = [], 0
    if run:
        yield run


def _pair_bytes(pair: Pair) -> int:
    """Returns about how many bytes a pair holds; one with an array ends its run, as a source may fill it anew."""
    if not isinstance(pair.image, bytes):
        return _RUN_BYTES
    texts = (*pair.captions.values(), *pair.columns.values())
    return len(pair.image) + sum(len(text) for text in texts if isinstance(text, str))


def _decode(pair: Pair, config: DataConfig, part: str) -> _Decoded | Rejected:
    """Applies the filters and decodes the image."""
    name, prepare = _name(pair, part), config.prepare
    if reason := column_reason(prepare.filters, pair.columns):
        return Rejected(name, reason, "")
    captions, reason = _kept_captions(pair.captions, prepare.filters)
    if reason:
        return Rejected(name, reason, ", ".join(pair.captions))
    try:
        if isinstance(pair.image, bytes):
            image = images.decode(pair.image, prepare.background, prepare.max_pixels)
        else:
            image = pair.image
        if (image.dtype, image.ndim, image.shape[2:]) != (np.uint8, 3, (3,)):
            raise ImageRejected("colour mode", f"{image.dtype}{list(image.shape)}, not uint8[height, width, 3]")
    except ImageRejected as error:
        return Rejected(name, error.reason, error.detail)
    if reason := size_reason(prepare.filters, image.shape[0], image.shape[1]):
        return Rejected(name, reason, f"{image.shape[1]} x {image.shape[0]} px")
    return _Decoded(pair, image, captions)


def _fit(decoded: _Decoded, config: DataConfig, part: str) -> _Fitted | Rejected:
    try:
        square, crop = images.fit_square(decoded.image, config.image_size)
    except ImageRejected as error:
        return Rejected(_name(decoded.pair, part), error.reason, error.detail)
    size = np.array(decoded.image.shape[:2], np.int32)
    return _Fitted(decoded.pair, decoded.captions, size, square, crop)


def _encode(fitted: _Fitted, config: DataConfig) -> tuple[Pair, Record]:
    pair, captions, size, square, crop = fitted
    encoded = images.encode(square, config.prepare.image_format, config.prepare.quality)
    return pair, Record(pair.key, encoded, size, crop, captions)


def _name(pair: Pair, part: str) -> str:
    return f"{part}:{pair.key}"


def _kept_captions(captions: Mapping[str, str], filters: Filters) -> tuple[dict[str, str], str | None]:
    """Returns the captions that pass the filters; if none does, also the reason for the first one."""
    # A source of the user may not have come through `with_captions`, which drops blank ones.
    reasons = {f: caption_reason(filters, text) if text.strip() else "empty caption" for f, text in captions.items()}
    kept = {field: text for field, text in captions.items() if not reasons[field]}
    return kept, None if kept else next(iter(reasons.values()), "no caption")
