"""Tests prompts of which the vocabulary keeps nothing or only a part."""

import re

import pytest

from ecdit.config import ConfigError
from ecdit.data.text import EOS
from ecdit.data.tokenizer import PromptTokens, Tokenizer
from ecdit.errors import UserError
from ecdit.sampling.prompts import check_prompts, prompt_lines
from tests.runs import tiny

LENGTH = 4


class Letters:
    """A token for each letter a to z, none for any other character, as a vocabulary without them; `pad` fills rows."""

    end = EOS

    def __init__(self, pad, spelt=""):
        self.pad, self.spelt = pad, spelt  # `spelt` is the end token in a caption

    def rows(self, captions):
        ids = {self.spelt: EOS} | {chr(code): code for code in range(ord("a"), ord("z") + 1)}
        return [[ids[letter] for letter in caption if letter in ids] + [EOS] for caption in captions]


@pytest.fixture(params=[(0,), (EOS,), (0, EOS)], ids=["t5", "clip", "both"])  # CLIP fills rows with its end
def tokenize(request):
    return PromptTokens(Tokenizer([Letters(pad) for pad in request.param]), LENGTH)


def test_a_prompt_of_which_nothing_is_left_is_refused(tokenize):
    with pytest.raises(UserError, match=re.escape("prompt '??': the run's vocabulary has nothing of it")):
        check_prompts(tokenize, ["abc", "??"])


def test_a_prompt_that_is_cut_is_warned_about_once(tokenize):
    """abc and its end fill the four places; abcd has no place for its end."""
    assert check_prompts(tokenize, ["a", "abc"]) == []
    (warning,) = check_prompts(tokenize, ["abc", "abcd", "abcd"])
    assert warning.startswith("prompt 'abcd': is cut after 4 tokens")


def test_a_long_prompt_does_not_fill_the_log(tokenize):
    (warning,) = check_prompts(tokenize, [5000 * "ab"])
    assert warning.startswith(f"prompt '{40 * 'ab'}'... (10000 characters): is cut after 4 tokens")
    assert len(warning) < 200


def test_data_in_a_bucket_is_refused_with_what_to_do():
    with pytest.raises(
        ConfigError, match=re.escape("config.data.directory = 'gs://b/data': must be a directory: mount")
    ):
        tiny(data__directory="gs://b/data")


@pytest.mark.parametrize(
    "content", [b"red heart\ntiger\n", b"\xef\xbb\xbfred heart\ntiger", b"\xef\xbb\xbfred heart\r\ntiger\r\n"]
)
def test_a_prompt_is_a_line_of_the_file(tmp_path, content):
    (tmp_path / "prompts.txt").write_bytes(content)
    assert prompt_lines(str(tmp_path / "prompts.txt")) == ["red heart", "tiger"]


@pytest.mark.parametrize(
    ("content", "said"), [(b"a\n \t\nb\n", "line 2 is empty"), (b"a\n\xff\n", "utf-8"), (b"", "no prompts")]
)
def test_a_file_with_a_line_that_is_no_prompt_is_refused(tmp_path, content, said):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{re.escape(str(path))}.*{said}"):
        prompt_lines(str(path))


def test_an_end_token_that_a_caption_spells_ends_it_and_no_other_part_of_the_row():
    """Ids are stored at their true length, and the first end of each part tells where the next one begins."""
    tokenizer = Tokenizer([Letters(0, spelt="|"), Letters(EOS)])
    stored = tokenizer.encode("a|b")
    a, b = ord("a"), ord("b")
    assert stored.tolist() == [a, EOS, a, b, EOS]
    assert tokenizer.fit(stored, LENGTH).tolist() == [a, EOS, 0, 0, a, b, EOS, EOS]
