"""Reads builders of TensorFlow Datasets that have an image and captions. Needs the extra `data`.

`TfdsBuilder("coco_captions", captions=("captions/text",))` yields the five captions of an image as captions.0 to
captions.4. It keeps the bytes of images as TFDS stores them.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ecdit.data import DataError
from ecdit.data.sources.protocol import Columns, Keep, Pair, Rejected, Texts, judged, with_captions
from ecdit.data.tensorflow import preparing

_ID = "tfds_id"  # a feature that TFDS adds: the file and the place in it, independent of the part


@dataclasses.dataclass(frozen=True)
class TfdsBuilder:
    """Reads the pairs of a TFDS split, which it downloads and prepares if necessary.

    Paths such as "captions/text" name features inside dictionaries and sequences. A caption field is named by the first
    part of its path.
    """

    name: str  # argument of tfds.builder: "coco_captions", "coco_captions/2017:1.1.0"
    split: str = "train"
    image: str = "image"
    captions: tuple[str, ...] = ("captions/text",)
    key: str | None = None  # a feature such as "image/filename"; None is TFDS's own id, stable for a prepared builder
    data_dir: str | None = None  # None is TFDS's default
    builder_dir: str | None = None  # reads this prepared builder; `name` then only names it in messages
    num_parts: int = 16
    encoded: bool = True  # keeps the images' bytes; False lets TFDS decode them
    keep: Keep | None = None  # a function of a module, so that other processes can import it

    @property
    def attribution(self) -> str:
        """Returns the builder's name, homepage and citation."""
        info = self._builder.info
        return "\n".join(filter(None, [f"TensorFlow Datasets {info.full_name}", info.homepage, info.citation]))

    def parts(self) -> tuple[str, ...]:
        """Returns the parts, which are even shares of the split and not empty."""
        if self.num_parts < 1:
            raise DataError(f"num_parts = {self.num_parts} must be at least 1")
        self._check_features()
        count = self._count()
        return tuple(f"{self.split}-{place:05d}-of-{count:05d}" for place in range(count))

    def stamp(self, part: str) -> str:
        """Returns a hash of the builder's version and its files' names, sizes and times. All parts share it."""
        self._place(part)
        directory = str(self._builder.data_dir)
        names = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
        files = [(name, os.stat(os.path.join(directory, name))) for name in names]
        found = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
        return hashlib.sha256(json.dumps([self._builder.info.full_name, found]).encode()).hexdigest()

    def read(self, part: str) -> Iterator[Pair | Rejected]:
        """Yields the records of a part in stored order."""
        place = self._place(part)
        with preparing():
            import tensorflow_datasets as tfds
        # Files are read one after another, because interleaving would change the order.
        options = tfds.ReadConfig(add_tfds_id=self.key is None, interleave_cycle_length=1)
        share = tfds.even_splits(self.split, self._count(), drop_remainder=False)[place]
        dataset = self._builder.as_dataset(split=share, decoders=self._decoding(), read_config=options)
        for number, example in enumerate(tfds.as_numpy(dataset)):
            name = f"{part}:{number}"
            try:
                pair = self._pair(example, name)
            except UnicodeDecodeError as error:
                pair = Rejected(name, "not UTF-8", str(error))
            yield judged(pair, name, self.keep) if isinstance(pair, Pair) else pair

    def _pair(self, example: Mapping[str, Any], name: str) -> Pair | Rejected:
        values = dict(_flat(example))
        key = values[self.key or _ID]
        image = values[self.image]
        if isinstance(image, bytes) and not image:
            return Rejected(name, "no image", f"feature {self.image!r} is empty")
        if not isinstance(image, bytes) and (image.dtype != np.uint8 or image.shape[2:] != (3,)):
            return Rejected(name, "colour mode", f"decoded to {image.dtype}{list(image.shape)}, not to RGB of 8 bits")
        texts: Texts = {}
        for path in self.captions:
            value, field = values[path], path.partition("/")[0]
            if isinstance(value, bytes):
                texts[field] = value.decode()
            else:
                texts |= {f"{field}.{place}": text.decode() for place, text in enumerate(value)}
        columns: Columns = {}
        for path, value in values.items():
            if path not in (self.image, *self.captions, _ID) and (isinstance(value, bytes) or not np.ndim(value)):
                columns[path] = value.decode() if isinstance(value, bytes) else np.asarray(value).item()
        return with_captions(_text(key), image, texts, columns, name)

    def _count(self) -> int:
        """Returns the number of parts, at most the number of examples. A mocked builder has no splits."""
        splits = self._builder.info.splits
        if not splits:
            return self.num_parts
        try:
            examples = splits[self.split].num_examples
        except (KeyError, ValueError) as error:
            raise DataError(f"{self.name} has no split {self.split!r}: {error}") from None
        if not examples:
            raise DataError(f"split {self.split!r} of {self.name} has no examples")
        return min(self.num_parts, examples)

    def _decoding(self) -> Any:
        """Returns TFDS's decoding of image, captions, key and scalars. It skips other arrays and keeps image bytes."""
        import tensorflow_datasets as tfds

        features = self._builder.info.features
        paths = [self.image, *self.captions, *filter(None, [self.key])]
        found = {path: _find(features, path) for path in paths}
        names = {path: one.names for path, one in found.items() if one is not None}  # `_check_features` has found all
        wanted = [*names.values(), *_scalars(features)]
        image = [names[self.image]]
        decoders = _nested(image, tfds.decode.SkipDecoding()) if self.encoded else None
        return tfds.decode.PartialDecoding(_nested(wanted, True), decoders=decoders)

    def _place(self, part: str) -> int:
        parts = self.parts()
        if part not in parts:
            raise DataError(f"{self.name} has no part {part!r}")
        return parts.index(part)

    def _check_features(self) -> None:
        """Raises DataError if a feature is missing or has the wrong type."""
        with preparing():
            import tensorflow_datasets as tfds
        features = self._builder.info.features
        fields = [path.partition("/")[0] for path in self.captions]
        if len(set(fields)) < len(fields) or not fields:
            raise DataError(f"captions = {self.captions} must have different first parts, and at least one path")
        for path in (self.image, *self.captions, *filter(None, [self.key])):
            found = _find(features, path)
            if found is None:
                raise DataError(f"{self.name} has no feature {path!r}; it has {', '.join(features)}")
            feature, sequences = found.feature, found.sequences
            if path == self.image and (sequences or not isinstance(feature, tfds.features.Image)):
                raise DataError(f"feature {path!r} of {self.name} must be one image, not {feature}")
            if path in self.captions and (sequences > 1 or not _is_string(feature)):
                raise DataError(f"feature {path!r} of {self.name} must be a text or a sequence of texts, not {feature}")
            if path == self.key and sequences:
                raise DataError(f"feature {path!r} of {self.name} must be one value, to be a key")

    @functools.cached_property
    def _builder(self) -> Any:
        """Returns the builder, prepared."""
        with preparing():
            import tensorflow_datasets as tfds
        try:
            if self.builder_dir is not None:
                return tfds.builder_from_directory(self.builder_dir)
            builder = tfds.builder(self.name, data_dir=self.data_dir)
        except (tfds.core.DatasetNotFoundError, OSError, ValueError) as error:
            raise DataError(f"TFDS has no builder {self.builder_dir or self.name}: {error}") from None
        builder.download_and_prepare()  # does nothing where it has been done
        return builder

    def __getstate__(self) -> dict[str, Any]:
        # Each process makes its own builder.
        return {key: value for key, value in self.__dict__.items() if key != "_builder"}


