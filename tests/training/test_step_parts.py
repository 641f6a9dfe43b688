"""Parts of the training step by hand, without a model: coverage of tokens, and a batch in microbatches."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np

from ecdit.models.moe import RoutingReport
from ecdit.training import step
from tests.runs import tiny


def test_coverage_by_hand():
    """Two sparse layers, two images of four tokens; the shares are over all eight tokens of a layer."""
    counts = jnp.array([[[0, 1, 2, 3], [4, 0, 1, 5]], [[1, 1, 1, 1], [1, 1, 1, 1]]])
    metrics = step.routing_metrics(RoutingReport(counts, None, None, None))
    np.testing.assert_array_equal(metrics["coverage_0"], [2 / 8, 0])
    np.testing.assert_array_equal(metrics["coverage_1"], [2 / 8, 1])
    np.testing.assert_array_equal(metrics["coverage_2"], [1 / 8, 0])
    np.testing.assert_array_equal(metrics["coverage_3_or_more"], [3 / 8, 0])
    np.testing.assert_array_equal(metrics["coverage_most"], [5, 1])


def test_gradients_are_means_over_microbatches(monkeypatch):
    """Of the loss w x, with x the row: the mean of x, however many microbatches there are."""
    monkeypatch.setattr(
        step, "_loss", lambda params, frozen, experiment, system, batch, keys: ((params["w"] * batch["x"]).mean(), {})
    )
    state = SimpleNamespace(params={"w": jnp.float32(2)}, frozen={}, step=jnp.int32(0))
    batch = {"x": jnp.arange(16, dtype=jnp.float32)}
    for count in (1, 2, 4, 16):
        loss, _, gradients = step._accumulated_gradients(tiny(train__accumulation=count), None, state, batch)
        assert (float(loss), float(gradients["w"])) == (15.0, 7.5)


def test_images_of_a_group_stay_together_and_rows_on_their_device():
    """Groups of two images (8 kept tokens each) in four microbatches; two devices hold rows 0 to 7 and 8 to 15."""
    split = step._split_microbatches(jnp.arange(16), tiny(train__accumulation=4, model__group="16"))
    np.testing.assert_array_equal(split, [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]])
    split = step._split_microbatches(jnp.arange(16), tiny(train__accumulation=4))
    np.testing.assert_array_equal(split, [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]])
