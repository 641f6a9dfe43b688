import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecdit.models.layers import Linear, layer_norm, scan_stack, stack
from ecdit.tuned.fusion_boundary import fusion_boundary
from tests.models.helpers import Model
from tests.models.test_layers import random

WIDTH = 32


def unrolled_gradient(depth):
    """Returns the compiled gradient of `depth` unrolled residual blocks."""
    model = Model(lambda rngs: stack(lambda rngs: Linear(WIDTH, WIDTH, ("embed", "mlp"), rngs), depth, rngs))

    def block(linear, x):
        return x + layer_norm(linear(layer_norm(x))), None

    def loss(params, x):
        return jnp.square(scan_stack(model(params), block, x, "none", depth)[0]).sum()

    x = random(2, 64, WIDTH)

    return jax.jit(jax.grad(loss)).lower(model.params, x).compile()


def test_the_work_of_unrolled_blocks_grows_linearly_with_their_number():
    few, some, many = (unrolled_gradient(depth).cost_analysis()["flops"] for depth in (4, 8, 12))
    assert few > 0
    assert many - some == pytest.approx(some - few, rel=0.01)


@pytest.mark.parametrize("first", [1.0, -1.0, np.inf, -np.inf, np.nan])
def test_it_is_the_identity_and_so_is_its_gradient(first):
    x, weights = random(2, 3, 4), random(2, 3, 4, seed=1)
    x[0, 0, 0] = first
    out, backward = jax.vjp(jax.jit(fusion_boundary), x)
    np.testing.assert_array_equal(out, x)
    np.testing.assert_array_equal(backward(weights)[0], weights)


def test_a_tpu_computes_nothing_for_it():
    lowered = jax.jit(fusion_boundary).trace(jnp.ones((2, 3))).lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.compare" not in lowered, lowered  # what is left are cases of constants
