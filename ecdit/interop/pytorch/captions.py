"""The tokenizer of an exported EC-DIT: turns captions into ids as those of its training were.

This file needs torch, and sentencepiece for a SentencePiece vocabulary, or tokenizers and ftfy for CLIP's. It is the
part `tokenizer/` of what `ecdit.checkpoint export --format=diffusers` writes.
"""

import html
import json
from pathlib import Path

import torch

PAD, END = 0, 1  # of a SentencePiece vocabulary
# CLIP merges byte pairs only inside these pieces: endings after an apostrophe, words, digits, and other characters.
PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
SPECIAL = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}


class Captions:
    """Turns captions into rows of ids, for each text encoder in turn."""

    def __init__(self, parts: list, length: int):
        self.parts, self.length = parts, length

    @classmethod
    def from_pretrained(cls, folder):
        """Returns the tokenizer of a folder, or of its folders `first` and `second` if there are two text encoders."""
        folder = Path(folder)
        config = json.loads((folder / "captions.json").read_text())
        pieces = T5Pieces if config["public"] else Pieces
        sides = [folder / side for side in ("first", "second") if (folder / side).is_dir()] or [folder]
        parts = [pieces(side) if (side / "spiece.model").exists() else Clip(side) for side in sides]
        return cls(parts, config["length"])

    def __call__(self, captions: list[str]) -> torch.Tensor:
        """Returns int64 ids, [n, parts * length]. A caption that is too long is cut, and keeps its end token."""
        rows = []
        for caption in captions:
            row = []
            for part in self.parts:
                ids = part(caption)
                ids = ids[: ids.index(part.end) + 1]  # an end that a caption spells ends it
                ids = ids if len(ids) <= self.length else [*ids[: self.length - 1], part.end]
                row += [*ids, *[part.pad] * (self.length - len(ids))]
            rows.append(row)
        return torch.tensor(rows)


class Pieces:
    """A SentencePiece vocabulary that was trained on the captions."""

    end, pad = END, PAD

    def __init__(self, folder: Path):
        from sentencepiece import SentencePieceProcessor

        self.vocabulary = SentencePieceProcessor(model_file=str(folder / "spiece.model"))

    def __call__(self, caption: str) -> list[int]:
        """Returns the ids of a caption and its end."""
        return [*self.vocabulary.encode(caption), END]


class T5Pieces(Pieces):
    """T5's vocabulary, for which U+0085 is a space."""

    def __call__(self, caption: str) -> list[int]:
        """Returns the ids of a caption and its end."""
        return super().__call__(caption.replace("\x85", " "))


class Clip:
    """CLIP's byte-pair encoding of text that is cleaned as OpenAI and OpenCLIP do."""

    def __init__(self, folder: Path):
        from ftfy import fix_text
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers

        self.fix_text = fix_text
        if (folder / "vocab.json").exists():
            vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
            merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
        else:
            model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
            vocabulary = model["vocab"]
            merges = [tuple(pair.split()) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
        special = special_tokens(folder)
        self.start, self.end, self.pad = (vocabulary[special[key]] for key in SPECIAL)
        ends = {"continuing_subword_prefix": "", "end_of_word_suffix": "</w>", "unk_token": special["eos_token"]}
        self.tokenizer = Tokenizer(models.BPE(vocabulary, merges, **ends))
        pieces = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, byte_level])

    def __call__(self, caption: str) -> list[int]:
        """Returns the ids of a caption between its start and end."""
        clean = " ".join(html.unescape(html.unescape(self.fix_text(caption))).split()).lower()
        return [self.start, *self.tokenizer.encode(clean, add_special_tokens=False).ids, self.end]


def special_tokens(folder: Path) -> dict[str, str]:
    """Returns the tokens for start, end and padding."""
    special = dict(SPECIAL)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the second overrides the first
        values = json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).exists() else {}
        for key in SPECIAL:
            token = values.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            special[key] = token if isinstance(token, str) else special[key]
    return special
