"""Prepares records once, part by part, in several processes.

Unfinished work lies in directories whose names begin with a dot; the same command, started again, continues it. Each
step ends in a rename, so that a directory with its final name is complete.
"""

import collections
import dataclasses
import functools
import gc
import json
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from ecdit.data import DataError
from ecdit.data.config import DataConfig
from ecdit.data.copies import count_copies
from ecdit.data.generated import GENERATED
from ecdit.data.locks import ends_with_its_parent, lock_of, locked, remove_scratch, scratch_of
from ecdit.data.manifest import (
    COMPOSITION,
    FORMAT,
    MANIFEST,
    QUARANTINE,
    SPLITS,
    Component,
    Composition,
    Manifest,
    by_number,
    read_json,
    read_records_manifest,
    settings_of,
    task_directory,
    to_json,
)
from ecdit.data.parts import HASHES, SUMMARY, PartSummary, part_name, read_summary, write_part
from ecdit.data.quarantine import merge
from ecdit.data.registry import Part, Task, find_parts, find_task, module_of, module_sha256
from ecdit.data.shards import Shard, check_shards, combined
from ecdit.data.shares import Share, beginning, check_count, forget_count, sharing
from ecdit.data.sources.protocol import Source
from ecdit.files import in_threads, replace_text, sync
from ecdit.progress import each

_SETTINGS = "settings.json"
Say = Callable[[str], None]


def prepare_records(config: DataConfig, workers: int, say: Say, same_source: bool = False) -> Composition:
    """Prepares the missing records of every part of `data.task`, and returns the parts with their rates.

    Args:
      config: the data's config.
      workers: processes that prepare.
      say: prints a line.
      same_source: accepts records that were prepared with another file of the user, whose source is said to be the
        same. composition.json then names the new file, so that later calls accept them too.

    Raises:
      DataError: there is no usable image, a package is missing, other data has the directory, or another file of the
        user prepared the records.
    """
    composition, module = _composition_path(config), module_sha256(config)
    if composition.exists():
        found = read_json(composition, Composition)
        stored = [component.task for component in found.components if not component.generated]
        if found.module != module:
            told = f"{config.module or 'data.module'} has changed since {composition} was written"
            say(f"{told}: its rates are read again")
        elif all((task_directory(config, task) / MANIFEST).exists() for task in stored):
            for task in stored:
                read_records_manifest(config, task)
            return found
        else:  # a part was deleted, to be prepared again
            same_source = True  # of the parts that are left: composition.json names this file
    components = tuple(_component(config, part, workers, say, same_source) for part in find_parts(config))
    made = Composition(FORMAT, components, module)
    composition.parent.mkdir(parents=True, exist_ok=True)
    replace_text(composition, to_json(made))
    return made


def prepare_share(config: DataConfig, share: Share, workers: int, say: Say) -> None:
    """Prepares a share of the missing records of every part of `data.task`, and joins nothing.

    Several shares may run at once. `prepare_records` then finds their parts done.

    Raises:
      DataError: as `prepare_records`; or shares of another number have begun.
    """
    stored = [part.task for part in find_parts(config) if part.task not in GENERATED]
    if not stored:
        raise DataError(f"--share={share}: {config.task} is made when it is read, and has no records to prepare")
    for task in stored:
        _share_of_records(config, task, share, workers, say)


def check_sources(config: DataConfig, say: Say, same_source: bool) -> None:
    """Compares the finished records of every part of `data.task` with what their sources have now.

    It only says so where the source, or a package that reads it, is not at hand. `same_source` is that of
    `prepare_records`.

    Raises:
      DataError: a source lists other files, or files of other sizes or times, than its records were read from.
    """
    if not _composition_path(config).exists():
        return
    for component in read_composition(config).components:
        directory = task_directory(config, component.task)
        if component.generated or not _is_prepared(directory):
            continue
        manifest = read_records_manifest(config, component.task)
        if not manifest.source:  # prepared before it was kept
            continue
        try:
            found = find_task(config, component.task)
            now = _source_of(found, in_threads(found.stamp, range(len(found.shards))))
        except (DataError, OSError) as error:
            say(f"{directory} is prepared, and its source cannot be compared with it: {error}")
            continue
        if now == manifest.source:
            continue
        told = f"the source of {directory} has changed since it was prepared, or its files have other times"
        if not same_source:
            raise DataError(
                f"{told}: delete {directory} and prepare again, or keep its records: "
                "python -m ecdit.prepare --config=... --same_source"
            )
        say(f"{told}: its records are kept")
        replace_text(directory / MANIFEST, to_json(dataclasses.replace(manifest, source=now)))


def read_composition(config: DataConfig) -> Composition:
    """Returns the parts that a run reads. Raises DataError if they are not prepared."""
    return read_json(_composition_path(config), Composition)


def _composition_path(config: DataConfig) -> Path:
    return task_directory(config) / COMPOSITION