@dataclasses.dataclass(frozen=True)
class _Found:
    """A feature, the names that lead to it, and how many sequences it is in."""

    feature: Any
    names: tuple[str, ...]
    sequences: int


def _find(features: Any, path: str) -> _Found | None:
    """Returns the feature at a path, or None if it is missing. Names themselves may have slashes: "image/filename"."""
    sequences = 0
    while hasattr(features, "feature"):  # a Sequence
        features, sequences = features.feature, sequences + 1
    if not path:
        return _Found(features, (), sequences)
    if not hasattr(features, "keys"):
        return None
    for name in features.keys():  # noqa: SIM118 - a feature connector's, which is no dictionary
        if path == name or path.startswith(f"{name}/"):
            found = _find(features[name], path[len(name) + 1 :])
            if found is not None:
                return _Found(found.feature, (name, *found.names), sequences + found.sequences)
    return None


def _is_string(feature: Any) -> bool:
    """Returns whether a feature is one string: a Text, or a Tensor of that type as in coco_captions."""
    return getattr(feature, "shape", None) == () and feature.get_tensor_info().tf_dtype.name == "string"


def _scalars(features: Any, names: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yields the names that lead to each feature that is one number or string outside a sequence."""
    if hasattr(features, "feature"):
        return  # a sequence also has the attributes of its elements' feature
    if hasattr(features, "keys"):
        for name in features.keys():  # noqa: SIM118
            yield from _scalars(features[name], (*names, name))
    elif getattr(features, "shape", None) == ():
        yield names


def _nested(paths: list[tuple[str, ...]], leaf: Any) -> dict[str, Any]:
    """Returns nested dictionaries with `leaf` at each path."""
    tree: dict[str, Any] = {}
    for *parents, last in paths:
        place = tree
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = leaf
    return tree


def _flat(example: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in example.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def _text(key: Any) -> str:
    return key.decode() if isinstance(key, bytes) else str(key)
