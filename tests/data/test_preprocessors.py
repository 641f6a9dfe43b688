"""Tests that a task with seqio's random preprocessors is prepared with the same bytes each time."""

import dataclasses

import pytest

from ecdit.data.manifest import task_directory
from ecdit.data.prepared import open_prepared, prepare, stored_records
from ecdit.data.quarantine import read
from tests.data.example import make_config, module
from tests.data.test_preparation import files

RANDOM = """
import dataclasses

import seqio
import tensorflow as tf

from ecdit.data.sources.protocol import Rejected

@dataclasses.dataclass(frozen=True)
class Picky(Counted):
    def read(self, part):
        for pair in super().read(part):
            bad = pair.columns["number"] % 5 == 2
            yield Rejected(f"{part}:{pair.key}", "predicate", "no") if bad else pair

@seqio.map_over_dataset(num_seeds=1)
def numbered(pair, seed):
    drawn = tf.random.stateless_uniform((), seed, 0, 1000, tf.int32)
    return {**pair, "captions": pair["captions"] + tf.strings.as_string(drawn)}

def loud(dataset):
    return dataset.filter(lambda pair: tf.random.uniform(()) < 0.7)

add_task("random", Picky(80, 40), [numbered, loud])
"""


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_random_preprocessors_draw_the_same_each_time_and_another_number_in_each_part(tmp_path, workers):
    task = f"random_{workers}"
    where = module(tmp_path, f"unused_{task}", "1", RANDOM.replace('"random"', f'"{task}"'))
    found = []
    for name, processes in (("once", 1), ("again", workers)):
        config = make_config(tmp_path / name, module=where, task=task, vocab_size=300)
        prepare(config, processes, say=lambda _: None)
        found.append(files(task_directory(config)))
    assert found[0] == found[1]
    texts = {one.key: one.captions["caption"] for one in stored_records(open_prepared(config), "train")}
    kept = [{int(key[3:]) % 40 for key in texts if int(key[3:]) // 40 == part} for part in (0, 1)]
    assert kept[0] != kept[1]
    assert all(20 > len(one) > 10 for one in (set(range(40)) - kept[0], set(range(40)) - kept[1]))
    drawn = [text.removeprefix(f"image {key[3:]}") for key, text in texts.items()]
    assert len(set(drawn)) > 0.8 * len(drawn)


def test_the_quarantine_has_the_order_of_the_source_however_far_tensorflow_reads_ahead(tmp_path):
    """The source's rejected pairs follow those whose image is bad, in their own order."""
    more = RANDOM.replace('"random", Picky(80, 40)', '"ahead", Picky(80, 40, (3, 14, 33, 55))').replace(
        "[numbered, loud]", "[lambda dataset: dataset.prefetch(20)]"
    )
    config = make_config(tmp_path, module=module(tmp_path, "unused_ahead", "1", more), task="ahead", vocab_size=300)
    prepare(dataclasses.replace(config, directory=str(tmp_path / "data")), say=lambda _: None)
    names = [one.name for one in read(tmp_path / "data/ahead/quarantine.jsonl")]
    assert names == [
        *("part 0:key3", "part 0:key14", "part 0:key33"),
        *(f"part 0:key{i}" for i in range(2, 40, 5)),
        "part 1:key55",
        *(f"part 1:key{i}" for i in range(42, 80, 5)),
    ]
