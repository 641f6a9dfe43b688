"""Folders of small public towers with random weights, as a user downloads large ones."""

import dataclasses
import json

from ecdit.data.text import train_vocabulary
from ecdit.pretrained.autoencoder_kl import AUTOENCODER_LAYOUT, AutoencoderKL
from ecdit.pretrained.clip_text import CLIP_TEXT_LAYOUT, ClipText
from ecdit.pretrained.t5_encoder import T5_LAYOUT, T5Encoder
from tests.models.helpers import Model
from tests.pretrained.folders import CLIP, CLIP_JSON, T5, T5_JSON, VAE, VAE_JSON, tensors, write_folder

CLIP_TOKENS, POSITIONS, T5_ROWS = 2 * 256 + 2, 16, 400
CAPTIONS = ("red heart", "blue square", "tiger", "the owl of the moon", "cake 12", "grinning face with smiling eyes")


def byte_characters():
    """The characters that stand for the 256 bytes in CLIP's vocabularies."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    return [*map(chr, plain), *(chr(256 + n) for n in range(256 - len(plain)))]


def write_clip(folder, seed=0):
    """CLIP's text encoder, with a tokenizer of bytes alone."""
    config = dataclasses.replace(CLIP, vocab_size=CLIP_TOKENS, positions=POSITIONS)
    model = Model(lambda rngs: ClipText(config, POSITIONS, rngs), seed)
    sizes = {"vocab_size": CLIP_TOKENS, "max_position_embeddings": POSITIONS}
    write_folder(folder, tensors(model, CLIP_TEXT_LAYOUT), CLIP_JSON | sizes)
    letters = byte_characters()
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def _t5(seed):
    config = dataclasses.replace(T5, vocab_size=T5_ROWS)
    return Model(lambda rngs: T5Encoder(config, 8, rngs), seed)


def t5_params(seed=0):
    """The parameters that `write_t5` writes."""
    return _t5(seed).params


def write_t5(folder, seed=0):
    """T5's encoder, with a SentencePiece tokenizer that has fewer pieces than the embedding has rows."""
    write_folder(folder, tensors(_t5(seed), T5_LAYOUT), T5_JSON | {"vocab_size": T5_ROWS})
    train_vocabulary(CAPTIONS, 300, folder / "spiece.model")
    return folder


def write_vae(folder, seed=0):
    """An AutoencoderKL of the public downsampling of 8 and 4 channels."""
    config = dataclasses.replace(VAE, widths=(4, 8, 8, 8))
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    values = VAE_JSON | blocks | {"block_out_channels": [4, 8, 8, 8]}
    return write_folder(
        folder, tensors(Model(lambda rngs: AutoencoderKL(config, rngs), seed), AUTOENCODER_LAYOUT), values
    )
