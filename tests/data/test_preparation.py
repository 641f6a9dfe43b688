"""Tests preparation: stored and rejected pairs, and that it can be killed at any time."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecdit import progress
from ecdit.config import ConfigError
from ecdit.data import DataError, copies, parts, prepared
from ecdit.data.columns import make_column
from ecdit.data.config import rate_of
from ecdit.data.emoji import Emoji, names
from ecdit.data.first_look import first_look
from ecdit.data.images import decode_stored
from ecdit.data.manifest import read_records_manifest, task_directory
from ecdit.data.parts import split_of
from ecdit.data.prepared import (
    open_prepared,
    prepare,
    prompt_tokens,
    sample_captions,
    sample_targets,
    stored_records,
)
from ecdit.data.quarantine import read
from ecdit.data.shards import ShardReader, combined, file_sha256
from ecdit.data.text import EOS, PAD, train_vocabulary
from ecdit.data.tokens import truncated_captions
from ecdit.data.verification import verify
from ecdit.pretrained.tokenizers import fit
from tests.data.example import make_config, module, png, tokenize
from tests.runs import tiny

ROOT = Path(__file__).parents[2]
PLAIN = {"crop_padding": 0, "flip_probability": 0}


def files(directory):
    """The contents of all files below a directory by their relative paths; locks are no data."""
    paths = [path for path in directory.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def emoji(emoji_data):
    return open_prepared(tiny(data__directory=str(emoji_data)).data)


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """36 pairs in four parts of which two have a spoiled image; the tokenizer is trained on "image 0" ..."""
    place = tmp_path_factory.mktemp("counted")
    config = make_config(
        place / "data", module=module(place, "counted", "36, spoiled=(3, 25)"), task="counted", vocab_size=300
    )
    prepare(config, say=lambda _: None)
    return config


def test_every_emoji_is_there_once(emoji):
    stored = list(stored_records(emoji, "train"))
    texts = [record.captions["caption"] for record in stored]
    assert emoji.num_records == len(stored) == len(set(texts)) == 1913
    assert {"flag of France", "flag of Scotland", "tiger face", "AB button (blood type)"} <= set(texts)
    assert not any("skin tone" in text or "_" in text or ":" in text for text in texts)
    assert {record.key for record in stored} <= names().keys()
    for record in stored:
        image = decode_stored(record.image)
        assert (image.shape, image.dtype) == ((32, 32, 3), np.uint8)
        assert (record.original_size.tolist(), record.crop.tolist()) == ([72, 72], [0, 0])
    manifest = emoji.stored[0].manifest
    assert (manifest.rejected, manifest.identical_images, manifest.identical_captions) == ({}, 43, 0)
    assert sum(manifest.caption_characters["caption"].values()) == 1913


def test_transparent_pixels_are_white_and_the_image_has_its_caption(emoji):
    records = stored_records(emoji, "train")
    image = decode_stored(next(one.image for one in records if one.captions["caption"] == "flag of France"))
    assert (image[0, 0] == 255).all()
    left, right = image[16, 4], image[16, 27]
    assert left[2] > left[0]  # blue hoist
    assert right[0] > right[2]  # red fly


def test_a_record_has_all_of_its_pair(counted):
    stored = list(stored_records(open_prepared(counted), "train"))
    assert [record.key for record in stored] == [f"key{i}" for i in range(36) if i not in (3, 25)]
    one = stored[10]
    assert one.captions == {"caption": "image 11", "other": "number 11"}
    assert decode_stored(one.image).tolist() == np.full((32, 32, 3), 11).tolist()
    assert (one.original_size.tolist(), one.crop.tolist()) == ([8, 8], [0, 0])


def test_what_is_left_out_is_counted_and_named(counted):
    manifest = read_records_manifest(counted, "counted")
    assert (manifest.num_records, manifest.rejected) == (34, {"undecodable": 2})
    found = list(read(task_directory(counted) / "quarantine.jsonl"))
    assert [(one.name, one.reason) for one in found] == [
        ("part 0:key3", "undecodable"),
        ("part 2:key25", "undecodable"),
    ]


def test_filters_leave_out_by_size_caption_and_column(tmp_path):
    where = module(tmp_path, "filtered", "30")
    base = make_config(module=where, task="filtered", vocab_size=300)

    def left(name, **changes):
        filters = dataclasses.replace(base.prepare.filters, **changes)
        config = dataclasses.replace(
            base, directory=str(tmp_path / name), prepare=dataclasses.replace(base.prepare, filters=filters)
        )
        prepare(config, say=lambda _: None)
        manifest = read_records_manifest(config, "filtered")
        assert manifest.num_records + sum(manifest.rejected.values()) == 30
        return manifest.num_records, dict(manifest.rejected)

    assert left("column", columns={"number": (5, 9)}) == (5, {"column number": 25})
    with pytest.raises(DataError, match="all pairs are left out, 30 for no column aesthetic"):
        left("none", columns={"aesthetic": (5, 9)})
    # "number 7" and "image 20" have 8 characters: only the other caption of the last twenty pairs is long enough.
    with pytest.raises(DataError, match="without such a caption: 20 with other alone; give one of their fields a rate"):
        left("caption", min_caption=9)


def test_a_task_of_which_nothing_is_left_is_an_error(tmp_path):
    config = make_config(tmp_path / "data", module=module(tmp_path, "spoiled", "3, spoiled=(0, 1, 2)"), task="spoiled")
    with pytest.raises(DataError, match="the task spoiled gives no record: all pairs are left out, 3 for undecodable"):
        prepare(config)
    assert not task_directory(config).exists()


def test_held_out_keys_stay_held_out_as_the_data_grows(tmp_path):
    """A share of the keys by their hash: no key of a smaller data set changes its split in a larger one."""
    found = {}
    for name, count in (("few", 100), ("many", 300)):
        config = make_config(
            tmp_path / name, module=module(tmp_path, name, f"{count}, 50"), task=name, prepare={"held_out": 0.2}
        )
        done = prepare(config, say=lambda _: None)
        manifest = read_records_manifest(config, name)
        held_out, train = ([one.key for one in stored_records(done, split)] for split in ("held_out", "train"))
        assert (len(held_out), len(train)) == (manifest.num_held_out, manifest.num_records)
        assert sorted([*held_out, *train]) == sorted(f"key{i}" for i in range(count))
        found[name] = set(held_out)
    assert found["few"] == {key for key in found["many"] if int(key[3:]) < 100}
    assert 40 <= len(found["many"]) <= 80  # 60 expected, three standard deviations
    none = dataclasses.replace(config.prepare, held_out=0.0)
    assert all(split_of(f"key{i}", none) == "train" for i in range(1000))


COPIES = """
import dataclasses

