"""What training reads: batches by global row, the same on any number of processes and threads.

The run is one endless sequence of rows: batch b has the rows b * batch_size + [0, batch_size). Which record a row is,
and what chance does to it (caption dropout, flip, crop), depends on (seed, row) alone, so a process computes the rows
it holds and no others, and resuming at a row costs the same anywhere. Grain shuffles, anew each epoch, and prefetches.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from ecdit.config import require
from ecdit.data import DataError
from ecdit.data.records import Records
from ecdit.data.tasks import DataConfig
from ecdit.data.text import EOS, fit

Example = dict[str, np.ndarray]
_PURPOSES = {"caption": 0, "flip": 1, "crop": 2}  # one random stream each: what one draws never moves another


def make_loader(
    config: DataConfig, seed: int, batch_size: int, start_row: int, rows: Sequence[int] | np.ndarray
) -> Iterator[Example]:
    """Endless batches of this process, from global row `start_row` on.

    Args:
      config: prepared data, and how to augment and prefetch it.
      seed: of the shuffle and the augmentation, uint32.
      batch_size: rows of the global batch.
      start_row: the first row to read, where a checkpoint stopped.
      rows: positions in the global batch that this process holds, in the order it wants them.

    Yields:
      image uint8[b, H, W, 3] or latents float16[b, h, w, c], tokens int32[b, caption_length], size_crop
      float32[b, 4] in px: the original's height and width, then top and left of the crop in the padded picture (0
      without crop_padding).

    Raises:
      DataError: not prepared, prepared with other settings, no records, or a start_row inside a batch.
      ConfigError: a seed that is no uint32.
    """
    positions = [int(row) for row in rows]
    if not positions or not all(0 <= position < batch_size for position in positions):
        raise ValueError(f"rows {positions} must be positions in a batch of {batch_size}, at least one")
    if start_row < 0 or start_row % batch_size:
        raise DataError(f"cannot start at row {start_row}: it is no multiple of the batch size {batch_size}")
    read_row = row_reader(config, seed, Records(config))

    def read(index: int) -> Example:
        batch, position = divmod(index, len(positions))
        return read_row(start_row + batch * batch_size + positions[position])

    ahead = max(config.prefetch * len(positions), config.num_threads) if config.num_threads else 0
    options = grain.ReadOptions(num_threads=config.num_threads, prefetch_buffer_size=ahead)
    return iter(grain.MapDataset.range(sys.maxsize).map(read).to_iter_dataset(options).batch(len(positions)))


def row_reader(config: DataConfig, seed: int, records: Sequence[dict[str, Any]]) -> Callable[[int], Example]:
    """The function from a global row to its example (a batch of `make_loader` without b); reads one record a row.

    Raises:
      ConfigError: a seed that is no uint32.
    """
    require(0 <= seed < 2**32, "seed", seed, "must be between 0 and 2**32 - 1")
    shuffled = grain.MapDataset.source(records).seed(seed).shuffle().repeat()

    def read(row: int) -> Example:
        record: Any = shuffled[row]
        tokens = record["tokens"]
        if _random(seed, row, "caption").random() < config.caption_dropout:
            tokens = fit([EOS], config.caption_length)
        if config.latent_channels:
            content, corner = {"latents": record["latents"]}, np.zeros(2)
        else:
            image = record["image"]
            if _random(seed, row, "flip").random() < config.flip_probability:
                image = image[:, ::-1]
            image, corner = _crop(image, config.crop_padding, _random(seed, row, "crop"))
            content = {"image": np.ascontiguousarray(image)}
        size_crop = np.concatenate([record["original_size"], corner]).astype(np.float32)
        return {**content, "tokens": tokens, "size_crop": size_crop}

    return read


def _crop(image: np.ndarray, padding: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """`image` padded with white by `padding` px and cropped back to its size; the crop's (top, left)."""
    top, left = random.integers(0, 2 * padding, size=2, endpoint=True)
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), constant_values=255)
    return padded[top : top + image.shape[0], left : left + image.shape[1]], np.array([top, left])


def _random(seed: int, row: int, purpose: str) -> np.random.Generator:
    # Philox counts in the lowest of its four counter words: the row is above, so streams never meet.
    return np.random.Generator(np.random.Philox(key=[seed, _PURPOSES[purpose]], counter=[0, row, 0, 0]))
