"""Finds the task or mixture that a config names, in the package or in the user's own file."""

import dataclasses
import functools
import hashlib
import inspect
import json
import pickle
import sys
import types
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ecdit.config import require
from ecdit.data import DataError
from ecdit.data.config import DataConfig
from ecdit.data.generated import GENERATED
from ecdit.data.mixing import MAX_PERIOD, mixing
from ecdit.data.sources.protocol import Pair, Rejected, Source, with_captions
from ecdit.data.tensorflow import preparing

if TYPE_CHECKING:
    import seqio


_MODULE = "ecdit_tasks_"  # begins the module names of users' files


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a mixture; a single task has one."""

    task: str
    rate: Fraction


def module_sha256(config: DataConfig) -> str:
    """Returns the sha256 of the user's file, or "" without one.

    Raises:
      ConfigError: the file does not exist.
    """
    if not config.module:
        return ""
    path = Path(config.module)
    require(path.is_file(), "data.module", config.module, "there is no such file")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def module_of(config: DataConfig, task: str) -> str:
    """Returns the sha256 of the user's file that registers a task, or "" for a task of the package.

    Raises:
      ConfigError: the file does not exist.
    """
    if not config.module:
        return ""
    with preparing():
        from ecdit.data.tasks import PACKAGED
    return "" if task in PACKAGED else module_sha256(config)


def find_parts(config: DataConfig) -> tuple[Part, ...]:
    """Returns the parts of `data.task` with their rates. Imports TensorFlow unless the task is generated.

    Raises:
      DataError: the task is not registered, the user's file fails, or a package is missing.
    """
    if config.task in GENERATED and not config.module:
        return (Part(config.task, Fraction(1)),)
    with preparing():
        import seqio
    _register(config)
    if config.task in seqio.TaskRegistry.names():
        return (Part(config.task, Fraction(1)),)
    if config.task not in seqio.MixtureRegistry.names():
        where = config.module or "ecdit/data/tasks.py (data.module names a file of your own)"
        known = sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
        raise DataError(f"data.task = {config.task!r} is not registered in {where}; known: {', '.join(known)}")
    mixture = seqio.MixtureRegistry.get(config.task)
    parts = tuple(Part(task.name, _as_written(mixture.get_rate(task))) for task in mixture.tasks)
    mixing([part.rate for part in parts])  # refuses rates before anything is prepared
    return parts


def _as_written(rate: float) -> Fraction:
    """Returns a rate as its user means it: 0.3 is 3/10, and half of a third 1/6, not the nearest binary fractions."""
    short = Fraction(rate).limit_denominator(MAX_PERIOD)
    return short if float(short) == rate else Fraction(str(rate))


@dataclasses.dataclass(frozen=True)
class Task:
    """A registered task, which preparation reads shard by shard."""

    name: str
    attribution: str
    shards: tuple[str, ...]  # names in reading order
    module: str  # sha256 of the user's file that registered it: `module_of`
    keep: str  # sha256 of the file that defines the source's predicate; "" without one
    _task: "seqio.Task"

    def stamp(self, index: int) -> str:
        """Returns a string that identifies a shard's files without reading them; "" if the source has none."""
        source = _pairs(self._task)
        return source.pairs.stamp(self.shards[index]) if source else ""

    def portable_source(self) -> Source | None:
        """Returns the task's source if another process can read it without seqio and the user's file, or None."""
        source = _pairs(self._task)
        if source is None or self._task.preprocessors:
            return None
        try:
            pickled = pickle.dumps(source.pairs)
        except Exception:  # for example, a lambda cannot be pickled
            return None
        # Objects of the user's file belong to a module that exists only in this process.
        return None if _MODULE.encode() in pickled else source.pairs

    def read(self, index: int, at_once: bool = False) -> Iterator[Pair | Rejected]:
        """Yields the pairs of a shard in order, and the records that its source rejects.

        With preprocessors the rejected ones come last, unless they are wanted `at_once`: then their places depend on
        how far TensorFlow reads ahead. Random preprocessors draw the same for a shard each time.
        """
        import seqio
        import tensorflow as tf

        source = _pairs(self._task)
        if source and not self._task.preprocessors:  # without preprocessors, TensorFlow is not needed
            yield from source.pairs.read(self.shards[index])
            return
        rejected = source.rejected if source else []
        rejected.clear()
        tf.random.set_seed(index)  # not get_dataset's `seed`, which a FunctionDataSource need not take
        info = seqio.ShardInfo(index, len(self.shards))
        dataset = self._task.get_dataset(sequence_length=None, split="train", shuffle=False, shard_info=info)
        for number, example in enumerate(dataset.as_numpy_iterator()):
            if at_once:
                yield from _drained(rejected)
            yield _pair(example, f"{self.shards[index]}-{number}")
        yield from _drained(rejected)