@dataclasses.dataclass(frozen=True)
class Halves(Counted):
    def read(self, part):
        for number, pair in enumerate(super().read(part)):
            yield dataclasses.replace(pair, split="held_out" if pair.columns["number"] in {held_out} else "train")

add_task("{name}", Halves({count}, per_part={per_part}))
"""


def test_images_that_are_held_out_and_trained_on_are_counted(tmp_path):
    """Pair i has the grey i % 256: of the pairs held out, 3 and 300 have one that another pair has too."""
    found = []
    for per_part in (300, 10):
        name = f"copies_{per_part}"
        more = COPIES.format(held_out="(3, 300, 200)", name=name, count=302, per_part=per_part)
        where = module(tmp_path, f"unused_{name}", "1", more)
        config, said = make_config(tmp_path / "data", module=where, task=name, vocab_size=300), []
        prepare(config, say=said.append)
        assert any("3 held out (2 of them with an image that training reads)" in line for line in said)
        found.append(read_records_manifest(config, name))
    assert [(one.identical_images, one.held_out_in_train, one.counted) for one in found] == [(92, 2, 1.0)] * 2


def test_copies_in_very_much_data_are_counted_in_a_share_of_it(tmp_path, monkeypatch):
    """4000 hashes twice and 2000 once; half of the second copies are held out. A fifth of the hashes is counted."""
    hashes = np.random.default_rng(0).integers(0, 2**64, 6000, np.uint64)
    rows = [np.concatenate([hashes, hashes[:2000]]), hashes[2000:4000]]
    paths = [(tmp_path / f"{i}.npy", (8000, 0)[i]) for i in range(2)]
    for (path, _), column in zip(paths, rows, strict=True):
        np.save(path, np.stack([column, column], axis=1))
    exact = copies.count_copies(paths)
    assert (exact.images, exact.captions, exact.held_out_in_train, exact.counted) == (8000, 8000, 2000, 1.0)
    monkeypatch.setattr(copies, "_COUNTED_RECORDS", 2000)
    found = copies.count_copies(paths)
    assert found.counted == 0.2
    assert abs(found.images / 8000 - 1) < 0.1
    assert abs(found.held_out_in_train / 2000 - 1) < 0.1


def test_records_from_before_copies_between_splits_were_counted_can_be_read(counted, tmp_path):
    def older(data):
        stored = json.loads(data)
        del stored["held_out_in_train"]
        return json.dumps(stored).encode()

    copy = damaged(counted, tmp_path, "dataset.json", older)
    assert read_records_manifest(copy, "counted").held_out_in_train is None
    assert read_records_manifest(counted, "counted").held_out_in_train == 0
    open_prepared(copy)


def test_tokens_of_every_field_end_in_eos_at_their_true_length(counted):
    done = open_prepared(counted)
    part = done.stored[0]
    reader = ShardReader(part.directory / "columns" / part.tokens.name, part.tokens.train)
    lengths = Counter()
    for index, record in enumerate(stored_records(done, "train")):
        tokens = prepared.unpack(reader[index])
        assert tokens.keys() == record.captions.keys()
        for field, row in tokens.items():
            assert (row.dtype, row[-1], (row == EOS).sum()) == (np.int32, EOS, 1)
            expected = tokenize(done.tokenizer, [record.captions[field]], 64)[0]
            np.testing.assert_array_equal(fit(row, 64, EOS, PAD), expected)
            lengths[field, str(len(row))] += 1
    assert part.tokens.histograms == {
        field: {length: count for (one, length), count in sorted(lengths.items()) if one == field}
        for field in ("caption", "other")
    }


def test_captions_are_tokenized_as_seqio_does(emoji):
    import seqio

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
    vocabulary = seqio.SentencePieceVocabulary(str(emoji.tokenizer), extra_ids=0)
    expected = [fit([*vocabulary.encode_tf(text).numpy(), vocabulary.eos_id], 12, EOS, PAD) for text in awkward]
    np.testing.assert_array_equal(tokenize(emoji.tokenizer, awkward, 12), expected)
    assert tokenize(emoji.tokenizer, [], 12).shape == (0, 12)
    assert prompt_tokens(emoji.config)([""])[0].tolist() == [EOS] + [PAD] * 15


def test_fit_pads_or_cuts_before_the_eos():
    assert (PAD, EOS) == (0, 1)
    assert fit([7, 8, EOS], 5, EOS, PAD).tolist() == [7, 8, EOS, PAD, PAD]
    assert fit([7, 8, EOS], 3, EOS, PAD).tolist() == [7, 8, EOS]
    assert fit([7, 8, 9, EOS], 3, EOS, PAD).tolist() == [7, 8, EOS]
    assert fit([7, EOS], 1, EOS, PAD).tolist() == [EOS]


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_processes_changes_no_byte(counted, tmp_path, workers):
    again = dataclasses.replace(counted, directory=str(tmp_path))
    assert prepare(again, workers, say=lambda _: None).fingerprint == open_prepared(counted).fingerprint
    assert files(task_directory(again)) == files(task_directory(counted))


def test_the_parts_of_a_source_change_no_record(tmp_path):
    stored = []
    for name, per_part in (("three", 10), ("one", 30)):
        config = make_config(tmp_path / name, module=module(tmp_path, name, f"30, {per_part}"), task=name)
        stored.append(list(map(parts.encode_record, stored_records(prepare(config, say=lambda _: None), "train"))))
    assert stored[0] == stored[1]


def test_the_targets_of_sampled_captions_are_the_images_of_their_records(counted):
    found = open_prepared(counted)
    images = {record.captions["caption"]: decode_stored(record.image) for record in stored_records(found, "train")}
    captions, targets = sample_captions(found, 5), sample_targets(found, 5)
    assert len(set(captions)) == len(targets) == 5
    for caption, target in zip(captions, targets, strict=True):
        np.testing.assert_array_equal(target, images[caption], err_msg=caption)


def test_the_fingerprint_is_of_the_records_in_order(counted):
    manifest, directory = read_records_manifest(counted, "counted"), task_directory(counted)
    assert manifest.fingerprint == combined(shard.content for shard in manifest.train)
    assert len({shard.content for shard in manifest.train}) == len(manifest.train) == 4
    for shard in manifest.train:
        assert (shard.sha256, shard.size) == (
            file_sha256(directory / shard.name),
            (directory / shard.name).stat().st_size,
        )


def test_seqio_preprocessors_may_change_and_drop_pairs(tmp_path, counted):
    """Without any the pairs never pass through TensorFlow; with one that does nothing the records are the same."""
    more = """
