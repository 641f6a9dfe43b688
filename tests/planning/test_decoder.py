"""Tests the calibrator of the step-time estimate: its results, and its sharding by the TPU compiler."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.planning import decoder


def small_params():
    """Two blocks of width 128, whose 64 heads are 2 wide."""
    shapes = {
        "embedding": (16, 128),
        "blocks": {
            name: (2, *(64 if size == decoder.HIDDEN else 128 for size in shape))
            for name, shape in decoder.BLOCK.items()
        },
        "norm": (128,),
        "unembedding": (16, 128),
    }
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda shape: isinstance(shape, tuple))
    rng = np.random.default_rng(0)
    return structure.unflatten(jnp.asarray(0.2 * rng.normal(size=shape), jnp.float32) for shape in leaves)


def loss_and_gradients(devices, shape):
    mesh = jax.make_mesh(shape, decoder.AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)
    tokens = np.random.default_rng(1).integers(0, 16, (8, 6)).astype(np.int32)
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        decoder.param_specs(),
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )
    params = jax.device_put(small_params(), shardings)
    tokens = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec(decoder.AXES)))
    return jax.tree.map(np.asarray, jax.jit(decoder.sharded_loss_and_gradients(mesh))(params, tokens))


def test_shards_on_eight_chips_give_the_loss_and_gradients_of_one():
    loss, gradients = loss_and_gradients(jax.devices(), (2, 4))
    expected_loss, expected = loss_and_gradients(jax.devices()[:1], (1, 1))
    assert loss == pytest.approx(expected_loss, rel=1e-3)
    for found, whole in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(found - whole) < 0.02 * np.linalg.norm(whole), "sums in bfloat16, in another order"


def test_operations_are_counted_as_published():
    """31.66 B parameters, by hand: 32 (4 8192^2 + 3 8192 28672 + 2 8192) + 2 32000 8192 + 8192."""
    tokens = 64 * 4 * 2048
    assert decoder.model_flops(64) == tokens * 6 * (31_663_333_376 + 32 * 2048 * 8192)


@pytest.mark.slow
def test_the_tpu_compiler_gathers_weights_and_scatters_gradients():
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:4x4x4").devices
    text = decoder.compile_decoder(devices, layers=2, batch_per_chip=1).as_text()
    assert re.search(r"all-gather\(", text)
    assert re.search(r"reduce-scatter\(", text)
    reduced = re.findall(r"= (.*) all-reduce\(", text)
    assert not [shape for shape in reduced if re.search(r"\[[\d,]*\d{4},\d{4,}\]", shape)], "vectors and sums alone"
