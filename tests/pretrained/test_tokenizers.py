"""Tests tokenizers on vocabularies that are small enough to encode by hand."""

import json

import numpy as np
import pytest
import sentencepiece

from ecdit.errors import UserError
from ecdit.pretrained.config_json import WeightsError
from ecdit.pretrained.tokenizers import ClipTokenizer, T5Tokenizer

PIECES = ["a", "b", "c", "!", "a</w>", "b</w>", "c</w>", "!</w>", "ab", "abc</w>", "ab</w>"]
VOCABULARY = {piece: number for number, piece in enumerate([*PIECES, "<|startoftext|>", "<|endoftext|>"])}
MERGES = "#version: 0.2\na b\nab c</w>\na b</w>\n"
START, END = 11, 12


@pytest.fixture(autouse=True)
def _package():
    pytest.importorskip("tokenizers", reason="needs the extra pretrained")


def clip_folder(folder, pad="<|endoftext|>", vocabulary=VOCABULARY, merges=MERGES):
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text(merges)
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": pad, "special": True}}))
    return folder


@pytest.mark.parametrize("cleaning", ["open_clip", "transformers"])
def test_pairs_are_merged_in_their_order(cleaning, tmp_path):
    tokens = ClipTokenizer(clip_folder(tmp_path), cleaning).encode(["ABC ab", " ba\n", ""], 7)
    np.testing.assert_array_equal(tokens.ids[0], [START, 9, 10, END, END, END, END])
    np.testing.assert_array_equal(tokens.ids[1], [START, 1, 4, END, END, END, END])
    np.testing.assert_array_equal(tokens.ids[2], [START, END, END, END, END, END, END])
    np.testing.assert_array_equal(tokens.lengths, [4, 4, 2])
    assert tokens.ids.dtype == tokens.lengths.dtype == np.int32


def test_padding_is_the_folder_s(tmp_path):
    tokens = ClipTokenizer(clip_folder(tmp_path, pad="a"), "open_clip").encode(["b"], 5)
    np.testing.assert_array_equal(tokens.ids, [[START, 5, END, 0, 0]])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "c"}))
    tokens = ClipTokenizer(tmp_path, "open_clip").encode(["b"], 5)
    np.testing.assert_array_equal(tokens.ids, [[START, 5, END, 2, 2]])


def test_a_padding_token_in_a_caption_is_one_for_transformers_alone(tmp_path):
    folder = clip_folder(tmp_path, pad="!")
    np.testing.assert_array_equal(ClipTokenizer(folder, "open_clip").encode(["a!"], 4).ids, [[START, 4, 7, END]])
    np.testing.assert_array_equal(ClipTokenizer(folder, "transformers").encode(["a!"], 4).ids, [[START, 4, 3, END]])


def test_a_long_caption_is_cut_before_its_end(tmp_path):
    tokens = ClipTokenizer(clip_folder(tmp_path), "open_clip").encode(["a b c a", "a b"], 4)
    np.testing.assert_array_equal(tokens.ids, [[START, 4, 5, END], [START, 4, 5, END]])
    np.testing.assert_array_equal(tokens.lengths, [4, 4])


def test_no_captions_give_no_rows(tmp_path):
    assert ClipTokenizer(clip_folder(tmp_path), "open_clip").encode([], 4).ids.shape == (0, 4)


def test_entities_are_resolved_as_open_clip_does(tmp_path):
    folder = clip_folder(tmp_path)
    open_clip = ClipTokenizer(folder, "open_clip").encode(["&#97;b"], 6)
    np.testing.assert_array_equal(open_clip.ids, [[START, 10, END, END, END, END]])


def test_a_folder_may_have_tokenizer_json_alone(tmp_path):
    folder = clip_folder(tmp_path)
    for merges in (["a b", "ab c</w>", "a b</w>"], [["a", "b"], ["ab", "c</w>"], ["a", "b</w>"]]):
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": VOCABULARY, "merges": merges}}))
        (folder / "vocab.json").unlink(missing_ok=True)
        ids = ClipTokenizer(folder, "transformers").encode(["abc ab"], 4).ids
        np.testing.assert_array_equal(ids, [[START, 9, 10, END]])


def test_a_clip_tokenizer_must_fit_the_embedding(tmp_path):
    tokenizer = ClipTokenizer(clip_folder(tmp_path), "open_clip")
    tokenizer.check_fits(13)
    for rows in (12, 14):
        with pytest.raises(WeightsError, match=f"has 13 tokens, the text encoder's embedding {rows} rows"):
            tokenizer.check_fits(rows)
    other = ClipTokenizer(clip_folder(tmp_path, vocabulary=VOCABULARY | {"z": 13}), "open_clip")
    with pytest.raises(WeightsError, match="the end token has id 12, it must be the largest, 13"):
        other.check_fits(14)