def find_task(config: DataConfig, name: str) -> Task:
    """Returns a registered task that preparation can read. Imports TensorFlow.

    Raises:
      DataError: as in `find_parts`, or the source has no shards.
    """
    with preparing():
        import seqio
    _register(config)
    task = seqio.TaskRegistry.get(name)
    source = _pairs(task)
    shards = tuple(task.source.list_shards("train"))
    if not shards:
        raise DataError(f"the task {name} has nothing to read")
    attribution, keep = (source.pairs.attribution, _file_of(source.pairs)) if source else ("", "")
    return Task(name, attribution, shards, module_of(config, name), keep, task)


def _file_of(source: Source) -> str:
    """Returns the sha256 of the file that defines a source's `keep`, which may be another than `data.module`."""
    keep = getattr(source, "keep", None)
    while isinstance(keep, functools.partial):
        keep = keep.func
    if keep is None:
        return ""
    try:
        return hashlib.sha256(Path(inspect.getfile(keep)).read_bytes()).hexdigest()
    except (TypeError, OSError):  # a builtin, or an object that is called
        return ""


def _register(config: DataConfig) -> None:
    """Runs the package's file and the user's file, each once."""
    with preparing():
        import ecdit.data.tasks  # noqa: F401 - registers
    if config.module:
        _run_module(config.module, module_sha256(config))


@functools.cache
def _run_module(path: str, digest: str) -> None:
    module = types.ModuleType(f"{_MODULE}{digest[:16]}")
    module.__file__ = path
    sys.modules[module.__name__] = module
    source = Path(path).read_bytes()
    try:
        with preparing():
            exec(compile(source, path, "exec"), module.__dict__)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"data.module = {path!r} failed: {type(error).__name__}: {error}") from error


def _pairs(task: "seqio.Task") -> Any:
    """Returns the task's PairsSource, or None for another DataSource of seqio."""
    from ecdit.data.tensorflow_pairs import PairsSource

    return task.source if isinstance(task.source, PairsSource) else None


def _drained(rejected: list[Rejected]) -> list[Rejected]:
    taken = list(rejected)
    del rejected[: len(taken)]  # TensorFlow reads ahead in a thread, and may have added more
    return taken


def _pair(example: dict[str, Any], name: str) -> Pair | Rejected:
    """Returns the pair of an example, either with the features of `tensorflow_pairs.SIGNATURE` or with others.

    With others, the feature `image` is the image, uint8[H, W, 3] or encoded, text features are captions, and numbers
    are columns.
    """
    try:
        key = _key(example.pop("key", name.encode()))
        image = example.pop("image")
        if "fields" in example:
            fields = zip(example.pop("fields"), example.pop("captions"), strict=True)
            columns = json.loads(example.pop("columns", b"{}"))
            split: Any = example.pop("split", b"").decode() or None
            captions = {field.decode(): text.decode() for field, text in fields}
            pair = with_captions(key, image, captions, columns, _place(key, name))
            return dataclasses.replace(pair, split=split) if isinstance(pair, Pair) else pair
        captions, columns = {}, {}
        for field, value in example.items():
            if isinstance(value, bytes):
                captions[field] = value.decode()
            elif isinstance(value, np.ndarray) and value.dtype == object and value.ndim == 1:
                captions |= {f"{field}.{i}": text.decode() for i, text in enumerate(value)}
            elif np.ndim(value) == 0:
                columns[field] = value.item()
        return with_captions(key, image, captions, columns, _place(key, name))
    except UnicodeDecodeError as error:
        return Rejected(name, "not UTF-8", str(error))
    except KeyError as error:
        raise DataError(f"an example of a task has no feature {error}: it has {', '.join(sorted(example))}") from None


def _key(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode()
    if np.ndim(value) == 0 and np.issubdtype(np.asarray(value).dtype, np.integer):
        return str(int(value))
    raise DataError(f"the feature key is {value}: it must be text or an integer")


def _place(key: str, name: str) -> str:
    """Returns how the quarantine names an example, by its place and its key."""
    return name if key == name else f"{name}:{key}"
