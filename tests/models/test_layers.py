import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ecdit.functions import named
from ecdit.models.layers import REMAT_POLICIES, layer_norm, param, scan_stack, stack, xavier, zeros
from tests.models.helpers import Model, close, jit, normal

WIDTH, COUNT = 8, 3


class Toy(nnx.Module):
    """Blocks of which no two commute, with a product over a batch dimension inside."""

    def __init__(self, rngs):
        self.kernel = param(rngs, xavier, (WIDTH, WIDTH), ("embed", "mlp"))
        self.bias = param(rngs, zeros, (WIDTH,), ("mlp",))

    def __call__(self, x):
        hidden = jnp.tanh(x @ self.kernel[...]) + self.bias[...][None, None]
        mixed = named(jnp.einsum("bnd,bmd,bme->bne", hidden, hidden, x), "attention_out")
        return x + jnp.sin(mixed @ self.kernel[...].T / 8)


STACK = Model(lambda rngs: stack(Toy, COUNT, rngs))
BLOCK = Model(Toy)


def random(*shape, seed=0):
    return normal(np.random.default_rng(seed), *shape)


def scanned(params, x, remat="none"):
    return scan_stack(STACK(params), lambda block, x: (block(x), x.sum()), x, remat)


def test_a_scanned_stack_is_a_loop_over_its_blocks():
    x, sums, outputs = random(2, 4, WIDTH), [], []
    run = jit(lambda params, x: BLOCK(params)(x))
    for i in range(COUNT):
        outputs.append(x)
        sums.append(np.sum(x))
        x = run(jax.tree.map(lambda p, i=i: p[i], STACK.params), x)
    out, scanned_sums = jit(scanned)(STACK.params, outputs[0])
    close(out, x, 1e-6)
    np.testing.assert_allclose(scanned_sums, sums, rtol=1e-4)
    backwards = jit(scanned)(jax.tree.map(lambda p: p[::-1], STACK.params), outputs[0])[0]
    assert np.abs(np.asarray(out - backwards)).max() > 0.01


def loss(params, x, remat):
    return jnp.square(scanned(params, x, remat)[0]).sum()


@pytest.mark.parametrize("remat", sorted(set(REMAT_POLICIES) - {"none"}))
def test_rematerialisation_changes_neither_values_nor_gradients(remat):
    x = random(2, 4, WIDTH)
    plain, other = (jit(jax.value_and_grad(loss), static_argnums=2)(STACK.params, x, r) for r in ("none", remat))
    close(other, plain, 1e-5)


def test_rematerialisation_trades_memory_for_products():
    """Products in the program of the gradient: the less is saved, the more are done twice."""
    x = random(2, 4, WIDTH)

    def products(remat):
        return str(jax.make_jaxpr(jax.grad(loss), static_argnums=2)(STACK.params, x, remat)).count("dot_general")

    count = {remat: products(remat) for remat in REMAT_POLICIES}
    assert count["none"] < count["minimal"] < count["full"]
    assert count["none"] < count["attention_out"] < count["full"]


def test_a_stack_draws_every_block_anew():
    with nnx.use_eager_sharding(False):
        params = jit(lambda: nnx.to_pure_dict(nnx.state(stack(Toy, COUNT, nnx.Rngs(0)))))()
    kernel = np.asarray(params["kernel"]).reshape(COUNT, -1)
    assert kernel.shape == (COUNT, WIDTH * WIDTH)
    assert np.abs(np.corrcoef(kernel) - np.eye(COUNT)).max() < 0.5
    assert len(np.unique(kernel)) == kernel.size


def test_a_stack_has_an_axis_of_layers():
    axes = {path[-1]: variable.get_metadata()["out_sharding"] for path, variable in nnx.to_flat_state(STACK.abstract)}
    assert axes == {"kernel": ("layers", "embed", "mlp"), "bias": ("layers", "mlp")}


def test_norms_are_those_of_float64_numpy():
    x = 3 + 2 * random(2, 5, WIDTH)
    exact = x.astype(np.float64)
    centred = exact - exact.mean(axis=-1, keepdims=True)
    close(jit(layer_norm)(x), centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6), 1e-6)


def test_norms_compute_in_float32_and_keep_the_dtype():
    """In bfloat16 the mean of numbers near 100 would be off by as much as they differ."""
    x = (100 + random(4, 64)).astype(jnp.bfloat16)
    normed = jit(layer_norm)(x)
    assert normed.dtype == jnp.bfloat16
    np.testing.assert_array_equal(normed, jit(layer_norm)(x.astype(np.float32)).astype(jnp.bfloat16))


def test_a_norm_of_nothing_is_nothing():
    np.testing.assert_array_equal(jit(layer_norm)(np.zeros((1, WIDTH), np.float32)), np.zeros((1, WIDTH)))


def test_a_norm_of_a_large_constant_is_finite():
    """Rounding makes mean(x^2) - mean(x)^2 of some of these negative."""
    x = np.linspace(100, 10_000, 64, dtype=np.float32)[:, None].repeat(WIDTH, axis=1)
    assert np.isfinite(jit(layer_norm)(x)).all()


def test_these_tests_promote_no_dtype_silently():
    with pytest.raises(jax.dtypes.TypePromotionError):
        jnp.ones(2, jnp.bfloat16) + jnp.ones(2, jnp.float32)
