"""Prepares some pairs of each part in memory to show rejections, speed and sizes. Writes no records."""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ecdit.data import DataError
from ecdit.data.config import DataConfig
from ecdit.data.fitting import record_of
from ecdit.data.generated import GENERATED
from ecdit.data.images import decode_stored
from ecdit.data.record import encode_record
from ecdit.data.registry import Task, find_parts, find_task
from ecdit.data.sources.protocol import Pair, Rejected

_DRAWN = 10
Draw = Callable[[np.ndarray, Sequence[str], Path], None]


def first_look(config: DataConfig, limit: int, draw: Draw, say: Callable[[str], None] = print) -> None:
    """Prepares `limit` pairs of every part in memory, prints rejections, speed and record size, and draws ten images.

    Args:
      config: the data's config.
      limit: pairs read from each part.
      draw: writes a grid of images with their captions to a path.
      say: prints a line.

    Raises:
      DataError: no pair of a part can be used.
    """
    for part in find_parts(config):
        if part.task in GENERATED:
            say(f"{part.task} is generated when it is read")
            continue
        task = find_task(config, part.task)
        begun, kept, rejected, size = time.monotonic(), [], [], 0
        for shard, pair in itertools.islice(_pairs(task), limit):
            record = pair if isinstance(pair, Rejected) else record_of(pair, config, shard)
            if isinstance(record, Rejected):
                rejected.append(record)
                continue
            size += len(encode_record(record))
            kept.append(record if len(kept) < _DRAWN else None)
        seconds = time.monotonic() - begun
        if not kept:
            first = (
                f": the first is {rejected[0].name!r}, {rejected[0].reason}, {rejected[0].detail!r}" if rejected else ""
            )
            raise DataError(f"the task {part.task} gives no record of {len(rejected)} pairs{first}")
        seen = len(kept) + len(rejected)
        say(
            f"{part.task}: {len(kept)} of {seen} pairs in {len(task.shards)} shards are kept, {seen / seconds:.0f} a "
            f"second on one core, {size / len(kept):.0f} bytes a record"
        )
        for reason, count in Counter(one.reason for one in rejected).most_common():
            example = next(one for one in rejected if one.reason == reason)
            say(f"  {count} left out for {reason}, such as {example.name!r}: {example.detail!r}")
        drawn, path = [record for record in kept if record], Path(f"first_look_{part.task}.png")
        images = np.stack([decode_stored(record.image) for record in drawn])
        draw(images, [next(iter(record.captions.values())) for record in drawn], path)
        say(f"  {len(drawn)} of them are drawn in {path}")


def _pairs(task: Task) -> Iterator[tuple[str, Pair | Rejected]]:
    return ((shard, pair) for index, shard in enumerate(task.shards) for pair in task.read(index, at_once=True))
