"""Tests TFDS builders: a small one on disk, and coco_captions with the random content of TFDS's mock."""

import pickle

import numpy as np
import pytest

from ecdit.data import DataError
from ecdit.data.sources.protocol import Pair, Rejected
from ecdit.data.sources.tfds import TfdsBuilder
from ecdit.data.tensorflow import preparing
from tests.data.broken import noise

CAPTIONS = [["one", "two"], ["", "three"], [" ", ""], ["five"], ["six", "\ufffd"]]


@pytest.fixture(scope="module")
def builder_dir(tmp_path_factory):
    """A builder of five images with lists of captions."""
    with preparing():
        import tensorflow_datasets as tfds

    class Small(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        url_infos = None

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "image/filename": tfds.features.Text(),
                "captions": tfds.features.Sequence({"text": tfds.features.Text(), "id": np.int64}),
                "score": np.float32,
                "boxes": tfds.features.Sequence(np.int64),
            }
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features), homepage="https://x.y")

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for key, texts in enumerate(CAPTIONS):
                yield (
                    key,
                    {
                        "image": noise(8, 8, seed=key),
                        "image/filename": f"{key}.png",
                        "captions": [{"text": text, "id": 1} for text in texts],
                        "score": key / 2,
                        "boxes": [1, 2],
                    },
                )

    builder = Small(data_dir=tmp_path_factory.mktemp("tfds"))
    builder.download_and_prepare()
    return str(builder.data_dir)


def read(source):
    return [record for part in source.parts() for record in source.read(part)]


def test_images_captions_and_columns(builder_dir):
    found = read(TfdsBuilder("small", key="image/filename", builder_dir=builder_dir, num_parts=2))
    pairs = {pair.key: pair for pair in found if isinstance(pair, Pair)}
    assert sorted(pairs) == ["0.png", "1.png", "3.png", "4.png"]
    assert pairs["0.png"].captions == {"captions.0": "one", "captions.1": "two"}
    assert pairs["1.png"].captions == {"captions.1": "three"}
    assert pairs["3.png"].columns == {"score": 1.5, "image/filename": "3.png"}
    assert [record.reason for record in found if isinstance(record, Rejected)] == ["empty caption"]


@pytest.mark.parametrize("encoded_images", [True, False])
def test_images_keep_their_bytes_or_are_decoded(builder_dir, encoded_images):
    from ecdit.data.images import decode

    source = TfdsBuilder("small", key="image/filename", builder_dir=builder_dir, encoded=encoded_images)
    for pair in read(source):
        if isinstance(pair, Pair):
            assert isinstance(pair.image, bytes) == encoded_images
            pixels = decode(pair.image, "", 1 << 10) if encoded_images else pair.image
            assert (pixels == noise(8, 8, seed=int(pair.key[0]))).all()


def test_records_and_their_own_ids_do_not_depend_on_the_parts(builder_dir):
    def pairs(num_parts):
        source = pickle.loads(pickle.dumps(TfdsBuilder("small", builder_dir=builder_dir, num_parts=num_parts)))
        return [record for record in read(source) if isinstance(record, Pair)]

    assert pairs(1) == pairs(3) == pairs(7)
    assert len({pair.key for pair in pairs(1)}) == 4


def test_stamp_and_attribution(builder_dir):
    source = TfdsBuilder("small", builder_dir=builder_dir)
    assert source.stamp(source.parts()[0]) == source.stamp(source.parts()[1])
    assert source.attribution.startswith("TensorFlow Datasets small/1.0.0\nhttps://x.y")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": "photo"}, "no feature 'photo'; it has"),
        ({"image": "score"}, "must be one image"),
        ({"captions": ("score",)}, "must be a text"),
        ({"captions": ("captions/text", "captions/id")}, "different first parts"),
        ({"captions": ()}, "at least one path"),
        ({"key": "captions/text"}, "to be a key"),
        ({"num_parts": 0}, "num_parts = 0"),
        ({"split": "test"}, "no split 'test'"),
    ],
)
def test_features_that_cannot_be_used(builder_dir, options, message):
    with pytest.raises(DataError, match=message):
        TfdsBuilder("small", builder_dir=builder_dir, **options).parts()


def test_an_unknown_builder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no builder .*none"):
        TfdsBuilder("small", builder_dir=str(tmp_path / "none")).parts()


def test_coco_captions_by_the_mock_of_tfds(tmp_path):
    """The mock's content is random and the same in each part; it cannot encode, so images are decoded."""
    with preparing():
        import tensorflow_datasets as tfds
    source = TfdsBuilder("coco_captions", key="image/filename", data_dir=str(tmp_path), num_parts=1, encoded=False)
    with tfds.testing.mock_data(num_examples=3):
        pairs = read(source)
        assert "cocodataset" in source.attribution
    assert len(pairs) == 3
    for pair in pairs:
        assert pair.image.dtype == np.uint8
        assert list(pair.captions) == [f"captions.{place}" for place in range(len(pair.captions))]
        assert pair.columns["image/filename"] == pair.key
