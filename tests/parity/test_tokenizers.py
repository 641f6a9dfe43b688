"""Compares CLIP's and T5's tokenizers with open_clip's and transformers', on 2000 captions of every kind."""

import csv
import gzip
import io
import itertools
import json
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from ecdit.pretrained.tokenizers import ClipTokenizer, T5Tokenizer

SHARED = next((p / "shared/eval" for p in Path(__file__).parents if (p / "shared/eval").is_dir()), None)
# Kinds of words, a line each, and what is hard to see in a text file.
KINDS = [line.split(" ") for line in Path(__file__).with_name("words.txt").read_text(encoding="utf-8").splitlines()]
WORDS, SYMBOLS, EMOJI, SCRIPTS, BROKEN = KINDS
CONTROL = [
    "\t",
    "\n",
    "\r\n",
    "\x00",
    "\x07",
    "\x1b[31m",
    "\x1c",
    "\x85",
    "\xa0",
    "\u200b",
    "\u200d",
    "\u2028",
    "\u3000",
]
CONTROL += ["\t", "\ufeff", "\ufeff", "e\u0301", "\ud7ff", "\U0010ffff"]


@pytest.fixture(scope="module")
def captions():
    """2000 captions; those of PartiPrompts first where they are."""
    rng = random.Random(0)
    found = ["", " ", "a", "'s", "it's", *EMOJI, *SCRIPTS, *BROKEN, *(f"a{c}b" for c in CONTROL)]
    found += [f"{chr(code)} {unicodedata.name(chr(code)).title()}" for code in range(0x1F600, 0x1F640)]
    if SHARED is not None:
        text = (SHARED / "PartiPrompts.tsv").read_text(encoding="utf-8")
        rows = csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
        found += [row[0] for row in list(rows)[1:]]
    found = found[:1780]
    kinds = [*KINDS, CONTROL]
    while len(found) < 1980:
        pool = [word for kind in rng.sample(kinds, rng.randint(1, 4)) for word in kind]
        found.append(rng.choice(["", " ", "  "]).join(rng.choices(pool, k=rng.randint(1, 30))))
    while len(found) < 2000:  # long ones
        text = " ".join(rng.choices(WORDS + SYMBOLS + SCRIPTS + EMOJI, k=400))
        found.append(text[:1000])
    return found


@pytest.fixture(scope="module")
def clip_folder(open_clip, tmp_path_factory):
    """CLIP's vocabulary, which open_clip ships, in the form in which folders have it."""
    folder = tmp_path_factory.mktemp("clip")
    write_clip_vocabulary(open_clip, folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "!", "tokenizer_class": "CLIPTokenizer"}))
    return folder


def write_clip_vocabulary(open_clip, folder):
    """Writes vocab.json and merges.txt."""
    path = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
    merges = gzip.decompress(path.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    theirs = open_clip.tokenizer.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): number for token, number in theirs.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def different(ours, theirs, captions):
    rows = np.flatnonzero((ours != theirs).any(axis=1))
    return [(captions[row], ours[row][:20].tolist(), theirs[row][:20].tolist()) for row in rows[:5]]


@pytest.mark.parametrize("length", [77, 16])
def test_clip_gives_open_clip_s_ids(open_clip, clip_folder, captions, length):
    """open_clip pads with 0, as the folder here does."""
    ours = ClipTokenizer(clip_folder, "open_clip").encode(captions, length)
    theirs = open_clip.tokenizer.SimpleTokenizer()(captions, context_length=length).numpy()
    assert different(ours.ids, theirs, captions) == []
    np.testing.assert_array_equal(ours.lengths, theirs.argmax(axis=1) + 1)
    assert (ours.lengths == length).sum() > 10


def test_clip_gives_transformers_ids(transformers, clip_folder, captions):
    ours = ClipTokenizer(clip_folder, "transformers").encode(captions, 77)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(clip_folder))
    theirs = tokenizer(captions, padding="max_length", truncation=True, max_length=77)
    assert different(ours.ids, np.array(theirs["input_ids"]), captions) == []
    np.testing.assert_array_equal(ours.lengths, np.sum(theirs["attention_mask"], axis=1))


def test_a_folder_that_transformers_saves_gives_the_same(transformers, clip_folder, captions, tmp_path):
    transformers.CLIPTokenizer.from_pretrained(str(clip_folder)).save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists(), "transformers 5 writes tokenizer.json alone"
    ours, again = (ClipTokenizer(folder, "transformers").encode(captions, 77) for folder in (clip_folder, tmp_path))
    np.testing.assert_array_equal(again.ids, ours.ids)


def loses_a_joiner(caption):
    """Whether a zero-width joiner follows a character that normalisation replaces: transformers drops the joiner."""
    return any(b == "\u200d" and unicodedata.normalize("NFKC", a) != a for a, b in itertools.pairwise(caption))


@pytest.mark.parametrize("length", [128, 9])
def test_t5_gives_transformers_ids(transformers, captions, length, tmp_path):
    if SHARED is None:
        pytest.skip("no shared/eval: without its captions there is too little text for 1500 pieces")
    import sentencepiece

    # As T5's own: no byte fallback, no start.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(caption for caption in captions if "\x00" not in caption and len(caption) < 400),
        model_prefix=str(tmp_path / "spiece"), vocab_size=1500, model_type="unigram", character_coverage=0.995,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
    captions = [caption.replace("\u200d", "") if loses_a_joiner(caption) else caption for caption in captions]
    ours = T5Tokenizer(tmp_path).encode(captions, length)
    tokenizer = transformers.T5Tokenizer.from_pretrained(str(tmp_path), extra_ids=0)
    theirs = tokenizer(captions, padding="max_length", truncation=True, max_length=length)
    assert different(ours.ids, np.array(theirs["input_ids"]), captions) == []
    np.testing.assert_array_equal(ours.lengths, np.sum(theirs["attention_mask"], axis=1))
    assert (ours.ids == 2).any(), "some characters are not in the vocabulary"
