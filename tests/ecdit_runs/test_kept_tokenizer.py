"""The workdir's own copy of the tokenizer: prompts are encoded by it, whatever becomes of the data."""

import dataclasses
import re
import shutil

import numpy as np
import pytest

from ecdit.checkpoints.restore import CheckpointError
from ecdit.data import DataError
from ecdit.data.prepared import prompt_tokens
from ecdit.data.text import train_vocabulary
from ecdit.data.tokenizer import SPIECE, tokenizer_of
from ecdit.data.tokens import hash_files, tokenizer_files, tokenizer_path
from ecdit.runs.kept_tokenizer import FOLDER, encoder, find_tokenizer, keep_tokenizer, kept_files, open_tokenizer
from tests.runs import tiny

WORDS = ["red heart", "tiger", "an owl in the moonlight"]


@pytest.fixture
def data(emoji_data, tmp_path):
    """The config of prepared data whose tokenizer a test may replace."""
    config = tiny(data__directory=str(tmp_path / "data")).data
    path = tokenizer_path(config)
    path.parent.mkdir(parents=True)
    shutil.copyfile(tokenizer_path(dataclasses.replace(config, directory=str(emoji_data))), path)
    return config


def encoded(workdir, config, vocabulary):
    tokens = encoder(find_tokenizer(workdir, config, vocabulary), config)(WORDS)
    np.testing.assert_array_equal(open_tokenizer(workdir, config)(WORDS), tokens)
    return tokens


def replace_vocabulary(config):
    """Puts another vocabulary of the same name into the data."""
    train_vocabulary(["letters of many other words", "rehtona eno"], 300, tokenizer_path(config))


def test_prompts_are_encoded_as_in_training(data, tmp_path):
    expected = prompt_tokens(data)(WORDS)
    keep_tokenizer(tokenizer_files(data), tmp_path)
    vocabulary = hash_files(tokenizer_files(data))
    replace_vocabulary(data)
    assert (prompt_tokens(data)(WORDS) != expected).any()
    np.testing.assert_array_equal(encoded(tmp_path, data, vocabulary), expected)
    shutil.rmtree(tmp_path / "data")
    np.testing.assert_array_equal(encoded(tmp_path, data, vocabulary), expected)


def test_a_run_without_a_copy_takes_the_data_s_own_only_if_it_is_the_same(data, tmp_path):
    """An older version made it."""
    expected, vocabulary = prompt_tokens(data)(WORDS), hash_files(tokenizer_files(data))
    np.testing.assert_array_equal(encoded(tmp_path, data, vocabulary), expected)
    replace_vocabulary(data)
    found = hash_files(tokenizer_files(data))[:12]
    says = f"the tokenizer in {data.directory} is not the one of the training: its hash is {found}, and {tmp_path} was"
    with pytest.raises(CheckpointError, match=re.escape(says)):
        find_tokenizer(tmp_path, data, vocabulary)
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(CheckpointError, match=f"{tmp_path} has no {FOLDER}/, and the run's data is not there"):
        find_tokenizer(tmp_path, data, vocabulary)


def test_a_copy_that_was_changed_is_refused(data, tmp_path):
    keep_tokenizer(tokenizer_files(data), tmp_path)
    vocabulary = hash_files(tokenizer_files(data))
    train_vocabulary(["letters"], 300, tmp_path / FOLDER / SPIECE)
    with pytest.raises(CheckpointError, match=f"the tokenizer in {tmp_path}/{FOLDER} is not the one of the training"):
        find_tokenizer(tmp_path, data, vocabulary)
    keep_tokenizer(tokenizer_files(data), tmp_path)  # the next start of the training mends it
    find_tokenizer(tmp_path, data, vocabulary)


def test_a_folder_of_several_files_is_kept_whole(tmp_path):
    """As CLIP's vocabulary and merges are. What a killed writer has left does not count."""
    files = {"vocab.json": b"{}", "merges.txt": b"a b"}
    keep_tokenizer(files, tmp_path)
    (tmp_path / FOLDER / ".merges.txt.1.tmp").write_bytes(b"a")
    assert kept_files(tmp_path) == files
    assert hash_files(kept_files(tmp_path)) == hash_files(dict(reversed(files.items())))
    swapped = {"vocab.json": b"a b", "merges.txt": b"{}"}
    assert len({hash_files(one) for one in (files, swapped, {"vocab.json": b"{}"})}) == 3
    with pytest.raises(DataError, match=r"files vocab\.json, merges\.txt is not known: there must be spiece\.model"):
        tokenizer_of(files, public=False)


def test_training_keeps_its_tokenizer_and_a_start_over_moves_it_aside(toy):
    toy.train(num_steps=4, every=2)
    assert kept_files(toy.workdir) == {"words.txt": b"toy's words"}
    shutil.rmtree(toy.workdir / "checkpoints")
    toy.accepted = dataclasses.replace(toy.accepted, start_over=True)
    toy.train(num_steps=2, every=2)
    assert kept_files(toy.workdir / "before_start_over/1") == {"words.txt": b"toy's words"}
