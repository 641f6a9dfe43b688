import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import grain
import numpy as np
import pytest
from PIL import Image

from ecdit.config import ConfigError
from ecdit.data import DataError, records
from ecdit.data.loader import make_loader
from ecdit.data.records import Records, dataset_directory, prepare, read_manifest, tokenize_captions
from ecdit.data.tasks import DataConfig
from ecdit.data.tensorflow import _without_information
from ecdit.data.text import EOS, PAD, UNKNOWN, fit, tokenize, train_vocabulary


def make_config(directory, **changes):
    values = {
        "task": "emoji",
        "directory": str(directory),
        "source": "",
        "image_size": 32,
        "latent_channels": 0,
        "caption_length": 12,
        "vocab_size": 1024,
        "caption_dropout": 0.1,
        "flip_probability": 0.5,
        "crop_padding": 2,
        "num_threads": 2,
        "prefetch": 2,
    }
    return DataConfig(**{**values, **changes})


def captions(config):
    return [record["caption"] for record in Records(config)]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The whole emoji set, prepared once."""
    config = make_config(tmp_path_factory.mktemp("data"))
    prepare(config)
    return config


@pytest.fixture
def pictures(tmp_path):
    """A source directory of twenty real pictures."""
    from ecdit.data import emoji

    source = tmp_path / "pictures"
    source.mkdir()
    installed = emoji._source("")
    for name in sorted(emoji.names())[100:120]:
        shutil.copy(installed / f"{name}.png", source)
    return source


def test_every_emoji_is_there_once(config):
    manifest, stored = read_manifest(config), list(Records(config))
    texts = [record["caption"] for record in stored]
    assert manifest.num_records == len(stored) == len(set(texts)) == 1913
    assert manifest.skipped == ()
    assert {"flag of France", "flag of Scotland", "tiger face", "AB button (blood type)"} <= set(texts)
    assert not any("skin tone" in text or "_" in text or ":" in text for text in texts)
    assert captions(config) == texts
    for record in stored:
        assert record["image"].shape == (32, 32, 3)
        assert record["image"].dtype == np.uint8
        assert record["original_size"].dtype == np.int32
        assert record["original_size"].tolist() == [72, 72]


def test_transparent_pixels_are_white_and_the_picture_has_its_caption(config):
    record = next(record for record in Records(config) if record["caption"] == "flag of France")
    assert (record["image"][0, 0] == 255).all()
    left, right = record["image"][16, 4], record["image"][16, 27]
    assert left[2] > left[0]  # blue hoist
    assert right[0] > right[2]  # red fly


def test_tokens_end_in_eos_and_truncated_captions_are_counted(config):
    tokens = np.stack([record["tokens"] for record in Records(config)])
    assert tokens.dtype == np.int32
    assert tokens.shape == (1913, 12)
    length = (tokens != PAD).sum(axis=1)
    assert (tokens[np.arange(1913), length - 1] == EOS).all()
    assert ((tokens == EOS).sum(axis=1) == 1).all()
    whole = tokenize(dataset_directory(config), captions(config), 100)
    assert read_manifest(config).truncated_captions == ((whole != PAD).sum(axis=1) > 12).sum() > 0
    assert read_manifest(config).pieces == tokens.max() + 1 <= 1024


def test_sampling_tokenizes_as_seqio_did(config):
    import seqio

    directory = dataset_directory(config)
    stored = np.stack([record["tokens"] for record in Records(config)])
    np.testing.assert_array_equal(tokenize(directory, captions(config), 12), stored)
    awkward = [
        "",
        "  two  spaces ",
        "日本語 🏳️‍🌈",
        "a\nb\tc",
        "ÀÉ ﬁ ²",
        "<unk> </s> <pad>",
        "▁",
        "word " * 50,
        "\u200d\ufe0f",
    ]
    vocabulary = seqio.SentencePieceVocabulary(str(directory / "vocabulary.model"), extra_ids=0)
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (PAD, EOS, UNKNOWN) == (0, 1, 2)
    expected = [fit([*vocabulary.encode_tf(text).numpy(), vocabulary.eos_id], 12) for text in awkward]
    np.testing.assert_array_equal(tokenize(directory, awkward, 12), expected)
    assert tokenize(directory, [], 12).shape == (0, 12)
    assert tokenize(directory, [""], 12)[0].tolist() == [EOS] + [PAD] * 11


def test_fit_pads_or_cuts_before_the_eos():
    assert (PAD, EOS) == (0, 1)
    assert fit([7, 8, EOS], 5).tolist() == [7, 8, EOS, PAD, PAD]
    assert fit([7, 8, EOS], 3).tolist() == [7, 8, EOS]
    assert fit([7, 8, 9, EOS], 3).tolist() == [7, 8, EOS]
    assert fit([7, EOS], 1).tolist() == [EOS]


def test_the_same_settings_prepare_the_same_bytes(config, tmp_path):
    again = make_config(tmp_path)
    assert prepare(again) == read_manifest(config)


def test_the_fingerprint_is_of_records_and_vocabulary(pictures, tmp_path):
    """A run may resume on data of the same fingerprint: other tokens of the same captions must have another."""
    config = make_config(tmp_path, source=str(pictures))
    directory, digest, manifest = dataset_directory(config), hashlib.sha256(), prepare(config)
    stored = grain.sources.ArrayRecordDataSource([str(directory / name) for name in manifest.shards])
    for index in range(len(stored)):
        digest.update(stored[index])
    digest.update((directory / "vocabulary.model").read_bytes())
    assert manifest.fingerprint == digest.hexdigest()


def test_preparing_twice_does_nothing(config, monkeypatch, capsys):
    monkeypatch.setattr(records, "TASKS", {})
    assert prepare(config) == read_manifest(config)
    assert "1913 records" in capsys.readouterr().out


def test_a_prepared_directory_holds_three_files_of_msgpack_protobuf_and_json(config):
    directory = dataset_directory(config)
    assert {path.name for path in directory.iterdir()} == {
        "dataset.json",
        "records-00000.array_record",
        "vocabulary.model",
    }
    assert [path.name for path in directory.parent.iterdir()] == ["emoji"]
    assert Records(config)._source[0][0] == 0x84  # a msgpack map of four
    for path in Path(records.__file__).parent.glob("*.py"):
        assert "import pickle" not in path.read_text()


def test_shards_are_read_in_order(pictures, tmp_path, monkeypatch):
    whole = make_config(tmp_path / "whole", source=str(pictures))
    parts = make_config(tmp_path / "parts", source=str(pictures))
    prepare(whole)
    monkeypatch.setattr(records, "_SHARD_RECORDS", 8)
    manifest = prepare(parts)
    assert len(manifest.shards) == 3
    assert manifest.fingerprint == read_manifest(whole).fingerprint
    assert captions(parts) == captions(whole)


def test_unreadable_pictures_are_counted_named_and_skipped(pictures, tmp_path, capsys):
    truncated, text, flipped, oblong, *_ = sorted(pictures.glob("*.png"))
    truncated.write_bytes(truncated.read_bytes()[:-200])
    text.write_text("this is no picture")
    data = bytearray(flipped.read_bytes())
    data[-13] ^= 1  # in the checksum of the pixels, before the 12 bytes of IEND
    flipped.write_bytes(data)
    Image.new("RGBA", (72, 36)).save(oblong)
    manifest = prepare(make_config(tmp_path / "data", source=str(pictures)))
    assert manifest.num_records == 16
    assert [line.split(":")[0] for line in manifest.skipped] == [
        path.name for path in (truncated, text, flipped, oblong)
    ]
    reasons = [line.partition(": ")[2] for line in manifest.skipped]
    assert all(reasons)
    assert "truncated" in reasons[0].lower()
    assert "cannot identify image" in reasons[1]
    assert "72 x 36 px, not square" in reasons[3]
    out = capsys.readouterr().out
    assert "16 records" in out
    assert "4 pictures skipped" in out
    assert text.name in out


def test_nothing_readable_is_an_error(pictures, tmp_path):
    for path in pictures.glob("*.png"):
        path.write_text("this is no picture")
    config = make_config(tmp_path / "data", source=str(pictures))
    with pytest.raises(DataError, match=r"no picture in .*20 could not be read, the first: .*cannot identify"):
        prepare(config)
    with pytest.raises(DataError, match="no_such' is not a directory"):
        prepare(make_config(tmp_path / "data", source=str(tmp_path / "no_such")))
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_killed_preparation_leaves_nothing_prepared(pictures, tmp_path, monkeypatch, error):
    config = make_config(tmp_path / "data", source=str(pictures))
    serialize, calls = records.serialization.msgpack_serialize, []

    def fail(record):
        assert not dataset_directory(config).exists()  # a kill that cleans nothing up is no different
        calls.append(record)
        if len(calls) == 10:
            raise error("killed")
        return serialize(record)

    monkeypatch.setattr(records.serialization, "msgpack_serialize", fail)
    with pytest.raises(error, match="killed"):
        prepare(config)
    assert len(calls) == 10
    assert list((tmp_path / "data").iterdir()) == []
    with pytest.raises(DataError, match=r"python -m ecdit.prepare --config="):
        read_manifest(config)
    monkeypatch.undo()
    assert prepare(config).num_records == 20


@pytest.mark.parametrize(
    ("key", "value", "made"),
    [("image_size", 48, 32), ("caption_length", 16, 12), ("vocab_size", 2048, 1024), ("source", "/elsewhere", "''")],
)
def test_other_settings_are_refused_by_name(config, key, value, made):
    other = make_config(config.directory, **{key: value})
    for use in (prepare, read_manifest, Records):
        with pytest.raises(DataError, match=rf"data\.{key} = '?{value}'?, but .* was prepared with {made}"):
            use(other)
    make_loader(make_config(config.directory, num_threads=0, crop_padding=0), 0, 4, 0, [0])  # reading may change


def test_unprepared_data_says_what_to_run(tmp_path):
    config = make_config(tmp_path)
    for use in (read_manifest, Records, captions, lambda config: make_loader(config, 0, 4, 0, range(4))):
        with pytest.raises(DataError, match=rf"{tmp_path}/emoji is not prepared: run python -m ecdit.prepare"):
            use(config)
    with pytest.raises(DataError, match=r"cannot read the vocabulary .*vocabulary.model"):
        tokenize(tmp_path, ["tiger"], 12)
    (tmp_path / "emoji").mkdir()
    with pytest.raises(DataError, match="is in the way"):
        prepare(config)


def test_damage_is_an_error(config, tmp_path):
    copy = make_config(tmp_path)
    directory = dataset_directory(copy)

    def damaged(name, change):
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(dataset_directory(config), directory)
        (directory / name).write_bytes(change((directory / name).read_bytes()))
        return pytest.raises(DataError, match=str(directory))

    def flip_a_bit(data):
        return data[:100_000] + bytes([data[100_000] ^ 1]) + data[100_001:]

    def edited(**changes):
        return lambda data: json.dumps({**json.loads(data), **changes}).encode()

    with damaged("records-00000.array_record", flip_a_bit):
        list(Records(copy))
    with damaged("records-00000.array_record", lambda data: data[: len(data) // 2]):
        Records(copy)
    with damaged("dataset.json", lambda data: data[:50]):
        Records(copy)
    for changes in ({"format": 1}, {"num_records": 5}, {"shards": "x"}, {"new": 1}):
        with damaged("dataset.json", edited(**changes)):
            Records(copy)
    with damaged("dataset.json", edited(num_records=0, shards=[])) as error:
        Records(copy)
    assert "has no records" in str(error.value)


LATENTS = {"task": "random_latents", "image_size": 64, "latent_channels": 5, "flip_probability": 0.0, "crop_padding": 0}


def test_latents_are_prepared_and_read_in_place_of_pictures(tmp_path, monkeypatch):
    """By the hosts of a pod too, which have no TensorFlow."""
    for package in ("seqio", "tensorflow"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    config = make_config(tmp_path, **LATENTS)
    manifest, records = prepare(config), Records(config)
    assert (manifest.num_records, manifest.latent_channels, manifest.image_size) == (len(records), 5, 64)
    first = records[0]
    assert set(first) == {"latents", "tokens", "original_size", "caption"}
    assert (first["latents"].shape, first["latents"].dtype) == ((8, 8, 5), np.float16)
    values = np.stack([records[i]["latents"] for i in range(200)]).astype(np.float64)
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    np.testing.assert_array_equal(first["tokens"], tokenize_captions(config, [first["caption"]])[0])
    batch = next(make_loader(config, 0, 4, 0, [0, 1, 2, 3]))
    assert set(batch) == {"latents", "tokens", "size_crop"}
    assert (batch["latents"].shape, batch["latents"].dtype) == ((4, 8, 8, 5), np.float16)
    np.testing.assert_array_equal(batch["size_crop"], [[64, 64, 0, 0]] * 4)
    stored = {records[i]["latents"].tobytes() for i in range(len(records))}
    assert {latents.tobytes() for latents in batch["latents"]} < stored
    with pytest.raises(DataError, match=r"data\.latent_channels = 4, but .* was prepared with 5"):
        Records(dataclasses.replace(config, latent_channels=4))


@pytest.mark.parametrize("change", [{"flip_probability": 0.5}, {"crop_padding": 1}, {"image_size": 60}])
def test_latents_are_not_augmented(tmp_path, change):
    with pytest.raises(ConfigError) as error:
        make_config(tmp_path, **LATENTS | change)
    assert {error.value.key: error.value.value} == change


def test_a_vocabulary_without_room_for_the_characters_is_an_error(tmp_path):
    letters = ["".join(chr(0x4E00 + 40 * row + column) for column in range(40)) for row in range(40)]
    with pytest.raises(DataError, match=r"data\.vocab_size = 300"):
        train_vocabulary(letters, 300, tmp_path / "vocabulary.model")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("task", "coco"),
        ("directory", ""),
        ("image_size", 0),
        ("latent_channels", -1),
        ("caption_length", 0),
        ("vocab_size", 259),
        ("caption_dropout", 1.1),
        ("flip_probability", -0.1),
        ("crop_padding", -1),
        ("num_threads", -1),
        ("prefetch", 0),
    ],
)
def test_impossible_settings_are_refused(tmp_path, key, value):
    with pytest.raises(ConfigError) as error:
        dataclasses.replace(make_config(tmp_path), **{key: value})
    assert error.value.key == key
    assert error.value.value == value


def test_training_and_sampling_import_no_tensorflow(config):
    program = f"""if True:
        import sys
        from ecdit.data.loader import make_loader
        from ecdit.data.records import dataset_directory
        from ecdit.data.tasks import DataConfig
        from ecdit.data.text import tokenize
        config = {config!r}
        next(make_loader(config, 0, 8, 0, range(8)))
        tokenize(dataset_directory(config), ["tiger"], 12)
        assert not {{"tensorflow", "seqio", "tensorflow_datasets"}} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("package", ["seqio", "tensorflow_datasets", "emoji"])
def test_a_package_that_preparing_needs_is_named_with_the_extra_that_brings_it(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "ecdit.data.emoji", raising=False)  # which another test has imported
    monkeypatch.delattr("ecdit.data.emoji", raising=False)
    name = package.replace("_", "-")
    with pytest.raises(DataError, match=rf"needs the package {name}, .*pip install -e '\.\[data\]' \('\.\[emoji\]'"):
        prepare(make_config(tmp_path / "data"))
    assert list((tmp_path / "data").iterdir()) == []


def test_what_loading_prints_is_heard_but_for_information(capfd):
    """Written as C++ does, past Python's sys.stderr, by a load that fails in the end."""
    lines = [
        "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR",
        "I0000 00:00:1795809788.398291   13452 port.cc:153] oneDNN custom operations are on.",
        "E0000 00:00:1795809788.398292   13452 file.cc:1] cannot open it",
        "a line of somebody else",
    ]
    with contextlib.suppress(ImportError), _without_information():
        os.write(2, "".join(f"{line}\n" for line in lines).encode())
        raise ImportError
    os.write(2, b"after\n")
    assert capfd.readouterr().err.splitlines() == [*lines[2:], "after"]