def _component(config: DataConfig, part: Part, workers: int, say: Say, same_source: bool) -> Component:
    if part.task in GENERATED:
        return Component(part.task, str(part.rate), GENERATED[part.task].fingerprint(config), True)
    manifest = _records(config, part.task, workers, say)
    wanted = module_of(config, part.task)
    if wanted and manifest.module != wanted:
        directory = task_directory(config, part.task)
        told = f"{directory} was prepared with another {config.module}: delete it if its source has changed"
        if not same_source:
            raise DataError(f"{told}; if not, run python -m ecdit.prepare --config=... --same_source")
        say(told)
    return Component(part.task, str(part.rate), manifest.fingerprint, False)


def _records(config: DataConfig, task: str, workers: int, say: Say) -> Manifest:
    """Returns the manifest of a task's records and prepares them if they are missing."""
    target = task_directory(config, task)
    if _is_prepared(target):
        return read_records_manifest(config, task)
    found = find_task(config, task)
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock_of(target), say):
        if (target / MANIFEST).exists():  # another process was first
            return read_records_manifest(config, task)
        working = _working_directory(config, task, found)
        if not (working / MANIFEST).exists():
            say(f"preparing {target}, which is done once")
            _write_parts(config, found, working, workers, range(len(found.shards)))
            summaries = [_summary_of(working / part_name(index)) for index in range(len(found.shards))]
            manifest = _joined(config, found, working, summaries)
            if manifest.num_records == 0:
                shutil.rmtree(working)
                raise DataError(_nothing_left(task, manifest))
            merge([working / part_name(index) / QUARANTINE for index in range(len(summaries))], working / QUARANTINE)
            replace_text(working / MANIFEST, to_json(manifest))
        for index in range(len(found.shards)):  # training does not read these
            shutil.rmtree(scratch_of(working / part_name(index)), ignore_errors=True)  # of a share that was killed
            for name in (HASHES, SUMMARY, QUARANTINE):
                (working / part_name(index) / name).unlink(missing_ok=True)
        (working / _SETTINGS).unlink(missing_ok=True)
        forget_count(working)
        remove_scratch(working)
        working.rename(target)
        sync(target.parent)
        manifest = read_records_manifest(config, task)
    say(f"prepared {target}: {summary(manifest)}")
    return manifest


