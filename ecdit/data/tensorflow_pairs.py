"""Adapts sources of pairs to seqio. Imports TensorFlow: import this module only while preparing."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from ecdit.data.sources.protocol import Pair, Rejected, Source

# Features of a seqio Task with a `PairsSource`. Preprocessors may change or filter them.
SIGNATURE = {
    "key": tf.TensorSpec((), tf.string),
    "image": tf.TensorSpec((), tf.string),  # encoded
    "fields": tf.TensorSpec((None,), tf.string),  # names of the captions
    "captions": tf.TensorSpec((None,), tf.string),
    "columns": tf.TensorSpec((), tf.string),  # a JSON object
    "split": tf.TensorSpec((), tf.string),  # "" assigns it by the key's hash
}


class PairsSource(seqio.DataSource):
    """A seqio DataSource over a source of pairs. Each part of the source is a shard."""

    def __init__(self, source: Source):
        self.pairs = source
        self.rejected: list[Rejected] = []  # records rejected since the list was last cleared
        super().__init__(splits=("train",), caching_permitted=False)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """Returns False, because a part can only be read whole."""
        return False

    def list_shards(self, split: str) -> tuple[str, ...]:
        """Returns the names of the parts."""
        del split
        return self.pairs.parts()

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = False,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused: Any,
    ) -> tf.data.Dataset:
        """Returns the pairs of the parts in order, with the features of SIGNATURE. Reading them fills `rejected`."""
        del split, shuffle, seed, unused
        parts = self.pairs.parts()
        chosen = parts if shard_info is None else parts[shard_info.index :: shard_info.num_shards]

        def examples() -> Iterator[dict[str, Any]]:
            for part in chosen:
                for pair in self.pairs.read(part):
                    if isinstance(pair, Rejected):
                        self.rejected.append(pair)
                    else:
                        yield _example(pair)

        return tf.data.Dataset.from_generator(examples, output_signature=SIGNATURE)


class MadeWhenRead(seqio.DataSource):
    """The empty source of a task of `GENERATED`, whose rows are generated during training."""

    def __init__(self):
        super().__init__(splits=("train",), caching_permitted=False)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """Returns True, because there is nothing to read."""
        return True

    def list_shards(self, split: str) -> tuple[str, ...]:
        """Returns no names."""
        del split
        return ()

    def get_dataset(self, *args: Any, **kwargs: Any) -> tf.data.Dataset:
        """Raises NotImplementedError."""
        raise NotImplementedError("its rows are generated during training")


def _example(pair: Pair) -> dict[str, Any]:
    image = pair.image if isinstance(pair.image, bytes) else tf.io.encode_png(pair.image, compression=0).numpy()
    return {
        "key": pair.key,
        "image": image,
        "fields": np.array(list(pair.captions), object),
        "captions": np.array([text.encode() for text in pair.captions.values()], object),
        "columns": json.dumps(pair.columns),
        "split": pair.split or "",
    }
