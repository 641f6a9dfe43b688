"""Samples depend on (seed, prompt, repeat) and on nothing else. Shares of differing pixels are of uint8 values."""

import dataclasses

import jax
import numpy as np
import pytest

from ecdit.conditioning.text_to_image import make_system
from ecdit.data.records import dataset_directory
from ecdit.data.text import tokenize
from ecdit.diffusion.guidance import GuidanceConfig
from ecdit.evaluation.retrieval import fixed_choice, recall, target_ranks
from ecdit.evaluation.sampling import make_sampler, sample_pictures
from ecdit.partitioning import make_mesh
from tests.runs import tiny

PROMPTS = ["red heart", "tiger", "flag of Chad", "moon cake", "trousers", "red heart", "owl", "fire"]
REPEATS = [0, 0, 0, 0, 0, 1, 0, 0]


class Samples:
    """Draws pictures with weights that are random everywhere, so that nothing is hidden by zeros at the start."""

    def __init__(self, data):
        self.base = tiny(data__directory=str(data), mesh__data=1)
        self.system = make_system(self.base.system)
        params = self.system.init(jax.random.key(3))
        keys = iter(jax.random.split(jax.random.key(4), len(jax.tree.leaves(params))))
        self.params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape), params)

    def __call__(self, prompts=PROMPTS, repeats=REPEATS, devices=1, **changes):
        sampling = dataclasses.replace(self.base.sampling, **{"num_steps": 4, **changes})
        experiment = tiny(mesh__data=devices)
        sampler = make_sampler(self.system, sampling, make_mesh(experiment.mesh, jax.devices()[:devices]))
        directory, length = dataset_directory(self.base.data), self.base.data.caption_length
        tokens = lambda texts: tokenize(directory, texts, length)  # noqa: E731
        return sample_pictures(sampler, self.params, tokens, prompts, repeats, sampling)


@pytest.fixture(scope="module")
def samples(emoji_data):
    return Samples(emoji_data)


@pytest.fixture(scope="module")
def pictures(samples):
    return samples()


def assert_same(pictures, expected):
    """Equal but for rounding: matrix products differ in the last bits between batch sizes, and uint8 shows some."""
    difference = np.abs(pictures.astype(int) - expected.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.005


def test_pictures_of_different_prompts_and_repeats_differ(pictures):
    assert pictures.shape == (8, 32, 32, 3)
    assert pictures.dtype == np.uint8
    flat = pictures.reshape(8, -1).astype(int)
    for i in range(8):
        for j in range(i):
            assert (np.abs(flat[i] - flat[j]) > 8).mean() > 0.3, (PROMPTS[i], PROMPTS[j])


def test_permuting_the_prompts_permutes_the_pictures(samples, pictures):
    order = [3, 1, 7, 0, 2, 6, 5, 4]
    permuted = samples([PROMPTS[i] for i in order], [REPEATS[i] for i in order])
    np.testing.assert_array_equal(permuted, pictures[order])


@pytest.mark.parametrize("changes", [{"batch_size": 2}, {"batch_size": 16}, {"devices": 8}, {"devices": 4}])
def test_batch_size_and_devices_change_no_picture(samples, pictures, changes):
    assert_same(samples(**changes), pictures)


def test_neighbours_change_no_picture(samples, pictures):
    alone = samples(["tiger"], [0])
    np.testing.assert_array_equal(alone[0], pictures[1])
    assert_same(samples(["tiger", "umbrella"], [0, 0])[:1], pictures[1:2])


def test_neighbours_do_change_pictures_in_groups_of_several(samples):
    """The control: two guided images, 4 x 16 tokens, in one group."""
    first, second = (samples(["tiger", other], [0, 0], batch_size=2, group="64")[0] for other in ("owl", "fire"))
    assert (np.abs(first.astype(int) - second.astype(int)) > 8).any()


def test_a_group_of_the_guidance_pair_keeps_pictures_apart(samples):
    """An image and its null twin are neighbours in the batch."""
    first, second = (samples(["tiger", other], [0, 0], batch_size=2, group="32")[0] for other in ("owl", "fire"))
    np.testing.assert_array_equal(first, second)


def test_scale_one_is_the_conditional_model(samples, monkeypatch):
    """It is the limit of scales near 1, and runs no unconditional pass: the network sees each image once."""
    near = samples(guidance=GuidanceConfig(1.0 + 1e-6, "plain"))
    one = samples(guidance=GuidanceConfig(1.0, "plain"))
    assert_same(one, near)
    assert (np.abs(one.astype(int) - samples(guidance=GuidanceConfig(4.0, "plain")).astype(int)) > 8).mean() > 0.1


@pytest.mark.parametrize("mode", ["plain", "renormalized"])
def test_heun_and_euler_meet_with_many_steps(samples, mode):
    def gap(num_steps):
        euler, heun = (
            samples(PROMPTS[:2], REPEATS[:2], guidance=GuidanceConfig(2.0, mode), solver=solver, num_steps=num_steps)
            for solver in ("euler", "heun")
        )
        return np.abs(euler.astype(float) - heun.astype(float)).mean()

    assert gap(32) < gap(4) / 3


def test_ranks_by_hand():
    """Four pictures of one pixel on a line; the first two are identical."""
    pictures = np.array([10, 10, 20, 40], np.uint8).reshape(4, 1, 1, 1)
    samples = np.array([12, 12, 16, 39], np.uint8).reshape(4, 1, 1, 1)
    ranks = target_ranks(samples, pictures, np.array([0, 1, 0, 2]))
    np.testing.assert_array_equal(ranks, [0, 0, 1, 1])  # 16 is nearer to 20; 39 is nearest to 40
    assert recall(ranks, 1) == 0.5
    assert recall(ranks, 2) == 1.0


def test_the_fixed_choice_is_fixed_and_spread():
    chosen = fixed_choice(1913)
    assert len(set(chosen.tolist())) == 480
    np.testing.assert_array_equal(chosen, fixed_choice(1913))
    assert chosen.min() < 40
    assert chosen.max() > 1870
    assert abs(chosen.mean() - 956) < 60
