"""Reads training batches by global row, identically on any number of processes and threads.

A run is one endless sequence of rows, of which each batch takes the next. The record of a row and its augmentation
(caption, dropout, flip, crop) depend on (seed, row) alone, so a process computes only the rows that it holds, and a
resume costs the same at any row. Grain shuffles each epoch anew and prefetches.
"""

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import grain
import numpy as np
from grain.sources import RandomAccessDataSource

from ecdit.config import require
from ecdit.data import DataError
from ecdit.data.config import DataConfig, rate_of
from ecdit.data.generated import Split
from ecdit.data.mixing import Mixing, mixing
from ecdit.data.prepared import GeneratedRows, Prepared, Row, StoredRows, empty_caption, open_prepared
from ecdit.data.text_states import restore
from ecdit.data.tokenizer import Tokenizer, load_tokenizer

Example = dict[str, np.ndarray]
ReadRow = Callable[[int], Row]
# Each purpose has its own random stream, so that draws for one never change another.
_PURPOSES = {"caption": 0, "flip": 1, "crop": 2, "field": 3}


def make_loader(
    config: DataConfig, seed: int, batch_size: int, start_row: int, rows: Sequence[int] | np.ndarray
) -> Iterator[Example]:
    """Returns an endless iterator over this process's batches, from global row `start_row` on.

    Args:
      config: prepared data, and how to augment and prefetch it.
      seed: seed of shuffling and augmentation, uint32.
      batch_size: rows of the global batch.
      start_row: the first row of the first batch; on a resume, the first one after the checkpoint.
      rows: positions in the global batch that this process holds, in the order in which it reads them.

    Yields:
      image uint8[b, H, W, 3] or latents float16[b, h, w, 2c] (mean and log variance), tokens int32[b, L], where L is
      the caption length of one tokenizer or of both, size_crop float32[b, 4] in px: the original's height and width,
      then top and left of the crop, negative where `data.crop_padding` shows.

    Raises:
      DataError: the data is not prepared, prepared with other settings or incomplete.
      ConfigError: the seed is no uint32.
    """
    positions = [int(row) for row in rows]
    if not positions or not all(0 <= position < batch_size for position in positions):
        raise ValueError(f"rows {positions} must be positions in a batch of {batch_size}, at least one")
    if start_row < 0:
        raise ValueError(f"cannot start at row {start_row}: rows begin at 0")
    require(0 <= seed < 2**32, "seed", seed, "must be between 0 and 2**32 - 1")
    prepared = open_prepared(config)
    empty = empty_caption(prepared) if config.text_states else None
    read_row = augmented(config, seed, row_reader(prepared, seed), load_tokenizer(prepared.tokenizer), empty)

    def read(index: int) -> Example:
        batch, position = divmod(index, len(positions))
        return read_row(start_row + batch * batch_size + positions[position])

    ahead = max(config.prefetch * len(positions), config.num_threads) if config.num_threads else 0
    options = grain.ReadOptions(num_threads=config.num_threads, prefetch_buffer_size=ahead)
    return iter(grain.MapDataset.range(sys.maxsize).map(read).to_iter_dataset(options).batch(len(positions)))


def row_reader(prepared: Prepared, seed: int, split: Split = "train") -> ReadRow:
    """Returns the function from a global row to the stored or generated row; it reads one record per row.

    Raises:
      DataError: shards are missing, or a part has no records in this split.
    """
    readers = [part_reader(prepared, place, seed, split) for place in range(len(prepared.stored))]
    return mixed(mixing([Fraction(component.rate) for component in prepared.composition.components]), readers)


def part_reader(prepared: Prepared, place: int, seed: int, split: Split) -> ReadRow:
    """Returns the function from an endless index to a row of the mixture's part at `place`. Raises as `row_reader`."""
    component, part = prepared.composition.components[place], prepared.stored[place]
    # Parts of the same images, or of the same generator, would otherwise come in the same order, side by side.
    seed = seed if place == 0 else int.from_bytes(hashlib.sha256(f"{seed} {place}".encode()).digest()[:4])
    if part is None:
        return _seeded(GeneratedRows(component.task, prepared.config, split, prepared.tokenizer), seed)
    return shuffled(StoredRows(part, prepared.config, split), seed, f"{component.task}, {split}")


