"""Tests which captions of a task preparation stores, and that a rate for one of a list finds it."""

import pytest

from ecdit.data import DataError
from ecdit.data.manifest import read_records_manifest, task_directory
from ecdit.data.prepared import open_prepared, prepare, stored_records
from ecdit.data.quarantine import read
from tests.data.example import make_config, module


def prepared(config):
    """The captions of the stored records by key, and the counts of rejected pairs."""
    prepare(config, say=lambda _: None)
    records = stored_records(open_prepared(config), "train")
    return {one.key: one.captions for one in records}, dict(read_records_manifest(config, config.task).rejected)


SEQIO = """
import numpy as np
import seqio
import tensorflow as tf

def examples(split, shuffle_files, seed=None):
    images = np.zeros((4, 8, 8, 3), np.uint8)
    texts = ["a cat", "", " \\n ", " b "]
    return tf.data.Dataset.from_tensor_slices({"image": images, "caption": texts, "key": KEYS})

source = seqio.FunctionDataSource(examples, splits=("train",))
seqio.TaskRegistry.add("blanks", source=source, preprocessors=[], output_features={})
"""


def test_blank_captions_of_a_seqio_task_are_rejected_and_its_keys_may_be_integers(tmp_path):
    where = module(tmp_path, "unused_beside_blanks", "1", SEQIO.replace("KEYS", "[5, 6, 7, 8]"))
    config = make_config(tmp_path / "data", module=where, task="blanks", vocab_size=300)
    assert prepared(config) == ({"5": {"caption": "a cat"}, "8": {"caption": "b"}}, {"empty caption": 2})
    assert [one.name for one in read(task_directory(config) / "quarantine.jsonl")] == [
        "train-1:6",
        "train-2:7",
    ]


def test_a_key_that_is_neither_text_nor_an_integer_is_refused(tmp_path):
    text = SEQIO.replace("KEYS", "[0.5, 1.5, 2.5, 3.5]").replace("blanks", "real_keys")
    config = make_config(
        tmp_path / "data", module=module(tmp_path, "unused_beside_keys", "1", text), task="real_keys", vocab_size=300
    )
    with pytest.raises(DataError, match=r"the feature key is 0\.5: it must be text or an integer"):
        prepared(config)


def test_a_caption_that_a_preprocessor_makes_blank_is_left_out(tmp_path):
    more = """
import tensorflow as tf

def blank(pair):
    number = tf.strings.regex_replace(pair["captions"], "^image .*", " ")
    both = tf.where(pair["key"] == b"key1", tf.fill(tf.shape(number), ""), number)
    return {**pair, "captions": both}

add_task("made_blank", Counted(3), [lambda dataset: dataset.map(blank)])
"""
    config = make_config(
        tmp_path / "data",
        module=module(tmp_path, "unused_beside_made", "1", more),
        task="made_blank",
        vocab_size=300,
        captions={"other": 1.0},
    )
    assert prepared(config) == ({"key0": {"other": "number 0"}, "key2": {"other": "number 2"}}, {"empty caption": 1})


LISTED = """
import dataclasses

@dataclasses.dataclass(frozen=True)
class Listed(Counted):
    lacking: tuple[int, ...] = ()  # pairs without captions.0

    def read(self, part):
        for pair in super().read(part):
            captions = {"captions.1": pair.captions["other"]}
            first = {} if pair.columns["number"] in self.lacking else {"captions.0": pair.captions["caption"]}
            yield dataclasses.replace(pair, captions=first | captions)

add_task("all_listed", Listed(10))
add_task("one_lacks", Listed(10, lacking=(4,)))
"""


def test_a_rate_may_name_one_caption_of_a_list_that_every_record_has(tmp_path):
    where = module(tmp_path, "unused_beside_listed", "1", LISTED)
    rates = {"captions.0": 1.0}
    config = make_config(tmp_path / "data", module=where, task="all_listed", vocab_size=300, captions=rates)
    stored, rejected = prepared(config)
    assert (len(stored), rejected) == (10, {})
    lacks = make_config(tmp_path / "data", module=where, task="one_lacks", vocab_size=300, captions=rates)
    with pytest.raises(DataError, match=r"one_lacks has records without such a caption: 10 with captions alone"):
        prepared(lacks)
