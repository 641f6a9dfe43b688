"""Makes a network of the project with the weights that a library has written into a folder."""

import jax
import numpy as np
from flax import nnx

from ecdit.pretrained.weights import load_folder

ORDER = ("first", "second", "third")  # names of the shapes: `run -k 'not second and not third'` takes one of each


def loaded(make, layout, folder):
    """The project's network, `make(rngs)`, with the weights in a folder."""
    with nnx.use_eager_sharding(False):
        graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)
    result = load_folder(abstract, layout, folder, mesh=None)
    assert result.not_numbers == {}
    return nnx.merge(graphdef, nnx.State(result.params))


def parameter_count(make):
    """How many parameters a network has, by its shapes alone."""
    with nnx.use_eager_sharding(False):
        state = nnx.state(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state))


def draw(torch, network, seed=0):
    """Gives every parameter of a PyTorch network a value of its own, norms' scales near one; returns the network."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("running_var"):
                value.copy_(1 + 0.5 * noise.abs())
            elif value.ndim == 1 and name.endswith("weight"):
                value.copy_(1 + 0.2 * noise)
            elif value.ndim >= 2:
                value.copy_(noise * value[0].numel() ** -0.5)
            else:
                value.copy_(0.2 * noise)
    return network.eval()


def relative_error(actual, expected):
    """The largest difference over the spread of what is expected."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape
    return np.abs(actual - expected).max() / (expected.max() - expected.min())


def report(record_property, name, shape, error):
    """Notes a figure for docs/weights.md: `tests/parity/run` prints them."""
    record_property("parity", f"{name} | {shape} | {error:.1e}")
    print(f"PARITY {name} | {shape} | {error:.1e}")
