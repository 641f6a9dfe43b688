"""Compares CLIP's text encoder and T5's with transformers', at random weights."""

import numpy as np
import pytest

from ecdit.pretrained.clip_text import CLIP_TEXT_LAYOUT, ClipText, ClipTextConfig, read_clip_text
from ecdit.pretrained.t5_encoder import T5_LAYOUT, T5Config, T5Encoder, read_t5, relative_buckets
from tests.parity.networks import ORDER, draw, loaded, parameter_count, relative_error, report

TOLERANCE = 1e-5  # of the spread of the output; with the other GELU the states differ by 1e-4

SHAPES = [(1, 77), (3, 5), (2, 31)]  # captions, tokens
EOT = 98


def clip_tokens(batch, length):
    """Captions of several lengths: words below EOT, the end, and padding with zeros, or with EOT in the last row."""
    rng = np.random.default_rng(length)
    tokens = rng.integers(1, EOT, (batch, length))
    for row in range(batch):
        end = length - 1 - row * (length // (2 * batch))
        tokens[row, end:] = EOT if row == batch - 1 else 0
        tokens[row, end] = EOT
    return tokens.astype(np.int32)


def clip_config(transformers, activation):
    # eos_token_id 2 makes transformers take the state at the largest id, as all published configs did.
    return transformers.CLIPTextConfig(
        vocab_size=99, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        projection_dim=20, hidden_act=activation, max_position_embeddings=77, eos_token_id=2,
    )  # fmt: skip


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize(("batch", "length"), SHAPES, ids=ORDER)
def test_clip_text(torch, transformers, tmp_path, activation, batch, length, record_property):
    theirs = draw(torch, transformers.CLIPTextModelWithProjection(clip_config(transformers, activation)))
    theirs.save_pretrained(tmp_path)
    tokens = clip_tokens(batch, length)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.int64), output_hidden_states=True)
    for states, expected_states in (("last", expected.last_hidden_state), ("penultimate", expected.hidden_states[-2])):
        config = read_clip_text(tmp_path, projection=True, states=states, dtype="float32")
        text = loaded(lambda rngs, c=config: ClipText(c, length, rngs), CLIP_TEXT_LAYOUT, tmp_path)(tokens)
        errors = relative_error(text.states, expected_states), relative_error(text.pooled, expected.text_embeds)
        report(record_property, f"CLIP text, {activation}, {states}", f"{batch} x {length}", max(errors))
        assert max(errors) <= TOLERANCE


def test_clip_text_without_projection_has_the_names_of_every_version(torch, transformers, tmp_path):
    """transformers 5 leaves out the prefix text_model, older versions write it."""
    from safetensors.torch import load_file, save_file

    theirs = draw(torch, transformers.CLIPTextModel(clip_config(transformers, "gelu")))
    theirs.save_pretrained(tmp_path)
    tokens = clip_tokens(2, 9)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.int64)).pooler_output
    weights = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("text_model."): value for name, value in weights.items()}
    config = read_clip_text(tmp_path, projection=False, states="last", dtype="float32")
    for named in (bare, {f"text_model.{name}": value for name, value in bare.items()}):
        save_file(named, tmp_path / "model.safetensors")
        text = loaded(lambda rngs: ClipText(config, 9, rngs), CLIP_TEXT_LAYOUT, tmp_path)(tokens)
        assert relative_error(text.pooled, expected) <= TOLERANCE


@pytest.mark.parametrize("mlp", ["relu", "gated-gelu"])
@pytest.mark.parametrize(("batch", "length"), [(1, 128), (3, 5), (2, 301)], ids=ORDER)
def test_t5(torch, transformers, tmp_path, mlp, batch, length, record_property):
    config = transformers.T5Config(
        vocab_size=120, d_model=40, d_kv=12, d_ff=72, num_layers=3, num_heads=5, feed_forward_proj=mlp
    )
    theirs = draw(torch, transformers.T5EncoderModel(config), seed=length)
    theirs.save_pretrained(tmp_path)
    rng = np.random.default_rng(length)
    tokens = rng.integers(2, 120, (batch, length)).astype(np.int32)
    for row in range(batch):
        end = length - 1 - row * (length // 3)
        tokens[row, end:], tokens[row, end] = 0, 1
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.int64), attention_mask=torch.tensor(tokens != 0))
    ours = loaded(lambda rngs: T5Encoder(read_t5(tmp_path, "float32"), length, rngs), T5_LAYOUT, tmp_path)
    error = relative_error(ours(tokens).states, expected.last_hidden_state)
    report(record_property, f"T5, {mlp}", f"{batch} x {length}", error)
    assert error <= TOLERANCE


def test_t5_buckets_at_every_distance(torch, transformers):
    """Distances on the bound of two buckets fall where float32 rounds them."""
    from transformers.models.t5.modeling_t5 import T5Attention

    offsets = torch.arange(600)[None, :] - torch.arange(600)[:, None]
    for buckets, max_distance in ((32, 128), (16, 64), (32, 100)):
        theirs = T5Attention._relative_position_bucket(offsets, True, buckets, max_distance)
        np.testing.assert_array_equal(relative_buckets(600, buckets, max_distance), theirs.numpy())


def test_parameter_counts_of_published_sizes():
    clip = ClipTextConfig(49408, 768, 3072, 12, 12, 77, 0, "quick_gelu", 1e-5, "last", "float32")
    assert parameter_count(lambda rngs: ClipText(clip, 77, rngs)) == 123_060_480
    t5 = T5Config(32128, 4096, 10240, 24, 64, 64, 32, 128, "gated-gelu", 1e-6, "bfloat16")
    assert parameter_count(lambda rngs: T5Encoder(t5, 128, rngs)) == 4_762_310_656
