"""Tests the attention of packed captions, with and without its kernel, against the plain one and by hand.

tests/models/test_packing.py compares whole encoders with it with padded ones, also on meshes.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecdit.models import packing
from ecdit.models.attention import attend
from ecdit.tuned import packed_attention as packed
from tests.models.helpers import close, jit, normal

CHUNK, WIDTH = 8, 4
# Captions as long as a chunk at a border and across one, the shortest, and three places that stay free.
LENGTHS = np.array([8, 1, 5, 8, 4, 3])
USED = LENGTHS.sum()
FORMS = {"kernel": lambda *inputs: packed.forward_kernel(*inputs, interpret=True), "tile": packed.packed_attention}


def chunks_of(lengths):
    """Returns the chunks of captions of so many tokens, with at least one place free."""
    tokens, rows = jnp.ones((len(lengths), CHUNK), jnp.int32), int(lengths.sum()) // CHUNK + 1
    ids, positions, mask, fits = packing._lay_out(tokens, jnp.asarray(lengths), rows, CHUNK, 1)
    assert fits.all()
    return packing.Chunks(ids, positions, mask, 1, 1, "plain")


def stream(x):
    """Returns heads [C, H, k, c] as the used places of the stream, [n, H, k]."""
    return np.asarray(x.transpose(0, 3, 1, 2).reshape(-1, *x.shape[1:3])[:USED])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("heads", "of_step", "of_iteration"), [(1, 1, 1), (3, 3, 3), (3, 1, 1), (7, 7, 1), (12, 4, 2)])
def test_it_is_the_plain_attention(form, heads, of_step, of_iteration, monkeypatch):
    """With all heads in a step of the kernel's grid and an iteration of its loop, or some of them."""
    monkeypatch.setattr(packed, "STEP_BYTES", of_step * 6 * WIDTH * CHUNK * 4)
    monkeypatch.setattr(packed, "HEADS_TOGETHER", of_iteration)
    rng, chunks = np.random.default_rng(0), chunks_of(LENGTHS)
    query, key, value = (3 * normal(rng, chunks.tokens.shape[0], heads, WIDTH, CHUNK) for _ in range(3))
    assert packed.step_heads(query) == of_step

    @jit
    def run(query, key, value, positions):
        plain = attend(query, chunks.reach(key, 3), chunks.reach(value, 3), None, chunks.mask)
        return plain, FORMS[form](query, key, value, positions)

    plain, found = run(query, key, value, chunks.positions)
    close(stream(found), stream(plain), 3e-6)
    assert np.isfinite(found).all(), "also in free places, whose states the next layer reads"


@pytest.mark.parametrize("form", FORMS)
def test_with_equal_scores_a_token_gets_the_mean_of_its_caption_up_to_itself(form):
    """Values are 1, 2, 3, ... along the stream: the third token of a caption that starts with 9 gets 10."""
    chunks = chunks_of(LENGTHS)
    rows = chunks.tokens.shape[0]
    value = jnp.broadcast_to(1.0 + jnp.arange(rows * CHUNK).reshape(rows, 1, 1, CHUNK), (rows, 1, WIDTH, CHUNK))
    zeros = jnp.zeros_like(value)
    found = stream(jit(FORMS[form])(zeros, zeros, value, chunks.positions))
    starts = 1 + LENGTHS.cumsum() - LENGTHS
    expected = [start + place / 2 for start, n in zip(starts, LENGTHS, strict=True) for place in range(n)]
    np.testing.assert_allclose(found, np.broadcast_to(np.array(expected)[:, None, None], found.shape), rtol=1e-5)


def test_it_refuses_to_be_differentiated():
    x = jnp.ones((1, 1, WIDTH, CHUNK))
    with pytest.raises(NotImplementedError, match="packed attention has no gradient: only frozen text encoders"):
        jax.grad(lambda x: packed.packed_attention(x, x, x, jnp.zeros((1, CHUNK), jnp.int32)).sum())(x)


@pytest.mark.parametrize(
    ("topology", "heads", "tokens"),
    [
        ("v4:2x2x1", 20, 128),
        ("v5p:2x2x1", 20, 128),
        ("v5p:2x2x1", 12, 77),
        ("v5p:2x2x1", 7, 128),
        ("v5e:2x2", 20, 128),
        ("v6e:2x2", 20, 128),
        ("tpu7x:2x2x1", 20, 128),
    ],
)
def test_tpus_run_it_as_a_kernel_and_hold_no_scores(topology, heads, tokens):
    """At the sizes of XL's tower, of CLIP-L, and with a prime number of heads."""
    from ecdit.planning.compiler import find_target, target_devices

    device = jax.sharding.SingleDeviceSharding(target_devices(find_target(topology))[0])
    head = jax.ShapeDtypeStruct((3, heads, 64, tokens), jnp.bfloat16, sharding=device)
    positions = jax.ShapeDtypeStruct((3, tokens), jnp.int32, sharding=device)
    text = jax.jit(packed.packed_attention).lower(head, head, head, positions).compile().as_text()
    assert re.findall(r"%([a-z_]+)[.\w]* = .*tpu_custom_call", text) == ["packed_attention"]
    assert f"{tokens},{tokens}]" not in text