def test_broken_folders_are_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"has neither vocab.json and merges.txt nor tokenizer.json"):
        ClipTokenizer(tmp_path, "open_clip")
    with pytest.raises(WeightsError, match=r"the vocabulary lacks pad_token '<pad>'"):
        ClipTokenizer(clip_folder(tmp_path, pad="<pad>"), "open_clip")
    with pytest.raises(WeightsError, match=r"no pairs of the vocabulary: \[\('x', 'y'\)\]"):
        ClipTokenizer(clip_folder(tmp_path, merges="a b\nx y\n"), "open_clip")
    for model, message in (
        (
            {"type": "Unigram", "vocab": [["<pad>", 0.0]]},
            r"its type is Unigram. T5's tokenizer is read from spiece.model",
        ),
        (3, "the vocabulary must be an object from tokens to ids"),
    ):
        (tmp_path / "vocab.json").unlink(missing_ok=True)
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
        with pytest.raises(WeightsError, match=message):
            ClipTokenizer(tmp_path, "open_clip")
    clip_folder(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(WeightsError, match=r"merges.txt cannot be read"):
        ClipTokenizer(tmp_path, "open_clip")


@pytest.mark.parametrize("index", [-1, 2**31, True, 1.0, "3", 0])
def test_ids_are_numbers_each_of_one_token(index, tmp_path):
    """0 is the id of another token."""
    with pytest.raises(WeightsError, match="an object from tokens to ids, each of another token"):
        ClipTokenizer(clip_folder(tmp_path, vocabulary=VOCABULARY | {"z": index}), "open_clip")


@pytest.mark.parametrize("merges", [[1], [["a", 1]], [["a", "b", "c"]], [{"a": "b"}], {"ab": 1}])
def test_merges_are_pairs_of_tokens(merges, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": VOCABULARY, "merges": merges}}))
    with pytest.raises(WeightsError, match="no pairs of the vocabulary"):
        ClipTokenizer(tmp_path, "open_clip")


def test_merges_that_were_cut_are_refused(tmp_path):
    """As by a download: the captions would be cut into pieces that the text encoder has not seen them in."""
    cut = MERGES[: MERGES.index("ab c</w>")]
    with pytest.raises(WeightsError, match=r"no merge makes 2 tokens of the vocabulary, such as abc</w>, ab</w>:"):
        ClipTokenizer(clip_folder(tmp_path, merges=cut), "open_clip")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(UserError, match=r"needs the package ftfy: pip install -e '.\[pretrained\]'"):
        ClipTokenizer(clip_folder(tmp_path), "open_clip")


def train_pieces(folder, **changes):
    options = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} | changes
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["aa bb", "ab ba", "a b a b"] * 5), model_prefix=str(folder / "spiece"),
        vocab_size=8, hard_vocab_limit=False, num_threads=1, minloglevel=2, **options,
    )  # fmt: skip
    return folder


def test_t5_s_captions_end_and_are_padded_with_zeros(tmp_path):
    tokenizer = T5Tokenizer(train_pieces(tmp_path))
    tokens = tokenizer.encode(["a", "", "a b a b a b"], 6)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    a = pieces.encode("a")
    np.testing.assert_array_equal(tokens.ids[0, : len(a) + 1], [*a, 1])
    np.testing.assert_array_equal(tokens.ids[0, len(a) + 1 :], 0)
    np.testing.assert_array_equal(tokens.ids[1], [1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(tokens.ids[2], [*pieces.encode("a b a b a b")[:5], 1])
    np.testing.assert_array_equal(tokens.lengths, [len(a) + 1, 1, 6])


def test_a_t5_tokenizer_must_fit_the_embedding(tmp_path):
    tokenizer = T5Tokenizer(train_pieces(tmp_path))
    size = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model")).vocab_size()
    tokenizer.check_fits(size)
    tokenizer.check_fits(size + 128)
    with pytest.raises(WeightsError, match=f"has {size} tokens, the text encoder's embedding {size - 1} rows"):
        tokenizer.check_fits(size - 1)


def test_broken_sentencepiece_models_are_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"spiece.model cannot be read"):
        T5Tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"no model")
    with pytest.raises(WeightsError, match=r"spiece.model cannot be read"):
        T5Tokenizer(tmp_path)
    with pytest.raises(WeightsError, match=r"padding and end have ids \(-1, 2\), T5's have \(0, 1\)"):
        T5Tokenizer(train_pieces(tmp_path, pad_id=-1, unk_id=0, bos_id=1, eos_id=2))