import tensorflow as tf

add_task("same", Counted(36, spoiled=(3, 25)), [lambda dataset: dataset])
add_task(
    "changed",
    Counted(36, spoiled=(3, 25)),
    [
        lambda dataset: dataset.filter(lambda pair: pair["key"] != b"key7"),
        lambda dataset: dataset.map(lambda pair: {**pair, "captions": tf.strings.upper(pair["captions"])}),
    ],
)
"""
    where = module(tmp_path, "unused", "1", more)
    found = {}
    for name in ("same", "changed"):
        config = make_config(tmp_path / "data", module=where, task=name, vocab_size=300)
        found[name] = list(stored_records(prepare(config, say=lambda _: None), "train"))
        assert read_records_manifest(config, name).rejected == {"undecodable": 2}
    plain = list(stored_records(open_prepared(counted), "train"))
    assert [parts.encode_record(one) for one in found["same"]] == [parts.encode_record(one) for one in plain]
    assert [one.key for one in found["changed"]] == [one.key for one in plain if one.key != "key7"]
    assert found["changed"][0].captions == {"caption": "IMAGE 0", "other": "NUMBER 0"}


def test_pairs_that_pass_through_tensorflow_keep_their_columns(tmp_path):
    where = module(tmp_path, "unfiltered", "1", 'add_task("filtered_late", Counted(30), [lambda dataset: dataset])')
    filters = dataclasses.replace(make_config().prepare.filters, columns={"number": (5, 9)})
    config = make_config(tmp_path / "data", module=where, task="filtered_late", prepare={"filters": filters})
    stored = list(stored_records(prepare(config, say=lambda _: None), "train"))
    assert [one.key for one in stored] == [f"key{i}" for i in range(5, 10)]


def test_a_lambda_in_the_user_s_file_works_in_several_processes(tmp_path):
    more = """