def _share_of_records(config: DataConfig, task: str, share: Share, workers: int, say: Say) -> None:
    """Prepares a share of a task's parts, unless the task is prepared."""
    target = task_directory(config, task)
    if _is_prepared(target):
        read_records_manifest(config, task)
        say(f"{target} is prepared, with its parts joined")
        return
    found, lock = find_task(config, task), lock_of(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with sharing(lock, share, say):
        with beginning(lock, say):
            joined = (target / MANIFEST).exists()  # by another process, while this one waited
            working = target if joined else _working_directory(config, task, found)
            if not (working / MANIFEST).exists():
                check_count(working, share)
        mine = [index for index in range(len(found.shards)) if index in share]
        if not (working / MANIFEST).exists():
            _write_parts(config, found, working, workers, mine)
        left = sum(not (working / part_name(index)).exists() for index in range(len(found.shards)))
    say(
        f"share {share} of {target}: its {len(mine)} parts are done, and {left} of all {len(found.shards)} are left; "
        "the command without --share prepares what is left when shares have ended, and joins the parts"
    )


def _is_prepared(target: Path) -> bool:
    """Returns whether a task's records are prepared. Raises DataError if something else has their directory."""
    exists = target.exists()  # first: another process may rename it into place, with its manifest, between these lines
    prepared = (target / MANIFEST).exists()
    if exists and not prepared:
        raise DataError(f"{target} is in the way: it is no prepared data; move it, or set data.directory")
    return prepared


def _nothing_left(task: str, manifest: Manifest) -> str:
    reasons = ", ".join(f"{count} for {reason}" for reason, count in manifest.rejected.items())
    return f"the task {task} gives no record" + (f": all pairs are left out, {reasons}" if reasons else "")


def _working_directory(config: DataConfig, task: str, found: Task) -> Path:
    """Returns the directory of an interrupted preparation, or a new one."""
    working = task_directory(config, task).with_name(f".{task}.preparing")
    settings, path = _settings(config, found), working / _SETTINGS
    if (working / MANIFEST).exists():  # a preparation was killed just before the rename
        return working
    if path.exists() and path.read_text() != settings:
        raise DataError(
            f"{working} was begun with other settings or other input, or another data.module: delete it and start again"
        )
    working.mkdir(exist_ok=True)
    replace_text(path, settings)
    return working


def _settings(config: DataConfig, task: Task) -> str:
    """Returns what the records of every part depend on besides the part's own files, as JSON."""
    decides = {"shards": len(task.shards), "module": task.module, "keep": task.keep}
    return json.dumps({**settings_of(config, task.name), **decides}, indent=1)


def _write_parts(config: DataConfig, task: Task, working: Path, workers: int, parts: Sequence[int]) -> None:
    """Writes those of `parts` that are missing."""
    places = {index: working / part_name(index) for index in parts}
    made_with = combined([_settings(config, task)])
    left = []
    for index, place in places.items():
        done = read_summary(place)
        if done is not None and done.stamp != task.stamp(index):
            raise DataError(f"{task.shards[index]} has changed since {working} was begun: delete it and start again")
        if done is not None and done.made_with != made_with:
            raise DataError(
                f"{place} was prepared with other settings or another data.module, on another disk perhaps: delete it "
                "and start again"
            )
        if done is None:
            left.append(index)
    begun = len(places) - len(left)
    parts_done = functools.partial(each, what="preparing", units="parts", total=len(places), begun=begun)
    if min(workers, len(left)) <= 1:
        for index in parts_done(left):
            pairs = each(task.read(index), "reading", "pairs", shown=len(places) == 1)
            write_part(config, pairs, task.shards[index], task.stamp(index), places[index], made_with)
    else:
        context = multiprocessing.get_context("spawn")
        given = os.getpid(), task.portable_source()
        with ProcessPoolExecutor(min(workers, len(left)), context, _begin_worker, given) as pool:
            jobs = [(index, task.shards[index], places[index], made_with) for index in left]
            futures = [pool.submit(_write_one, config, task.name, *job) for job in jobs]
            try:
                for future in parts_done(as_completed(futures)):
                    future.result()
            except BrokenProcessPool:
                raise DataError(
                    "a process that prepares was killed, as the kernel does where memory is short; the same command "
                    "goes on, and with fewer --workers takes less"
                ) from None
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


_SOURCE: list[Source | None] = []  # of a worker process, which gets it once: it may list a hundred thousand files


def _begin_worker(parent: int, source: Source | None) -> None:
    ends_with_its_parent(parent)
    _SOURCE.append(source)
    gc.freeze()  # so that garbage collection does not look through all objects of the libraries again and again


def _write_one(config: DataConfig, task: str, index: int, shard: str, place: Path, made_with: str) -> None:
    """Writes a part in a worker process. Loads seqio only if needed, because that takes ten seconds."""
    if (source := _SOURCE[0]) is not None:
        write_part(config, source.read(shard), shard, source.stamp(shard), place, made_with)
        return
    found = find_task(config, task)
    if combined([_settings(config, found)]) != made_with:
        raise DataError(f"data.module = {config.module!r} was edited while its data was prepared: start again")
    write_part(config, found.read(index), shard, found.stamp(index), place, made_with)


def _summary_of(place: Path) -> PartSummary:
    found = read_summary(place)
    assert found is not None, place
    return found


def _joined(config: DataConfig, task: Task, working: Path, summaries: Sequence[PartSummary]) -> Manifest:
    """Returns the manifest that joins all parts."""
    rejected, fields, characters = Counter[str](), Counter[str](), collections.defaultdict(Counter)
    for done in summaries:
        rejected.update(done.rejected)
        fields.update(done.caption_fields)
        for field, counts in done.caption_characters.items():
            characters[field].update(counts)
    train, held_out = (tuple(shard for done in summaries for shard in _shards_of(done, split)) for split in SPLITS)
    check_shards(working, (*train, *held_out))
    trained = [sum(shard.records for shard in _shards_of(done, "train")) for done in summaries]
    copies = count_copies([(working / part_name(index) / HASHES, count) for index, count in enumerate(trained)])
    return Manifest(
        format=FORMAT,
        settings=settings_of(config, task.name),
        module=task.module,
        num_records=sum(shard.records for shard in train),
        num_held_out=sum(shard.records for shard in held_out),
        train=train,
        held_out=held_out,
        fingerprint=combined(shard.content for shard in (*train, *held_out)),
        rejected=dict(sorted(rejected.items())),
        caption_characters={field: by_number(counts) for field, counts in sorted(characters.items())},
        caption_fields=dict(sorted(fields.items())),
        identical_images=copies.images,
        identical_captions=copies.captions,
        held_out_in_train=copies.held_out_in_train,
        counted=copies.counted,
        attribution=task.attribution,
        source=_source_of(task, [done.stamp for done in summaries]),
    )


def _source_of(task: Task, stamps: Sequence[str]) -> str:
    """Returns the sha256 of what a task is read from: its parts with their stamps, and the file of its predicate."""
    return combined([task.keep, *(f"{name} {stamp}" for name, stamp in zip(task.shards, stamps, strict=True))])


def _shards_of(done: PartSummary, split: str) -> list[Shard]:
    return [shard for shard in done.shards if Path(shard.name).stem == split]


def summary(manifest: Manifest) -> str:
    """Returns a line that summarizes prepared records."""
    left_out = ", ".join(f"{count} for {reason}" for reason, count in manifest.rejected.items())
    shared = (
        f" ({manifest.held_out_in_train} of them with an image that training reads)"
        if manifest.held_out_in_train
        else ""
    )
    return (
        f"{manifest.num_records} records of {manifest.settings['image_size']} px, "
        f"{manifest.num_held_out} held out{shared}, "
        f"{sum(manifest.rejected.values())} pairs left out" + (f" ({left_out}; see {QUARANTINE})" if left_out else "")
    )
