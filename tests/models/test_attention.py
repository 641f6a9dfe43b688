import numpy as np
import pytest

from ecdit.models.attention import CausalAttention, CrossAttention, SelfAttention
from ecdit.models.embeddings import rope_angles
from tests.models.helpers import Model, close, jit, normal

# No two sizes are equal that a mistake could confuse: heads and their width, key-value heads and queries on each.
WIDTH, HEADS, KV_HEADS, HEAD, TOKENS, TEXT, LENGTH = 48, 6, 2, 8, 9, 12, 5
SELF = Model(lambda rngs: SelfAttention(WIDTH, HEADS, KV_HEADS, rngs))
CROSS = Model(lambda rngs: CrossAttention(WIDTH, TEXT, HEADS, rngs))
CAUSAL = Model(lambda rngs: CausalAttention(WIDTH, HEADS, rngs))
attend = jit(lambda params, x, angles: SELF(params)(x, angles))
cross_attend = jit(lambda params, x, states, mask: CROSS(params)(x, states, mask))
causal_attend = jit(lambda params, x: CAUSAL(params)(x))


def random(*shape, seed=0):
    return normal(np.random.default_rng(seed), *shape)


def angles():
    return np.broadcast_to(np.asarray(jit(lambda: rope_angles(3, HEAD, 100.0))()), (2, TOKENS, HEAD // 2))


def softmax(scores):
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def rms(x, scale):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * scale


def turn(x, angles):
    """RoPE as complex numbers x_i + i x_{i + k/2}."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, :, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def attention(query, key, value, out, mask=True):
    """Float64, every head written out; query head h reads key-value head h // (H / K)."""
    heads = []
    for h in range(query.shape[2]):
        k = h * key.shape[2] // query.shape[2]
        scores = np.einsum("bnk,blk->bnl", query[:, :, h], key[:, :, k]) / np.sqrt(query.shape[-1])
        heads.append(softmax(np.where(mask, scores, -np.inf)) @ value[:, :, k])
    return np.concatenate(heads, axis=-1) @ out


def double(params):
    return {name: value.astype(np.float64) for name, value in params.items()}


def project(x, kernel, bias=0):
    """Heads of width HEAD, side by side in the kernel's columns."""
    return (x.astype(np.float64) @ kernel + bias).reshape(*x.shape[:2], -1, HEAD)


def test_self_attention_is_that_of_float64_numpy():
    p, x = double(SELF.params), random(2, TOKENS, WIDTH)
    query = turn(rms(project(x, p["query"]), p["query_scale"]), angles())
    key = turn(rms(project(x, p["key"]), p["key_scale"]), angles())
    close(attend(SELF.params, x, angles()), attention(query, key, project(x, p["value"]), p["out"]), 3e-6)


def test_cross_attention_is_that_of_float64_numpy():
    p, x, states = double(CROSS.params), random(2, TOKENS, WIDTH), random(2, LENGTH, TEXT, seed=1)
    mask = np.array([[True, True, False, False, False], [True] * 5])
    query, key = rms(project(x, p["query"]), p["query_scale"]), rms(project(states, p["key"]), p["key_scale"])
    expected = attention(query, key, project(states, p["value"]), p["out"], mask[:, None, :])
    close(cross_attend(CROSS.params, x, states, mask), expected, 3e-6)


def test_causal_attention_is_that_of_float64_numpy():
    p, x = double(CAUSAL.params), random(2, LENGTH, WIDTH)
    query, key, value = (project(x, p[name], p[f"{name}_bias"]) for name in ("query", "key", "value"))
    expected = attention(query, key, value, p["out"], np.tril(np.ones((LENGTH, LENGTH), bool))[None]) + p["out_bias"]
    close(causal_attend(CAUSAL.params, x), expected, 3e-6)


@pytest.mark.parametrize("name", ["query", "key"])
def test_scores_do_not_grow_with_the_projections(name):
    """Queries and keys are normed, so scaling either kernel changes nothing; scaling the values scales the output."""
    x = random(2, TOKENS, WIDTH)
    plain = np.asarray(attend(SELF.params, x, angles()))
    close(attend(SELF.params | {name: 100 * SELF.params[name]}, x, angles()), plain, 1e-4)
    close(attend(SELF.params | {"value": 2 * SELF.params["value"]}, x, angles()), 2 * plain, 1e-6)


def test_grouped_queries_are_all_heads_with_repeated_keys_and_values():
    full = Model(lambda rngs: SelfAttention(WIDTH, HEADS, HEADS, rngs))
    x = random(2, TOKENS, WIDTH)
    split = {name: SELF.params[name].reshape(WIDTH, KV_HEADS, HEAD) for name in ("key", "value")}
    repeated = {name: np.repeat(x, HEADS // KV_HEADS, axis=1).reshape(WIDTH, -1) for name, x in split.items()}
    expected = jit(lambda params, angles: full(params)(x, angles))(SELF.params | repeated, angles())
    close(attend(SELF.params, x, angles()), expected, 1e-6)


def test_images_do_not_see_each_other():
    x = random(2, TOKENS, WIDTH)
    changed = np.stack([x[0], random(TOKENS, WIDTH, seed=9)])
    plain, other = (np.asarray(attend(SELF.params, value, angles())) for value in (x, changed))
    np.testing.assert_array_equal(plain[0], other[0])
    assert (plain[1] != other[1]).any()


def test_padding_of_the_caption_changes_nothing():
    x, states = random(2, TOKENS, WIDTH), random(2, LENGTH, TEXT, seed=1)
    mask = np.array([[True, True, False, False, False], [True, True, True, True, False]])
    noisy = np.where(mask[..., None], states, 1e4 * random(2, LENGTH, TEXT, seed=2))
    plain = np.asarray(cross_attend(CROSS.params, x, states, mask))
    np.testing.assert_array_equal(cross_attend(CROSS.params, x, noisy, mask), plain)
    assert (plain != np.asarray(cross_attend(CROSS.params, x, states, np.ones_like(mask)))).any()


def test_later_tokens_change_nothing_before_them():
    x = random(1, LENGTH, WIDTH)
    plain = np.asarray(causal_attend(CAUSAL.params, x))
    for position in range(LENGTH):
        changed = x.copy()
        changed[:, position] = random(WIDTH, seed=3)
        other = np.asarray(causal_attend(CAUSAL.params, changed))
        np.testing.assert_array_equal(other[:, :position], plain[:, :position])
        assert (other[:, position:] != plain[:, position:]).any(axis=-1).all()