import dataclasses

@dataclasses.dataclass(frozen=True)
class Kept(Counted):
    keep: object = None

    def read(self, part):
        return (pair for pair in super().read(part) if self.keep(pair))

add_task("kept", Kept(30, keep=lambda pair: pair.key != "key7"))
"""
    config = make_config(tmp_path / "data", module=module(tmp_path, "not_kept", "1", more), task="kept")
    stored = list(stored_records(prepare(config, workers=2, say=lambda _: None), "train"))
    assert [one.key for one in stored] == [f"key{i}" for i in range(30) if i != 7]


def test_any_seqio_source_with_an_image_and_text_can_be_prepared(tmp_path):
    more = """
import numpy as np
import seqio
import tensorflow as tf

def dataset(split, shuffle_files, seed=None):
    images = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((8, 12, 3), np.uint8)
    return tf.data.Dataset.from_tensor_slices({"image": images, "title": ["a", "b", "c", "d"], "score": [1, 2, 3, 4]})

source = seqio.FunctionDataSource(dataset, splits=("train",))
seqio.TaskRegistry.add("plain_seqio", source=source, preprocessors=[], output_features={})
"""
    where = module(tmp_path, "unused_too", "1", more)
    filters = dataclasses.replace(make_config().prepare.filters, columns={"score": (2, 4)})
    config = make_config(
        tmp_path / "data", module=where, task="plain_seqio", captions={"title": 1}, prepare={"filters": filters}
    )
    stored = list(stored_records(prepare(config, say=lambda _: None), "train"))
    assert [one.captions["title"] for one in stored] == ["b", "c", "d"]
    assert stored[0].original_size.tolist() == [8, 12]
    assert stored[0].crop.tolist() == [0, 8]  # 32 x 48 px after it is resized


KILLED = """
import sys
from ecdit.data.prepared import prepare
from tests.data.example import make_config

