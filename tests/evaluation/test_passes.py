"""What the sampler asks of the network, found while it is traced: nothing here is compiled."""

import dataclasses

import jax
import numpy as np
import pytest

from ecdit.conditioning.text_to_image import make_system
from ecdit.conditioning.text_tower import TextTower
from ecdit.diffusion.flow import sample_keys
from ecdit.diffusion.guidance import GuidanceConfig
from ecdit.evaluation.sampling import make_sampler
from ecdit.models.dit import DiT
from ecdit.partitioning import make_mesh
from tests.runs import tiny


class Called(Exception):
    """The network was called."""


@pytest.fixture
def passes(monkeypatch):
    """passes(scale, group) is (rows the network sees, tokens of a group, rows of each call of the text tower)."""
    encoded = []
    tower = TextTower.__call__

    def encode(self, tokens, *rest):
        encoded.append(tokens.shape[0])
        return tower(self, tokens, *rest)

    def stop(self, latents, time, text, size_crop, kept, group_size):
        assert time.shape[0] == text.mask.shape[0] == size_crop.shape[0] == latents.shape[0]
        assert kept is None  # sampling drops no token
        raise Called(latents.shape[0], group_size)

    monkeypatch.setattr(TextTower, "__call__", encode)
    monkeypatch.setattr(DiT, "__call__", stop)

    def trace(scale, group, solver="euler"):
        experiment = tiny(mesh__data=1)
        config = dataclasses.replace(
            experiment.sampling, guidance=GuidanceConfig(scale, "plain"), group=group, solver=solver
        )
        system = make_system(experiment.system)
        sampler = make_sampler(system, config, make_mesh(experiment.mesh, jax.devices()[:1]))
        params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(system.init, jax.random.key(0)))
        tokens, keys = np.ones((8, 16), np.int32), sample_keys(0, ["a"] * 8, range(8))
        with pytest.raises(Called) as called:
            sampler(params, tokens, tokens[:1], keys)
        return (*called.value.args, encoded)

    return trace


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_scale_one_makes_no_unconditional_pass(passes, solver):
    assert passes(1.0, "image", solver) == (8, 16, [8])


@pytest.mark.parametrize(("group", "size"), [("image", 16), ("32", 32), ("64", 64), ("8", 8)])
def test_a_guided_image_and_its_null_twin_are_one_batch(passes, group, size):
    assert passes(3.0, group) == (16, size, [8, 1])


def test_scale_zero_is_no_scale_one(passes):
    assert passes(0.0, "image")[0] == 16