def shuffled(rows: RandomAccessDataSource[Row], seed: int, name: str) -> ReadRow:
    """Returns the function from an endless index to a row; each epoch has another order."""
    if not len(rows):
        raise DataError(f"{name}: there are no records")
    # The order is shuffled, not the rows: Grain spends 0.04 ms on each element of a source, a tenth of a JPEG's time.
    order = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat()

    def read(index: int) -> Row:
        place = order[index]
        assert place is not None  # Grain returns None only for filtered rows, and nothing filters
        return rows[int(place)]

    return read


def mixed(rates: Mixing, readers: Sequence[ReadRow]) -> ReadRow:
    """Returns the function from a global row to the row of the part that the mixture assigns to it."""

    def read(row: int) -> Row:
        part, index = rates.locate(row)
        return readers[part](index)

    return read


def _seeded(rows: GeneratedRows, seed: int) -> ReadRow:
    return lambda index: rows.row(seed, index)


def augmented(
    config: DataConfig, seed: int, read_row: ReadRow, tokenizer: Tokenizer, empty: Mapping[str, Any] | None = None
) -> Callable[[int], Example]:
    """Returns the function from a global row to its example, a batch of `make_loader` without b.

    `empty` are the stored states of the empty caption, where rows have states in place of tokens.
    """

    def text(stored: Any) -> Example:
        if empty is None:
            return {"tokens": tokenizer.fit(stored, config.caption_length)}
        row = restore(stored, config.caption_length)
        return {"text_states": row.states, "text_mask": row.mask, "text_pooled": row.pooled}

    def read(row: int) -> Example:
        found = read_row(row)
        if _random(seed, row, "caption").random() < config.caption_dropout:
            caption = text(tokenizer.empty if empty is None else empty)
        else:
            field = draw_field(config.captions, list(found.tokens), lambda: _random(seed, row, "field").random())
            caption = text(found.tokens[field])
        content, crop = found.content, found.crop
        if config.latent_channels:
            example = {"latents": content}
        else:
            if config.flip_probability and _random(seed, row, "flip").random() < config.flip_probability:
                content = content[:, ::-1]
            if config.crop_padding:
                content, corner = _crop(content, config.crop_padding, _random(seed, row, "crop"))
                crop = crop + corner
            example = {"image": np.ascontiguousarray(content)}
        size_crop = np.concatenate([found.original_size, crop]).astype(np.float32)
        return {**example, **caption, "size_crop": size_crop}

    return read


def draw_field(captions: Mapping[str, Any], fields: Sequence[str], chance: Callable[[], float]) -> str:
    """Returns one of a row's caption fields at the rates of `data.captions`; `chance` draws uniformly from [0, 1).

    Raises:
      DataError: none of the row's fields has a rate.
    """
    groups: dict[str, list[str]] = {}
    for field in sorted(fields):
        if (rate := rate_of(captions, field)) is not None:
            groups.setdefault(rate, []).append(field)
    if not groups:
        wanted = ", ".join(captions)
        raise DataError(f"data.captions has rates for {wanted}, and a record has captions {', '.join(fields)} alone")
    names = sorted(groups)
    if len(names) == 1 and len(groups[names[0]]) == 1:
        return groups[names[0]][0]  # without a draw, which takes as long as reading the record
    drawn = chance()
    ends = np.cumsum([captions[name] for name in names])
    place = min(int(np.searchsorted(ends, drawn * ends[-1], side="right")), len(names) - 1)
    rate, chosen = captions[names[place]], groups[names[place]]
    within = (drawn * ends[-1] - (ends[place] - rate)) / rate
    return chosen[min(max(int(within * len(chosen)), 0), len(chosen) - 1)]


def _crop(image: np.ndarray, padding: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pads `image` with `padding` px of white and crops it back at random.

    Returns:
      The crop, and its (top, left) in px of `image`. Both are 0 where it is the image itself, as in sampling and in the
      held-out loss; negative ones have white above or at the left.
    """
    top, left = random.integers(0, 2 * padding, size=2, endpoint=True)
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), constant_values=255)
    return padded[top : top + image.shape[0], left : left + image.shape[1]], np.array([top, left]) - padding


def _random(seed: int, row: int, purpose: str) -> np.random.Generator:
    # Philox counts in the lowest of its four counter words. The row is in a higher one, so streams never overlap.
    key, counter = np.array([seed, _PURPOSES[purpose]], np.uint64), np.array([0, row, 0, 0], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