directory, module = sys.argv[1:]
prepare(make_config(directory, module=module, task="killed", vocab_size=300), workers=2)
"""


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path, cpu_env):
    """Real kills of the command with its two workers, each of which dies with it: three, or ECDIT_KILLS."""
    wanted = int(os.environ.get("ECDIT_KILLS", "3"))
    where, chance = module(tmp_path, "killed", "1500, 50"), random.Random(5)
    arguments = [sys.executable, "-c", KILLED]
    begun = time.monotonic()
    subprocess.run([*arguments, str(tmp_path / "whole"), where], check=True, cwd=ROOT, env=cpu_env())
    whole, kills, directory = time.monotonic() - begun, 0, tmp_path / "killed"
    while kills < wanted:
        if (directory / "killed" / "composition.json").exists():  # it came to its end: begin again
            shutil.rmtree(directory)
        process = subprocess.Popen([*arguments, str(directory), where], cwd=ROOT, env=cpu_env(), start_new_session=True)
        try:
            process.wait(chance.uniform(0.4, 1.0) * whole)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
    subprocess.run([*arguments, str(directory), where], check=True, cwd=ROOT, env=cpu_env())
    assert files(directory) == files(tmp_path / "whole")


def test_a_preparation_that_stops_at_any_step_goes_on(tmp_path, monkeypatch, counted):
    """Stops it at each rename and each replacement of a file in turn, which are all its steps."""
    steps, fail_at = [0], [0]

    def counting(original):
        def step(*arguments, **keywords):
            steps[0] += 1
            if steps[0] == fail_at[0]:
                raise KeyboardInterrupt
            return original(*arguments, **keywords)

        return step

    for owner, name in ((Path, "rename"), (Path, "unlink"), (os, "replace")):
        monkeypatch.setattr(owner, name, counting(getattr(owner, name)))
    config, expected = dataclasses.replace(counted, directory=str(tmp_path / "data")), files(task_directory(counted))
    prepare(config, say=lambda _: None)
    total = steps[0]
    assert total > 20
    for fail_at[0] in range(1, total + 1):
        shutil.rmtree(tmp_path / "data")
        steps[0] = 0
        with pytest.raises(KeyboardInterrupt):
            prepare(config, say=lambda _: None)
        steps[0] = -1_000_000
        prepare(config, say=lambda _: None)
        assert files(task_directory(config)) == expected, f"step {fail_at[0]} of {total}"


def test_preparing_twice_does_nothing(counted, capsys):
    before = files(task_directory(counted))
    assert prepare(counted) == open_prepared(counted)
    assert "34 records" in capsys.readouterr().out
    assert files(task_directory(counted)) == before


def test_a_preparation_of_other_settings_or_input_does_not_go_on(tmp_path, monkeypatch):
    where = module(tmp_path, "begun", "30")
    config = make_config(tmp_path / "data", module=where, task="begun", vocab_size=300)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ecdit.data.preparation._joined", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"\.begun\.preparing was begun with other settings or other input"):
        prepare(dataclasses.replace(config, image_size=16))
    monkeypatch.setattr("tests.data.example.Counted.stamp", lambda *_: "later")
    with pytest.raises(DataError, match="part 0 has changed since"):
        prepare(config)


@pytest.mark.parametrize(
    ("key", "value", "made"),
    [("image_size", 48, "32"), ("prepare.held_out", 0.5, "0.0"), ("prepare.image_format", "webp", "'png'")],
)
def test_other_settings_are_refused_by_name(counted, key, value, made):
    group, _, name = key.rpartition(".")
    change = {"prepare": dataclasses.replace(counted.prepare, **{name: value})} if group else {name: value}
    other = dataclasses.replace(counted, **change)
    for use in (prepare, open_prepared):
        with pytest.raises(DataError, match=rf"data\.{key} = '?{value}'?, but .* was prepared with {made}"):
            use(other)


def test_unprepared_data_says_what_to_run(tmp_path):
    config = make_config(tmp_path)
    with pytest.raises(DataError, match=rf"{tmp_path}/emoji is not prepared: run python -m ecdit.prepare"):
        open_prepared(config)
    with pytest.raises(DataError, match=r"cannot read the tokenizer .*x.model"):
        tokenize(tmp_path / "x.model", ["tiger"], 12)
    (tmp_path / "emoji").mkdir()
    with pytest.raises(DataError, match="is in the way"):
        prepare(config)


def damaged(config, tmp_path, name, change):
    """A copy of prepared data in which a file is changed."""
    copy = dataclasses.replace(config, directory=str(tmp_path))
    shutil.rmtree(task_directory(copy), ignore_errors=True)
    shutil.copytree(task_directory(config), task_directory(copy))
    path = task_directory(copy) / name
    path.write_bytes(change(path.read_bytes())) if change else path.unlink()
    return copy


def flip_a_bit(data):
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


def test_missing_and_short_shards_are_named_at_the_start(counted, tmp_path):
    tokens = f"columns/tokens-{open_prepared(counted).tokenizer.stem}"
    for name, change in (
        ("000001/train.array_record", None),
        ("000002/train.array_record", lambda data: data[:-1]),
        (f"{tokens}/000003/train.array_record", None),
    ):
        copy = damaged(counted, tmp_path, name, change)
        shard = "/".join(name.split("/")[-2:])
        with pytest.raises(DataError, match=rf"is not whole: {shard} of 4 shards missing or cut"):
            open_prepared(copy)


def test_verify_reads_all_of_it_again(counted, tmp_path, capsys):
    verify(counted)
    assert "verified 8 shards: 34 records" in capsys.readouterr().out
    tokens = f"columns/tokens-{open_prepared(counted).tokenizer.stem}/000000/train.array_record"
    for name in ("000001/train.array_record", tokens):
        copy = damaged(counted, tmp_path, name, flip_a_bit)
        with pytest.raises(DataError, match=rf"1 of 8 shards are damaged:\n  .*{name}: its sha256 differs"):
            verify(copy)


@pytest.mark.parametrize("name", ["dataset.json", "composition.json"])
def test_a_damaged_manifest_is_an_error(counted, tmp_path, name):
    edited = lambda **changes: lambda data: json.dumps({**json.loads(data), **changes}).encode()  # noqa: E731
    for change in (lambda data: data[:50], edited(new=1), edited(format="x")):
        with pytest.raises(DataError, match=str(tmp_path)):
            open_prepared(damaged(counted, tmp_path, name, change))
    with pytest.raises(DataError, match="has format 2, not 3"):
        open_prepared(damaged(counted, tmp_path, name, edited(format=2)))


def test_a_column_of_other_records_or_another_tokenizer_is_refused(counted, tmp_path):
    column = f"columns/tokens-{open_prepared(counted).tokenizer.stem}/column.json"
    for key, what in (("records", "other records"), ("made_by", "other tokenizer or weights")):
        change = lambda data, key=key: json.dumps({**json.loads(data), key: "0" * 64}).encode()  # noqa: E731
        with pytest.raises(DataError, match=f"was made from {what}: their fingerprint is 000000000000"):
            open_prepared(damaged(counted, tmp_path, column, change))


def test_an_incomplete_column_is_refused_naming_its_shards(counted, tmp_path):
    copy = dataclasses.replace(counted, directory=str(tmp_path))
    shutil.copytree(task_directory(counted), task_directory(copy))
    column = task_directory(copy) / "columns" / f"tokens-{open_prepared(counted).tokenizer.stem}"
    column.rename(column.with_name(f".{column.name}.preparing"))
    with pytest.raises(DataError, match=r"is incomplete: 000000/train\.array_record, .* of 4 shards are missing"):
        open_prepared(copy)


def test_two_tokenizers_stand_side_by_side(counted, tmp_path):
    """A named one beside the trained one: each config reads its own column."""
    copy = dataclasses.replace(counted, directory=str(tmp_path / "data"))
    shutil.copytree(task_directory(counted), task_directory(copy))
    train_vocabulary(["letters only"], 300, tmp_path / "mine.model")
    other = dataclasses.replace(copy, tokenizer=str(tmp_path / "mine.model"))
    trained, named = open_prepared(copy), prepare(other, say=lambda _: None)
    assert trained.fingerprint != named.fingerprint
    assert {path.name for path in (task_directory(copy) / "columns").iterdir() if path.is_dir()} == {
        f"tokens-{trained.tokenizer.stem}",
        f"tokens-mine-{file_sha256(tmp_path / 'mine.model')[:8]}",
    }
    assert (prompt_tokens(copy)(["image 7"]) != prompt_tokens(other)(["image 7"])).any()


def test_captions_that_are_cut_are_counted(counted):
    """By the histogram of a column: two captions of 5 tokens and one of 7."""
    histograms = {"caption": {"5": 2, "7": 1}, "other": {"6": 4}}
    assert [truncated_captions(histograms, length) for length in (4, 5, 6, 7)] == [7, 5, 1, 0]


def test_a_tokenizer_with_more_pieces_than_the_embedding_is_refused(counted, tmp_path):
    """Its highest tokens would be read as another one's."""
    train_vocabulary(["letters of many words"], 300, tmp_path / "large.model")
    named = dataclasses.replace(counted, tokenizer=str(tmp_path / "large.model"), vocab_size=260)
    with pytest.raises(DataError, match=r"data\.vocab_size = 260: must be at least \d+, the pieces of .*large\.model"):
        prepare(named)


