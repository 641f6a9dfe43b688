"""Sources of pairs as seqio knows them. Imports TensorFlow: import this module only while preparing."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from ecdit.data.sources.protocol import Pair, Rejected, Source

# What a seqio Task of a `PairsSource` has: preprocessors may change all of it, or filter.
SIGNATURE = {
    "key": tf.TensorSpec((), tf.string),
    "image": tf.TensorSpec((), tf.string),  # encoded
    "fields": tf.TensorSpec((None,), tf.string),  # names of the captions
    "captions": tf.TensorSpec((None,), tf.string),
    "columns": tf.TensorSpec((), tf.string),  # a JSON object, to filter by
    "split": tf.TensorSpec((), tf.string),  # "" for one by the key
}


class PairsSource(seqio.DataSource):
    """A source of pairs as a seqio DataSource: each part of the source is a shard."""

    def __init__(self, source: Source):
        self.pairs = source
        self.rejected: list[Rejected] = []  # of what was read since the list was last cleared
        super().__init__(splits=("train",), caching_permitted=False)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """Returns False: a part is read whole."""
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
        """Returns the pairs of the parts, in order, by SIGNATURE; what is rejected goes to `rejected` meanwhile."""
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
    """The source of a task of `GENERATED`: its rows are made while training, so that it gives none."""

    def __init__(self):
        super().__init__(splits=("train",), caching_permitted=False)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """Returns True: there is nothing to read."""
        return True

    def list_shards(self, split: str) -> tuple[str, ...]:
        """Returns no names."""
        del split
        return ()

    def get_dataset(self, *args: Any, **kwargs: Any) -> tf.data.Dataset:
        """Raises NotImplementedError."""
        raise NotImplementedError("its rows are made while training")


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
