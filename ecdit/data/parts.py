"""Turns one part of a source into shards of records. Preparation does this in any process and any order."""

import collections
import dataclasses
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ecdit.config import to_dict
from ecdit.data import DataError
from ecdit.data.config import DataConfig, field_group
from ecdit.data.fitting import records_of
from ecdit.data.locks import scratch_of
from ecdit.data.manifest import QUARANTINE, SPLITS
from ecdit.data.quarantine import Quarantine
from ecdit.data.record import encode_record
from ecdit.data.shards import Shard, ShardWriter
from ecdit.data.sources.protocol import Pair, Rejected
from ecdit.data.splits import split_of
from ecdit.files import sync, sync_tree

# The hashes of images and captions of a part's records, those for training first, are only read to count copies.
SUMMARY, HASHES = "part.json", "hashes.npy"


@dataclasses.dataclass(frozen=True)
class PartSummary:
    """Describes what preparation wrote for one part."""

    stamp: str  # the source's stamp of the part
    made_with: str  # sha256 of the settings and of the user's files that the part depends on
    shards: tuple[Shard, ...]  # <part>/train.array_record and <part>/held_out.array_record, unless empty
    rejected: dict[str, int]  # counts by reason
    caption_characters: dict[str, dict[str, int]]  # as in `manifest.Manifest`
    caption_fields: dict[str, int]


def write_part(
    config: DataConfig, pairs: Iterable[Pair | Rejected], part: str, stamp: str, place: Path, made_with: str = ""
) -> None:
    """Writes a part's shards and summary to the directory `place`, which appears only when it is complete."""
    scratch = scratch_of(place)
    shutil.rmtree(scratch, ignore_errors=True)  # left by a killed process
    scratch.mkdir(parents=True)
    fields, hashes = Counter[tuple[str, ...]](), {split: [] for split in SPLITS}
    lengths: dict[str, Counter[int]] = collections.defaultdict(Counter)
    writers = {split: ShardWriter(scratch / f"{split}.array_record") for split in SPLITS}
    with Quarantine(scratch / QUARANTINE) as quarantine:
        for made in records_of(pairs, config, part):
            if isinstance(made, Rejected):
                quarantine.add(made)
                continue
            pair, record = made
            split = pair.split or split_of(record.key, config.prepare)
            writers[split].write(encode_record(record))
            hashes[split].append((_hash(record.image), _hash(repr(sorted(record.captions.items())).encode())))
            fields[tuple(record.captions)] += 1
            for field, text in record.captions.items():
                lengths[field][histogram_bin(len(text))] += 1
    summary = PartSummary(
        stamp=stamp,
        made_with=made_with,
        rejected=dict(sorted(quarantine.counts.items())),
        caption_characters={
            field: {str(length): count for length, count in counts.items()} for field, counts in sorted(lengths.items())
        },
        caption_fields=_by_groups(fields),
        shards=tuple(_closed(writer, place.name) for writer in writers.values() if writer.count),
    )
    for writer in writers.values():
        if not writer.count:
            writer.discard()
    np.save(scratch / HASHES, np.array([row for rows in hashes.values() for row in rows], np.uint64).reshape(-1, 2))
    (scratch / SUMMARY).write_text(json.dumps(to_dict(summary)) + "\n")
    sync_tree(scratch)  # otherwise a power failure could leave empty files in a part that counts as complete
    scratch.rename(place)
    sync(place.parent)


def _by_groups(fields: Mapping[tuple[str, ...], int]) -> dict[str, int]:
    """Returns counts by a JSON list of fields, with `captions` in place of `captions.0` and so on."""
    counts = Counter[str]()
    for names, count in fields.items():
        counts[json.dumps(sorted({field_group(name) for name in names}))] += count
    return dict(sorted(counts.items()))


def _closed(writer: ShardWriter, part: str) -> Shard:
    shard = writer.close()
    return dataclasses.replace(shard, name=f"{part}/{shard.name}")


def read_summary(place: Path) -> PartSummary | None:
    """Returns the summary of a part, or None if the part is incomplete.

    Raises:
      DataError: it is damaged, or another version of this package wrote it.
    """
    try:
        stored: dict[str, Any] = json.loads((place / SUMMARY).read_text())
        shards = tuple(Shard(**shard) for shard in stored.pop("shards"))
        return PartSummary(shards=shards, **stored)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{place / SUMMARY} is damaged or of another version ({error}): delete {place} and prepare again"
        ) from None


def part_name(index: int) -> str:
    """Returns the directory name of a part."""
    return f"{index:06d}"


def histogram_bin(length: int) -> int:
    """Returns the lower end of a length's bin: 0, 1, 2, 4, 8 and so on."""
    return 1 << length.bit_length() >> 1


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8])
