"""Tests the experts' tuned products on one device, and the sums of their gradients on several.

tests/models/test_partitioning.py compares whole tuned models with plain ones on meshes.
"""

import jax
import numpy as np
import pytest

from ecdit.models.moe import MixtureOfExperts
from ecdit.partitioning import MESH_AXES, MeshConfig, make_mesh
from ecdit.tuned.experts import down_gradient, up_gradient
from tests.models.helpers import Model, close, config, jit, normal


@pytest.mark.parametrize("norm", ["none", "expert"])
@pytest.mark.parametrize("remat", [False, True])
def test_a_layer_with_scattered_gradients_is_the_plain_one(norm, remat):
    """Output and all gradients, up to float32's sums of 64 products in another order."""
    rng = np.random.default_rng(0)
    x, d_out = normal(rng, 4, 8, 16), normal(rng, 4, 8, 16)

    def with_gradients(products):
        layer = Model(lambda rngs: MixtureOfExperts(config(expert_products=products, moe_output_norm=norm), rngs))

        def apply(params, x):
            return layer(params)(x, 8)[0]

        def run(params, x):
            output, backward = jax.vjp(jax.checkpoint(apply) if remat else apply, params, x)
            return output, backward(d_out)

        return jit(run)(layer.params, x)

    close(with_gradients("scattered"), with_gradients("plain"), 3e-6)


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("gradient", [down_gradient, up_gradient])
def test_experts_gradients_are_summed_over_all_chips_with_slots_of_theirs(gradient, experts):
    """Two replicas of four chips, each of which keeps a quarter of the hidden units."""
    mesh = make_mesh(MeshConfig(**dict(zip(MESH_AXES, (1, 2, 4, 1, 1), strict=True))))
    rng = np.random.default_rng(0)
    hidden, width = normal(rng, experts, 16, 8), normal(rng, experts, 16, 4)
    arguments = (hidden, width) if gradient is down_gradient else (width, hidden)
    with jax.set_mesh(mesh):
        kernel, returned = jit(gradient)(*arguments)
    side = 1 if gradient is down_gradient else 2
    assert {shard.data.shape[side] for shard in kernel.addressable_shards} == {2}
    close(kernel, np.einsum("eti,eto->eio", *arguments), 1e-5)
    np.testing.assert_array_equal(returned, arguments[1])