def test_a_mixture_whose_file_has_changed_is_read_again(tmp_path, capsys):
    """Its rates are; records stay if they are said to have the same source, and a line says so."""
    path = module(tmp_path, "part", "10", 'add_mixture("both", [("part", 0.5), ("shapes", 0.5)])')
    config = make_config(tmp_path / "data", module=path, task="both", vocab_size=400, **PLAIN)
    before = prepare(config)
    text = Path(path).read_text()
    import seqio

    for registry, name in ((seqio.TaskRegistry, "part"), (seqio.MixtureRegistry, "both")):
        registry.remove(name)  # as in a new process
    Path(path).write_text(text.replace("0.5", "0.25", 1))
    with pytest.raises(DataError, match="data/part was prepared with another"):
        prepare(config)
    after = prepare(config, same_source=True)
    assert [one.rate for one in before.composition.components] == ["1/2", "1/2"]
    assert [one.rate for one in after.composition.components] == ["1/4", "1/2"]
    assert after.fingerprint != before.fingerprint
    out = capsys.readouterr().out
    assert "part.py has changed since" in out
    assert "data/part was prepared with another" in out


def test_a_column_that_stops_at_its_end_computes_nothing_again(counted, tmp_path, monkeypatch):
    copy = dataclasses.replace(counted, directory=str(tmp_path / "data"))
    shutil.copytree(task_directory(counted), task_directory(copy))
    shutil.rmtree(task_directory(copy) / "columns")

    def stop(*_):
        raise KeyboardInterrupt

    def rename(path, to, real=Path.rename):
        return stop() if to.parent.name == "columns" else real(path, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        prepare(copy, say=lambda _: None)
    monkeypatch.undo()
    monkeypatch.setattr("ecdit.data.columns._write_one", lambda *_: pytest.fail("computed again"))
    prepare(copy, say=lambda _: None)
    assert files(task_directory(copy)) == files(task_directory(counted))


def test_a_tokenizer_with_other_special_tokens_is_refused(tmp_path):
    import sentencepiece

    options = {"vocab_size": 300, "byte_fallback": True, "hard_vocab_limit": False, "minloglevel": 2}
    prefix = str(tmp_path / "other")
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["a b"]), model_prefix=prefix, **options)
    with pytest.raises(DataError, match=r"other\.model pads with -1 and ends captions with 2: these must be 0 and 1"):
        tokenize(tmp_path / "other.model", ["a"], 4)


