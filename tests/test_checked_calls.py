"""Tests that the run-time checks of annotations are on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from ecdit.diffusion.flow import loss_per_example
from ecdit.models.attention import attend
from ecdit.models.embeddings import rope_angles
from ecdit.models.routing import expert_choice

TOKENS = jnp.ones((2, 3, 4))


@pytest.mark.parametrize("weights", [jnp.ones((2, 4)), jnp.ones((2, 3, 1)), jnp.ones((2, 3), bool)])
def test_a_wrong_shape_or_dtype_is_refused(weights):
    assert loss_per_example(TOKENS, TOKENS, jnp.ones((2, 3)), 0.0).shape == (2,)
    with pytest.raises(TypeCheckError, match="'weights'"):
        loss_per_example(TOKENS, TOKENS, weights, 0.0)


def test_a_traced_wrong_shape_is_refused():
    with pytest.raises(TypeCheckError, match="'weights'"):
        jax.eval_shape(lambda x: loss_per_example(x, x, x[..., 0].T, 0.0), TOKENS)


@pytest.mark.parametrize(("shape", "fits"), [((2, 3, 5), True), ((1, 1, 5), True), ((2, 3, 4), False)])
def test_a_mask_may_be_the_same_for_all_images_and_queries(shape, fits):
    query, key = jnp.ones((2, 4, 8, 3)), jnp.ones((2, 2, 8, 5))
    if fits:
        assert attend(query, key, key, None, jnp.ones(shape, bool)).shape == query.shape
    else:
        with pytest.raises(TypeCheckError, match="'mask'"):
            attend(query, key, key, None, jnp.ones(shape, bool))


def test_a_wrong_result_is_refused(monkeypatch):
    monkeypatch.setattr("ecdit.models.embeddings.jnp.concatenate", lambda parts, axis: parts[0])
    with pytest.raises(TypeCheckError, match="return value"):
        rope_angles(grid=2, head_dim=8, theta=100.0)


def test_arrays_of_numpy_are_taken_as_those_of_jax():
    assert expert_choice(np.zeros((1, 3, 2), np.float32), capacity=1).index.shape == (1, 2, 1)
