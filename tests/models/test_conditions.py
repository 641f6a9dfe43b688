"""Tests the conditions of a DiT by hand in float64: the numbers that they use, and their order."""

import jax
import numpy as np

from tests.models.helpers import CONFIG, close, dit, inputs, jit

BATCH = 3


def sinusoid(x):
    """Cosines, then sines, of x at 128 frequencies from 1 towards 1 / 10 000."""
    angles = x[:, None] * 10_000.0 ** -(np.arange(128) / 128)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)


def silu(x):
    return x / (1 + np.exp(-x))


def embedded(params, x):
    """Two layers with SiLU between, normed."""
    hidden = silu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    out = hidden @ params["out"]["kernel"] + params["out"]["bias"]
    centred = out - out.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6)


def test_conditions_are_of_a_thousand_times_the_time_the_pooled_caption_and_four_sizes_in_order():
    data = inputs(CONFIG, BATCH)
    data = data._replace(time=np.array([0.0, 0.25, 1.0], np.float32))
    model = dit(CONFIG)
    condition = jit(lambda params: model(params).condition(data.time, data.text, data.size_crop, np.dtype(np.float32)))
    params = jax.tree.map(np.float64, model.params)
    height, width, top, left = np.float64(data.size_crop).T
    time = embedded(params["time"], sinusoid(1000 * np.float64(data.time)))
    sizes = np.concatenate([sinusoid(x) for x in (height, width, top, left)], axis=-1)
    parts = time + embedded(params["caption"], np.float64(data.text.pooled)) + embedded(params["size_crop"], sizes)
    close(condition(model.params), (time, silu(parts)), 1e-3)  # cosines of angles up to 1000, in float32
