"""Tests that fused attention equals the plain one with and without its kernels, on shards, and compiles for TPUs.

tests/models/test_partitioning.py compares models with it with plain ones.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from ecdit.config import ConfigError
from ecdit.models.attention import normed_attention
from ecdit.partitioning import MESH_AXES
from ecdit.tuned import fused_attention as fused
from tests.models.helpers import close, config, jit, normal

IMAGES, GROUP, WIDTH, TOKENS, TEXT = 4, 3, 8, 16, 10  # GROUP: query heads of a key-value head
CASES = ["self", "cross"]
# KV heads of an image, of a step of the kernels' grid, and of an iteration of its loop.
ONE_HEAD, LOOP_OF_PAIRS = (2, 1, 1), (8, 4, 2)


def arguments(case, kv_heads=2):
    """Returns the arguments of self-attention with angles, or of cross-attention with texts of every length."""
    rng = np.random.default_rng(0)
    tokens = TOKENS if case == "self" else TEXT
    shapes = (GROUP * kv_heads, TOKENS), (kv_heads, tokens), (kv_heads, tokens)
    heads = (normal(rng, IMAGES, count, WIDTH, n) for count, n in shapes)
    norms = normal(rng, WIDTH), normal(rng, WIDTH)
    angles = normal(rng, IMAGES, TOKENS, WIDTH // 2) if case == "self" else None
    mask = np.arange(TEXT)[None, None] < np.array([1, 3, 7, TEXT])[:, None, None] if case == "cross" else None
    return *heads, norms, angles, mask


def with_gradients(attention, case, kv_heads=2):
    """The output, and the gradients of the sum of its squares' halves."""
    query, key, value, norms, angles, mask = arguments(case, kv_heads)

    @jit
    def run(query, key, value, norms):
        output, backward = jax.vjp(lambda *heads: attention(*heads, angles, mask), query, key, value, norms)
        return output, backward(output)

    return run(query, key, value, norms)


@functools.cache
def plain(case, kv_heads):
    return with_gradients(normed_attention, case, kv_heads)


@pytest.fixture
def layout(request, monkeypatch):
    """Sets the kernels' budgets so that they split the KV heads as the parameter says, and returns it.

    Without it the arrays of a test are so small that one step holds all heads and one iteration as many as it may.
    """
    _, of_step, of_iteration = request.param
    monkeypatch.setattr(fused, "CHUNK_BYTES", of_step * WIDTH * 4 * (3 * GROUP * TOKENS + 4 * TOKENS))
    monkeypatch.setattr(fused, "HEADS_TOGETHER", of_iteration * GROUP)
    return request.param


@pytest.mark.parametrize("layout", [LOOP_OF_PAIRS], indirect=True, ids=["loop_of_pairs"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_plain_attention(layout, case):
    """The gradients of the norms are summed over chunks of heads here too."""
    kv_heads, _, _ = layout
    close(with_gradients(fused.fused_attention, case, kv_heads), plain(case, kv_heads), 3e-6)


@pytest.mark.parametrize("layout", [ONE_HEAD, LOOP_OF_PAIRS], indirect=True, ids=["one_head", "loop_of_pairs"])
@pytest.mark.parametrize("case", CASES)
def test_so_are_its_kernels(layout, case):
    """Interpreted, with the heads in two chunks."""
    kv_heads, of_step, of_iteration = layout
    query, key, value, norms, angles, mask = arguments(case, kv_heads)
    assert fused.chunk_heads(query, key) == of_step
    assert fused.heads_together(query[:, : GROUP * of_step], key[:, :of_step]) == of_iteration
    turn = None if angles is None else tuple(f(angles.swapaxes(1, 2)) for f in (np.cos, np.sin))
    bias = None if mask is None else np.where(mask, np.float32(0), np.float32(fused.HIDDEN))

    @jit
    def run(*inputs):
        output = fused.forward_kernel(*inputs, interpret=True)
        return output, fused.backward_kernel(*inputs, output, interpret=True)

    output, (*heads, of_query, of_key) = run(query, key, value, tuple(norm[:, None] for norm in norms), turn, bias)
    assert of_query.shape == of_key.shape == (IMAGES, 2, WIDTH, 1)
    parts = tuple(norm.sum(axis=(0, 1))[:, 0] for norm in (of_query, of_key))
    close((output, (*heads, parts)), plain(case, kv_heads), 3e-6)


@pytest.mark.parametrize("case", CASES)
def test_on_shards_of_images_and_heads_it_is_the_same(case):
    alone = with_gradients(fused.fused_attention, case)
    with jax.set_mesh(Mesh(np.array(jax.devices()).reshape(1, 1, 2, 2, 2), MESH_AXES)):
        text = jit(fused.fused_attention).lower(*arguments(case)).compile().as_text()
        close(with_gradients(fused.fused_attention, case), alone, 3e-6)
    assert not re.search(r"all-gather|all-to-all|all-reduce|collective-permute", text)


def test_what_does_not_fit_a_tpu_is_refused():
    with pytest.raises(ConfigError, match=r"attention = 'fused': with 1024 tokens and 2 heads per key it does not fit"):
        config(attention="fused", latent_size=64)
    assert config(attention="plain", latent_size=64).num_tokens == 1024


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5p:2x2x1", "v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"])
def test_tpus_run_it_as_kernels_and_hold_no_scores(topology):
    """At the sizes of M: 48 heads of 64, of which four share a key, and all 256 tokens."""
    from ecdit.planning.compiler import find_target, target_devices

    device = jax.sharding.SingleDeviceSharding(target_devices(find_target(topology))[0])
    shapes = (2, 48, 64, 256), (2, 12, 64, 256), (2, 12, 64, 256)
    heads = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=device) for shape in shapes]
    angles = jax.ShapeDtypeStruct((2, 256, 32), jnp.float32, sharding=device)

    def step(query, key, value, angles):
        norms = jnp.ones(64), jnp.ones(64)
        output, backward = jax.vjp(lambda *heads: fused.fused_attention(*heads, norms, angles), query, key, value)
        return output, backward(output)

    text = jax.jit(step).lower(*heads, angles).compile().as_text()
    assert {"forward_attention", "backward_attention"} <= set(re.findall(r"%([a-z_]+)[.\w]* = .*tpu_custom_call", text))
    assert "256,256" not in text
