import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecdit.config import ConfigError
from ecdit.encoders.text_tower import Norm, TextConfig, TextTower
from tests.models.helpers import Model, close, jit

CONFIG = TextConfig(
    weights="random", second_weights="", clip_states="last", clip_projection=False, encode="online",
    stored="bfloat16", frozen_random_ok=False, packed_length=0, packed_attention="plain",
    vocab_size=20, width=16, layers=2, heads=2, activation="gelu", frozen=False, remat="none", projections="plain",
    dtype="float32",
)  # fmt: skip
LENGTH = 6
EOS = 1
# Captions of 5, 2 and 0 pieces, each with its end: the first fills the length, the last is the empty caption.
TOKENS = np.array([[5, 9, 2, 7, 3, EOS], [4, 8, EOS, 0, 0, 0], [EOS, 0, 0, 0, 0, 0]], np.int32)


@functools.cache
def tower(activation, dtype):
    config = dataclasses.replace(CONFIG, activation=activation, dtype=dtype)
    return Model(lambda rngs: TextTower(config, LENGTH, rngs))


PARAMS = tower("gelu", "float32").params


@functools.cache
def compiled(activation, dtype):
    return jit(lambda params, tokens: tower(activation, dtype)(params)(tokens))


def encode(tokens, activation="gelu", dtype="float32", params=PARAMS):
    return jax.tree.map(np.asarray, compiled(activation, dtype)(params, tokens))


def erf_gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def quick_gelu(x):
    return x / (1 + np.exp(-1.702 * x))


def norm(x, p):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def causal_attention(x, p):
    query, key, value = (
        (x @ p[n] + p[f"{n}_bias"]).reshape(*x.shape[:2], CONFIG.heads, -1).swapaxes(1, 2)
        for n in ("query", "key", "value")
    )
    scores = np.einsum("bhlk,bhmk->bhlm", query, key) / math.sqrt(query.shape[-1])
    weights = np.exp(scores) * np.tril(np.ones((LENGTH, LENGTH)))
    attended = np.einsum("bhlm,bhmk->bhlk", weights / weights.sum(axis=-1, keepdims=True), value)
    return attended.swapaxes(1, 2).reshape(x.shape) @ p["out"] + p["out_bias"]


def oracle(tokens, activation):
    """The tower in float64 NumPy: pre-norm blocks, and a norm at the end."""
    params = jax.tree.map(lambda p: p.astype(np.float64), PARAMS)
    x = params["tokens"][tokens] + params["positions"]
    for layer in range(CONFIG.layers):
        block = jax.tree.map(lambda p, i=layer: p[i], params["blocks"])
        x = x + causal_attention(norm(x, block["attention_norm"]), block["attention"])
        hidden = norm(x, block["ffn_norm"]) @ block["up"]["kernel"] + block["up"]["bias"]
        x = x + activation(hidden) @ block["down"]["kernel"] + block["down"]["bias"]
    return norm(x, params["final_norm"])


@pytest.mark.parametrize(("activation", "function"), [("gelu", erf_gelu), ("quick_gelu", quick_gelu)])
def test_states_are_those_of_float64_numpy(activation, function):
    """GELU is the exact one, as in the checkpoints of the towers that have it (OpenCLIP's), not its tanh likeness."""
    close(encode(TOKENS, activation).states, oracle(TOKENS, function), 1e-5)


def test_norms_have_the_epsilon_of_clip_s():
    """1e-5, which matters where tokens are as small as they start: their embeddings have a deviation of 0.02."""
    layer = Model(lambda rngs: Norm(16, rngs))
    x = 0.002 * np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32)
    expected = norm(x.astype(np.float64), jax.tree.map(lambda p: p.astype(np.float64), layer.params))
    close(jit(lambda params, x: layer(params)(x))(layer.params, x), expected, 1e-5)


def test_the_activations_differ():
    assert np.abs(encode(TOKENS, "gelu").states - encode(TOKENS, "quick_gelu").states).max() > 1e-3


def test_pooled_is_the_state_of_the_last_token():
    text = encode(TOKENS)
    for row, end in enumerate([5, 2, 0]):
        assert TOKENS[row, end] == EOS
        np.testing.assert_array_equal(text.pooled[row], text.states[row, end])
    np.testing.assert_array_equal(text.mask, TOKENS > 0)


def test_the_empty_caption_is_its_end():
    text = encode(TOKENS[2:])
    np.testing.assert_array_equal(text.mask, [[True, False, False, False, False, False]])
    assert np.isfinite(text.states).all()
    close(text.pooled, encode(TOKENS).pooled[2:], 1e-6)


def test_later_tokens_change_no_earlier_state():
    plain = encode(TOKENS).states
    for position in range(LENGTH):
        changed = TOKENS.copy()
        changed[0, position] = 11
        states = encode(changed).states
        np.testing.assert_array_equal(states[0, :position], plain[0, :position])
        assert (states[0, position:] != plain[0, position:]).any(axis=-1).all()
        np.testing.assert_array_equal(states[1:], plain[1:])


def test_padding_changes_nothing():
    plain = encode(TOKENS)
    bare = encode(TOKENS[1:2, :3])
    close(bare.states, plain.states[1:2, :3], 1e-5)
    close(bare.pooled, plain.pooled[1:2], 1e-5)
    embedding = PARAMS["tokens"].copy()
    embedding[0] += 100
    other = encode(TOKENS, params=PARAMS | {"tokens": embedding})
    np.testing.assert_array_equal(other.states[plain.mask], plain.states[plain.mask])
    np.testing.assert_array_equal(other.pooled, plain.pooled)
    assert (other.states[~plain.mask] != plain.states[~plain.mask]).any()


def test_the_order_of_tokens_matters():
    swapped = TOKENS[:, [1, 0, 2, 3, 4, 5]]
    assert np.abs(encode(swapped).pooled[0] - encode(TOKENS).pooled[0]).max() > 1e-3


def test_bfloat16_stays_near_float32():
    narrow, wide = encode(TOKENS, dtype="bfloat16"), encode(TOKENS)
    assert narrow.states.dtype == narrow.pooled.dtype == jnp.bfloat16
    error = np.linalg.norm(narrow.states.astype(np.float32) - wide.states) / np.linalg.norm(wide.states)
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize(("key", "value"), [("vocab_size", 0), ("layers", 0), ("heads", 3), ("width", 0)])
def test_impossible_values_are_refused(key, value):
    with pytest.raises(ConfigError, match=f"config.{key} = {value}"):
        dataclasses.replace(CONFIG, **{key: value})
