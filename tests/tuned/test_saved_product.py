import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecdit.functions import named
from ecdit.models.layers import REMAT_POLICIES
from ecdit.tuned.saved_product import saved_product
from tests.models.helpers import close, jit, normal


def random(*shape, seed=0):
    return normal(np.random.default_rng(seed), *shape)


FORMS = ("etd,edf->etf", "etf,edf->etd")


def kernel_gradient(x, gradient):
    return jnp.einsum("etd,etf->edf", x, gradient), gradient


def product_of(x, kernel):
    return saved_product(x, named(x, "expert_in"), kernel, FORMS, kernel_gradient)


@pytest.mark.parametrize("policy", [None, *REMAT_POLICIES])
def test_a_product_that_saves_what_it_multiplies_has_einsum_s_gradients(policy):
    x, kernel, gradient = random(3, 5, 4), random(3, 4, 6, seed=1), random(3, 5, 6, seed=2)

    def with_gradients(product):
        def run(x, kernel):
            through = product if policy is None else jax.checkpoint(product, policy=REMAT_POLICIES[policy])
            output, backward = jax.vjp(lambda x, kernel: through(jnp.sin(x), kernel), x, kernel)
            return output, backward(gradient)

        return jit(run)(x, kernel)

    saving = with_gradients(product_of)
    close(saving, with_gradients(lambda x, kernel: jnp.einsum(FORMS[0], x, kernel)), 1e-6)


def test_what_a_product_saves_is_not_rounded_once_more():
    """Else that is a pass of its own over what a kernel wrote."""

    def step(x, kernel):
        product = jax.checkpoint(
            lambda x: product_of(jnp.sin(x), kernel),
            policy=REMAT_POLICIES["minimal"],
        )
        return jax.vjp(product, x)[1](product(x))

    program = str(jax.make_jaxpr(step)(random(3, 5, 4), random(3, 4, 6)))
    assert "name=expert_in" in program
    assert "reduce_precision" not in program
