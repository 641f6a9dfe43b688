"""Tests that the same pairs in tars, in a folder with a CSV and in a TFDS builder become the same records."""

import csv
import io
import random
import tarfile

import pytest

from ecdit.data.emoji import Emoji
from ecdit.data.parts import encode_record
from ecdit.data.prepared import prepare, stored_records
from tests.data.example import make_config

MODULE = """
from ecdit.data.sources.tars import Tars
from ecdit.data.sources.tables import Table
from ecdit.data.sources.tfds import TfdsBuilder
from ecdit.data.tasks import add_task

add_task("emoji_in_tars", Tars("{directory}/tars/*.tar"))
add_task("emoji_in_a_folder", Table("{directory}/folder/pairs.csv", image="file", captions=("caption",)))
add_task(
    "emoji_in_tfds",
    TfdsBuilder("emoji_images", builder_dir="{builder}", captions=("caption",), key="key", num_parts=3),
)
"""


@pytest.fixture(scope="module")
def pairs():
    """All emoji, in an order that is no source's."""
    found = list(Emoji().read("emoji"))
    random.Random(0).shuffle(found)
    return found


def write_tars(pairs, directory):
    directory.mkdir()
    for first in range(0, len(pairs), 700):
        with tarfile.open(directory / f"{first:05d}.tar", "w") as tar:
            for pair in pairs[first : first + 700]:
                for suffix, data in ((".png", pair.image), (".txt", pair.captions["caption"].encode())):
                    member = tarfile.TarInfo(pair.key + suffix)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def write_folder(pairs, directory):
    directory.mkdir()
    with (directory / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "caption"])
        for pair in pairs:
            (directory / f"{pair.key}.png").write_bytes(pair.image)
            writer.writerow([f"{pair.key}.png", pair.captions["caption"]])


def write_tfds(pairs, directory):
    """Returns the directory of a builder that holds the PNGs as they are."""
    import tensorflow_datasets as tfds

    class EmojiImages(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        url_infos = None

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 4), encoding_format="png"),
                "caption": tfds.features.Text(),
                "key": tfds.features.Text(),
            }
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for pair in pairs:
                values = {"image": io.BytesIO(pair.image), "caption": pair.captions["caption"], "key": pair.key}
                yield pair.key, values

    tfds.disable_progress_bar()
    builder = EmojiImages(data_dir=directory)
    builder.download_and_prepare()
    return builder.data_dir


def test_tars_a_folder_and_tfds_become_the_same_records(pairs, tmp_path):
    """Sorted by key, all 1913 are equal to the byte, and equal to those of the task `emoji`."""
    write_tars(pairs, tmp_path / "tars")
    write_folder(pairs, tmp_path / "folder")
    module = tmp_path / "emoji_tasks.py"
    module.write_text(MODULE.format(directory=tmp_path, builder=write_tfds(pairs, tmp_path / "tfds")))
    found = {}
    for task in ("emoji", "emoji_in_tars", "emoji_in_a_folder", "emoji_in_tfds"):
        done = prepare(make_config(tmp_path / "data", module=str(module), task=task), say=lambda _: None)
        assert done.stored[0].manifest.rejected == {}
        records = sorted(stored_records(done, "train"), key=lambda record: record.key)
        found[task] = [encode_record(record) for record in records]
    assert len(found["emoji"]) == 1913
    for task, records in found.items():
        assert records == found["emoji"], task