def test_a_column_with_a_row_too_few_is_an_error(counted):
    @dataclasses.dataclass(frozen=True)
    class Short:
        name: str = "latents-short"
        made_by: str = ""
        process_bytes: int = 0

        def values(self, records):
            yield from ((b"", {}) for record in list(records)[1:])

    task, manifest = task_directory(counted), read_records_manifest(counted, "counted")
    second = dataclasses.replace(manifest, train=manifest.train[1:])
    with pytest.raises(DataError, match=r"latents-short of .*: 9 rows for 10 records of 000001/train"):
        make_column(task, second, Short(), 1, lambda _: None)
    shutil.rmtree(task / "columns/.latents-short.preparing")


def test_a_log_shows_the_records_of_a_shard_whose_column_is_computed(counted, monkeypatch, capsys):
    """Not only whole shards: the data may have one, which takes hours."""

    @dataclasses.dataclass(frozen=True)
    class Nothing:
        name: str = "latents-nothing"
        made_by: str = ""
        process_bytes: int = 0

        def values(self, records):
            yield from ((b"", {}) for _ in records)

    monkeypatch.setattr(progress, "EVERY", 1e-9)
    task, manifest = task_directory(counted), read_records_manifest(counted, "counted")
    one = dataclasses.replace(manifest, train=manifest.train[:1], held_out=())
    make_column(task, one, Nothing(), 1, lambda _: None)
    shutil.rmtree(task / "columns/latents-nothing")
    lines, records = capsys.readouterr().err.splitlines(), one.train[0].records
    starts = [line.partition(" (")[0] for line in lines]
    assert starts == [f"latents-nothing: {n} of {records} records" for n in range(1, records)]
    assert records > 1


def test_the_fingerprint_of_a_run_s_data_follows_its_tokenizer_and_rates(tmp_path):
    """Of generated rows, which have no records and no column that could tell."""
    for name in ("ab", "cd"):
        train_vocabulary([name], 300, tmp_path / f"{name}.model")
    found = set()
    for name, rate in (("a", 0.5), ("b", 0.25), ("c", 0.5)):
        more = f'add_mixture("two_shapes_{name}", [("shapes", {rate}), ("shapes_textured", {1 - rate})])'
        config = make_config(
            tmp_path / name,
            module=module(tmp_path, f"nothing_{name}", "1", more),
            task=f"two_shapes_{name}",
            crop_padding=0,
            flip_probability=0,
        )
        for tokenizer in ("ab", "cd"):
            named = dataclasses.replace(config, tokenizer=str(tmp_path / f"{tokenizer}.model"))
            found.add(prepare(named, say=lambda _: None).fingerprint)
    assert len(found) == 4  # two rates with two tokenizers; the names of tasks change nothing


