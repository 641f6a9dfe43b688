"""Tests that packed captions have the states of padded ones, and that they stay on their devices."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ecdit.config import ConfigError
from ecdit.encoders.text_tower import TextTower
from ecdit.models import packing
from ecdit.partitioning import MeshConfig, batch_sharding, make_mesh, param_shardings
from ecdit.pretrained.clip_text import ClipText
from ecdit.pretrained.text_encoders import read_encoders
from tests.encoders.test_text_tower import CONFIG as TOWER
from tests.models.helpers import Model, close, jit
from tests.pretrained.folders import CLIP, CLIP_JSON, T5_JSON

LENGTH = 10
END = 19  # the largest id, as CLIP needs it; the tower takes any
# Tokens with their ends: 31 of 80, in which the longest caption has all ten.
LENGTHS = np.array([3, 10, 1, 6, 2, 1, 5, 3])
ROOM = 5  # a stream of 40 tokens


def captions(lengths, seed=0):
    rng = np.random.default_rng(seed)
    tokens = np.zeros((len(lengths), LENGTH), np.int32)
    for row, length in enumerate(lengths):
        tokens[row, :length] = [*rng.integers(1, END, length - 1), END]
    return tokens


@functools.cache
def encoder(kind, room=ROOM, attention="plain"):
    if kind == "tower":
        config = dataclasses.replace(TOWER, packed_length=room, packed_attention=attention, frozen=True)
        return Model(lambda rngs: TextTower(config, LENGTH, rngs))
    config = dataclasses.replace(CLIP, states=kind)
    return Model(lambda rngs: ClipText(config, LENGTH, rngs, packing.Packing(room, attention)))


def encode(kind, tokens, mode="train", room=ROOM, attention="plain"):
    model = encoder(kind, room, attention)
    return jax.tree.map(np.asarray, jit(lambda params, tokens: model(params)(tokens, mode))(model.params, tokens))


def test_a_stream_by_hand():
    """Captions of 3, 1 and 2 tokens in four chunks of two, each of which sees the one before; two places are free."""
    tokens, lengths = np.array([[5, 6, 7], [8, 0, 0], [9, 4, 0]], np.int32), np.array([3, 1, 2])
    ids, positions, mask, fits = packing._lay_out(jnp.asarray(tokens), jnp.asarray(lengths), 4, 2, 1)
    np.testing.assert_array_equal(ids, [[5, 6], [7, 8], [9, 4], [0, 0]])
    np.testing.assert_array_equal(positions, [[0, 1], [2, 0], [0, 1], [0, 0]])
    seen = [["..x.", "..xx"], ["xxx.", "...x"], ["..x.", "..xx"]]
    np.testing.assert_array_equal(mask[:3], [[[sign == "x" for sign in row] for row in chunk] for chunk in seen])
    assert np.asarray(mask).any(axis=2).all(), "a free place attends to something, so that its state is finite"
    assert np.asarray(fits).tolist() == [True]
    assert not packing._lay_out(jnp.asarray(tokens), jnp.asarray(lengths), 2, 2, 1)[3].any()


@pytest.mark.parametrize(
    ("chunk", "attention"), [(64, "plain"), (4, "plain"), (3, "plain"), (1, "plain"), (64, "fused")]
)
@pytest.mark.parametrize("kind", ["tower", "last", "penultimate"])
def test_packed_states_are_those_of_padded_captions(kind, chunk, attention, monkeypatch):
    """In one chunk a caption, or across up to ten: positions restart, and no caption sees another."""
    monkeypatch.setattr(packing, "CHUNK", chunk)
    tokens = captions(LENGTHS)
    padded, packed = encode(kind, tokens, room=0), encode(kind, tokens, attention=attention)
    np.testing.assert_array_equal(packed.mask, np.arange(LENGTH) < LENGTHS[:, None])
    np.testing.assert_array_equal(packed.mask, padded.mask)
    close(packed.states[packed.mask], padded.states[padded.mask], 1e-5)
    close(packed.pooled, padded.pooled, 1e-5)
    assert (packed.states[~packed.mask] == 0).all(), "they were packed"


def test_captions_that_do_not_fit_are_padded():
    """A stream of 50 tokens takes 50 and not 51, of which none is dropped."""
    for lengths, packed in (([10, 10, 10, 10, 6, 1, 1, 2], True), ([10, 10, 10, 10, 6, 1, 1, 3], False)):
        tokens = captions(lengths)
        found, padded = encode("tower", tokens, room=6), encode("tower", tokens, room=0)
        close(found.states[found.mask], padded.states[padded.mask], 1e-5)
        assert (found.states[~found.mask] == 0).all() == packed
        if not packed:
            jax.tree.map(np.testing.assert_array_equal, found, padded)


def test_only_training_packs():
    """A drawn image does not depend on the captions beside its own, not even by rounding."""
    tokens = captions(LENGTHS)
    jax.tree.map(np.testing.assert_array_equal, encode("tower", tokens, mode="sample"), encode("tower", tokens, room=0))


EIGHT = (8, 1, 1, 1)  # devices along data, fsdp, expert and tensor


@functools.cache
def on_a_mesh(sizes, attention="plain"):
    """The tower's program for 24 captions, and the shardings of its arguments: the state's own for the parameters."""
    mesh = make_mesh(MeshConfig(1, *sizes))
    model = encoder("tower", 6, attention)
    shardings = (param_shardings(model.abstract, mesh), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        function = jit(lambda params, tokens: model(params)(tokens, "train"), in_shardings=shardings)
        return mesh, shardings, function.lower(model.params, captions([1] * 24)).compile()


@pytest.mark.parametrize(
    ("sizes", "attention"),
    [
        (EIGHT, "plain"),
        ((2, 2, 1, 2), "plain"),
        ((1, 2, 2, 2), "plain"),
        ((1, 4, 1, 2), "plain"),
        (EIGHT, "fused"),
        ((1, 2, 2, 2), "fused"),
    ],
    ids=str,
)
def test_each_device_packs_its_own_captions(sizes, attention):
    """A device has three captions and room for 20 tokens; two that share theirs (`tensor`) have six and room for 40.

    If one has a token more all pad theirs, as they run one program, and no token of any caption is lost.
    """
    mesh, shardings, function = on_a_mesh(sizes, attention)
    for last, packed in (([10, 4, 6], True), ([10, 4, 7], False)):
        tokens = captions([3, 10, 1, 6, 2, 1, 5, 3, 8, 7, 9, 1, 10, 4, 2, 1, 1, 1, 9, 9, 2, *last])
        with jax.set_mesh(mesh):
            given = jax.device_put((encoder("tower", 6, attention).params, tokens), shardings)
            found = jax.tree.map(np.asarray, function(*given))
        padded = encode("tower", tokens, room=0)
        close(found.states[found.mask], padded.states[padded.mask], 1e-5)
        close(found.pooled, padded.pooled, 1e-5)
        assert (found.states[~found.mask] == 0).all() == packed


@pytest.mark.parametrize("attention", ["plain", "fused"])
def test_no_caption_crosses_the_mesh(attention):
    """All that the devices exchange is whether their captions fit."""
    text = on_a_mesh(EIGHT, attention)[-1].as_text()
    assert set(re.findall(r" (all-gather|all-to-all|collective-permute|reduce-scatter)[\w-]*\(", text)) == set()
    reduced = re.findall(r"= (\w+\[[\d,]*\])[^=]* all-reduce\(", text)
    assert reduced
    assert set(reduced) <= {"pred[]", "s32[]", "u32[]"}


def test_flops_are_those_of_the_packed_tokens():
    """Width 16, two layers: 5 tokens of 10, each of which attends to the 20 of two chunks."""
    model = encoder("tower")
    tower = model(model.abstract)
    assert tower.flops(LENGTH, "train").flops == 2 * 2 * (5 * 12 * 16**2 + 2 * 5 * 20 * 16)
    assert tower.flops(LENGTH, "sample").flops == 2 * 2 * (10 * 12 * 16**2 + 2 * 10 * 10 * 16)
    assert (tower.flops(LENGTH, "train").tokens, tower.flops(LENGTH, "sample").tokens) == (10, 20)


def test_a_folder_s_encoder_packs_if_it_is_causal(tmp_path):
    made = {}
    for name, values in (("clip", CLIP_JSON), ("t5", T5_JSON)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(values))
        made[name] = dataclasses.replace(TOWER, weights=str(tmp_path / name), packed_length=ROOM, frozen=True)
    model = Model(lambda rngs: read_encoders(made["clip"])[0].make(LENGTH, rngs))
    assert model(model.abstract).packing == packing.Packing(ROOM, "plain")
    with pytest.raises(
        ConfigError, match=r"text\.packed_length = 5: must be 0: .*/t5 is a T5, whose tokens attend both"
    ):
        read_encoders(made["t5"])


def test_only_a_frozen_tower_packs():
    with pytest.raises(ConfigError, match=r"packed_length = 5: must be 0: text\.frozen is False"):
        dataclasses.replace(TOWER, packed_length=5)
    with pytest.raises(ConfigError, match=r"packed_length = -1: must be 0 or more"):
        dataclasses.replace(TOWER, packed_length=-1, frozen=True)


def test_fused_attention_needs_captions_that_fit_a_chunk():
    """A caption of 129 tokens would reach a token of the chunk before that has the place of its own."""
    config = dataclasses.replace(TOWER, packed_length=5, packed_attention="fused", frozen=True)
    Model(lambda rngs: TextTower(config, 128, rngs))
    Model(lambda rngs: TextTower(dataclasses.replace(config, packed_length=0), 129, rngs))
    with pytest.raises(ConfigError, match=r"text\.packed_attention = 'fused': must be 'plain': .* up to 129 tokens"):
        TextTower(config, 129, nnx.Rngs(0))
    with pytest.raises(ConfigError, match=r"text\.packed_attention = 'fused': must be 'plain': .* up to 129 tokens"):
        ClipText(dataclasses.replace(CLIP, positions=200), 129, nnx.Rngs(0), config.packing)