def test_a_first_look_reports_and_draws_and_writes_no_records(counted, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    drawn = []
    first_look(counted, 20, lambda *given: drawn.append(given))
    out = capsys.readouterr().out
    assert "19 of 20 pairs in 4 shards are kept" in out
    assert "1 left out for undecodable, such as 'part 0:key3'" in out
    ((images, captions, path),) = drawn
    assert images.shape == (10, 32, 32, 3)
    assert captions[:4] == ["image 0", "image 1", "image 2", "image 4"]
    assert (str(path), list(tmp_path.iterdir())) == ("first_look_counted.png", [])


def test_the_emoji_of_another_directory(tmp_path):
    for name in sorted(names())[100:103]:
        Image.fromarray(np.zeros((72, 72, 3), np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "no_emoji.png").write_bytes(png(np.zeros((72, 72, 3), np.uint8)))
    source = Emoji(str(tmp_path))
    assert [pair.key for pair in source.read("emoji")] == sorted(names())[100:103]
    before = source.stamp("emoji")
    (tmp_path / f"{sorted(names())[100]}.png").write_bytes(b"")
    assert source.stamp("emoji") != before
    with pytest.raises(DataError, match="no_such is not a directory"):
        list(Emoji(str(tmp_path / "no_such")).read("emoji"))


@pytest.mark.parametrize("package", ["seqio", "tensorflow_datasets"])
def test_a_package_that_preparing_needs_is_named_with_the_extra_that_brings_it(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "ecdit.data.tasks", raising=False)  # which another test has imported
    name = package.replace("_", "-")
    if package == "seqio":
        with pytest.raises(DataError, match=rf"needs the package {name}, .*pip install -e '\.\[data\]'"):
            prepare(make_config(tmp_path / "data"))


def test_unknown_tasks_and_failing_modules_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"data\.task = 'coco_2099' is not registered in ecdit/data/tasks\.py.*emoji"):
        prepare(make_config(tmp_path, task="coco_2099"))
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0")
    with pytest.raises(DataError, match=r"data\.module = .*broken\.py' failed: ZeroDivisionError"):
        prepare(make_config(tmp_path, module=str(broken), task="mine"))
    with pytest.raises(ConfigError, match=r"data\.module = .*none\.py': there is no such file"):
        prepare(make_config(tmp_path, module=str(tmp_path / "none.py"), task="mine"))


def test_a_vocabulary_without_room_for_the_characters_is_an_error(tmp_path):
    letters = ["".join(chr(0x4E00 + 40 * row + column) for column in range(40)) for row in range(40)]
    with pytest.raises(DataError, match=r"data\.vocab_size = 300"):
        train_vocabulary(letters, 300, tmp_path / "vocabulary.model")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("task", "../coco"),
        ("module", "tasks"),
        ("directory", ""),
        ("image_size", 0),
        ("latent_channels", -1),
        ("caption_length", 0),
        ("vocab_size", 259),
        ("captions", {}),
        ("captions", {"caption": 0.0}),
        ("captions", {"caption": -1.0, "other": 2.0}),
        ("captions", {"caption": "often"}),
        ("caption_dropout", 1.1),
        ("flip_probability", -0.1),
        ("crop_padding", -1),
        ("num_threads", -1),
        ("prefetch", 0),
    ],
)
def test_impossible_settings_are_refused(key, value):
    with pytest.raises(ConfigError) as error:
        dataclasses.replace(make_config(), **{key: value})
    assert (error.value.key, error.value.value) == (key, value)


@pytest.mark.parametrize(("key", "value"), [("quality", 0), ("quality", 101), ("max_pixels", 0), ("held_out", 1.0)])
def test_impossible_settings_of_preparation_are_refused(key, value):
    with pytest.raises(ConfigError) as error:
        make_config(prepare={key: value})
    assert (error.value.key, error.value.value) == (key, value)


def test_a_field_stands_for_its_list():
    captions = {"captions": 1.0, "alt": 0.5, "none": 0.0}
    names = ("captions.0", "captions.12", "alt", "captions.x", "other", "captions.", "none")
    assert [rate_of(captions, name) for name in names] == ["captions", "captions", "alt", None, None, None, None]


def test_training_and_sampling_import_no_tensorflow(emoji):
    program = f"""if True:
        import sys
        from ecdit.data.config import DataConfig, PrepareConfig
        from ecdit.data.filters import Filters
        from ecdit.data.loader import make_loader
        from ecdit.data.prepared import prepare, prompt_tokens
        config = {emoji.config!r}
        prepare(config)
        next(make_loader(config, 0, 8, 0, range(8)))
        prompt_tokens(config)(["tiger"])
        assert not {{"tensorflow", "seqio", "tensorflow_datasets"}} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
