"""Tests that samples depend only on (seed, prompt, repeat). Shares of differing pixels count uint8 values."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from ecdit.commands.retrieval import compared
from ecdit.data.prepared import prompt_tokens
from ecdit.diffusion.flow import sample_keys, sample_noise
from ecdit.diffusion.guidance import GuidanceConfig
from ecdit.evaluation.retrieval import (
    chance,
    fixed_choice,
    nearest_other_styles,
    protocol,
    recall,
    squared_distances,
    target_ranks,
)
from ecdit.models.moe import MixtureOfExperts
from ecdit.partitioning import make_mesh
from ecdit.sampling.sampler import make_sampler, sample_images
from ecdit.system import make_system
from tests.runs import tiny

PROMPTS = ["red heart", "tiger", "flag of Chad", "moon cake", "trousers", "red heart", "owl", "fire"]
REPEATS = [0, 0, 0, 0, 0, 1, 0, 0]


class Samples:
    """Draws images with weights that are random everywhere, so that nothing is hidden by zeros at the start."""

    def __init__(self, data, **model):
        self.base = tiny(data__directory=str(data), mesh__data=1, **model)
        self.system = make_system(self.base.system)
        params = jax.jit(self.system.init)(jax.random.key(3))
        rng = np.random.default_rng(4)
        self.params = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32), params)
        self.samplers = functools.cache(self.make_sampler)  # several tests draw with the same compiled one

    def make_sampler(self, sampling, devices, group, **routing):
        mesh = make_mesh(tiny(mesh__data=devices).mesh, jax.devices()[:devices])
        config = self.system.config
        system = make_system(dataclasses.replace(config, model=dataclasses.replace(config.model, sampling_group=group)))
        return make_sampler(system, sampling, mesh, **routing)

    def __call__(
        self,
        prompts=PROMPTS,
        repeats=REPEATS,
        devices=1,
        group="image",
        with_experts=False,
        with_gates=False,
        **changes,
    ):
        sampling = dataclasses.replace(self.base.sampling, **{"num_steps": 4, **changes})
        sampler = self.samplers(sampling, devices, group, with_experts=with_experts, with_gates=with_gates)
        tokens = prompt_tokens(self.base.data)
        return sample_images(sampler, self.params, tokens, prompts, repeats, sampling)


@pytest.fixture(scope="module")
def samples(emoji_data):
    return Samples(emoji_data)


@pytest.fixture(scope="module")
def images(samples):
    return samples()


def assert_same(images, expected):
    """Equal but for rounding: two programs, or batch sizes, differ in the last bits, and uint8 shows some of that."""
    difference = np.abs(images.astype(int) - expected.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.005


def test_images_of_different_prompts_and_repeats_differ(images):
    assert images.shape == (8, 32, 32, 3)
    assert images.dtype == np.uint8
    flat = images.reshape(8, -1).astype(int)
    for i in range(8):
        for j in range(i):
            assert (np.abs(flat[i] - flat[j]) > 8).mean() > 0.3, (PROMPTS[i], PROMPTS[j])


def test_permuting_the_prompts_permutes_the_images(samples, images):
    order = [3, 1, 7, 0, 2, 6, 5, 4]
    permuted = samples([PROMPTS[i] for i in order], [REPEATS[i] for i in order])
    np.testing.assert_array_equal(permuted, images[order])


@pytest.mark.parametrize("changes", [{"batch_size": 2}, {"batch_size": 16}, {"devices": 8}, {"devices": 4}])
def test_batch_size_and_devices_change_no_image(samples, images, changes):
    assert_same(samples(**changes), images)


def test_neighbours_change_no_image(samples, images):
    alone = samples(["tiger"], [0])
    np.testing.assert_array_equal(alone[0], images[1])
    assert_same(samples(["tiger", "umbrella"], [0, 0])[:1], images[1:2])


def test_neighbours_do_change_images_in_groups_of_several(samples):
    """The control: two guided images, 4 x 16 tokens, in one group."""
    first, second = (samples(["tiger", other], [0, 0], batch_size=2, group="64")[0] for other in ("owl", "fire"))
    assert (np.abs(first.astype(int) - second.astype(int)) > 8).any()


def test_a_group_of_the_guidance_pair_keeps_images_apart(samples):
    """An image and its null twin are neighbours in the batch."""
    first, second = (samples(["tiger", other], [0, 0], batch_size=2, group="32")[0] for other in ("owl", "fire"))
    np.testing.assert_array_equal(first, second)


def test_scale_one_is_the_conditional_model(samples, monkeypatch):
    """It is the limit of scales near 1, and runs no unconditional pass: the network sees each image once."""
    near = samples(guidance=GuidanceConfig(1.0 + 1e-6, "plain", 0.0, 1.0))
    one = samples(guidance=GuidanceConfig(1.0, "plain", 0.0, 1.0))
    assert_same(one, near)
    assert (
        np.abs(one.astype(int) - samples(guidance=GuidanceConfig(4.0, "plain", 0.0, 1.0)).astype(int)) > 8
    ).mean() > 0.1


def test_heun_and_euler_meet_with_many_steps(samples):
    """With the guidance that is not linear in the two velocities; the other one's algebra has its own tests."""

    def gap(num_steps):
        changes = {"guidance": GuidanceConfig(2.0, "renormalized", 0.0, 1.0), "num_steps": num_steps}
        euler, heun = (samples(PROMPTS[:2], REPEATS[:2], solver=solver, **changes) for solver in ("euler", "heun"))
        return np.abs(euler.astype(float) - heun.astype(float)).mean()

    assert gap(32) < gap(4) / 3


@pytest.mark.parametrize(("scale", "solver"), [(3.0, "euler"), (1.0, "heun")])
def test_counting_experts_changes_no_image_and_counts_each_slot(samples, scale, solver):
    """Each of 4 experts takes ceil(16 * 2 / 4) = 8 of an image's 16 tokens, in 2 sparse layers and 4 steps."""
    changes = {"guidance": GuidanceConfig(scale, "plain", 0.0, 1.0), "solver": solver}
    order = [3, 1, 7, 0, 2, 6, 5, 4]
    twice = PROMPTS + [PROMPTS[i] for i in order], REPEATS + [REPEATS[i] for i in order]
    images, counts = samples(*twice, with_experts=True, **changes)
    assert_same(images[:8], samples(**changes))  # two compiled programs
    assert counts.shape == (16, 4, 2, 16)
    assert (counts.sum(axis=-1) == 4 * 8).all()
    np.testing.assert_array_equal(counts[8:], counts[order])
    assert len({row.tobytes() for row in counts[:8]}) == 8, "each prompt has counts of its own"
    assert (counts[:, 0] != counts[:, -1]).any(), "and so has each step"


def test_counts_are_those_of_the_pass_with_the_caption(samples):
    """Step 0 of a guided sample routes as an unguided one does: both start from the same noise."""
    _, guided = samples(with_experts=True, guidance=GuidanceConfig(3.0, "plain", 0.0, 1.0), num_steps=1)
    _, plain = samples(with_experts=True, guidance=GuidanceConfig(1.0, "plain", 0.0, 1.0), num_steps=1)
    assert (guided != plain).mean() < 0.002  # near-ties, rounded differently in a batch of twice the size


def test_gates_change_no_image_and_are_above_0_where_experts_are_counted(samples):
    guided = {"guidance": GuidanceConfig(3.0, "plain", 0.0, 1.0)}
    images, counts = samples(with_experts=True, **guided)
    same, gates = samples(with_gates=True, devices=8, **guided)
    assert_same(same, images)  # two compiled programs
    assert gates.shape == (8, 4, 2, 16, 4)
    assert (((gates > 0).sum(axis=-1) != counts).mean(axis=(0, 1, 2, 3))) < 0.005  # near-ties
    assert gates.max() <= 1


def test_gates_are_those_of_the_plain_model_s_routing(samples, monkeypatch):
    """One step without guidance, and the same forward pass without compilation, whose routings are recorded."""
    _, gates = samples(with_gates=True, guidance=GuidanceConfig(1.0, "plain", 0.0, 1.0), num_steps=1)
    routings, route = [], MixtureOfExperts.route
    monkeypatch.setattr(MixtureOfExperts, "route", lambda *args: routings.append(route(*args)) or routings[-1])
    model, config = samples.system.bind(samples.params), samples.base.sampling
    noise = sample_noise(sample_keys(config.seed, PROMPTS, REPEATS), samples.system.config.latent_shape)
    sizes = np.tile(np.float32([config.original_size, config.original_size, 0, 0]), (8, 1))
    with jax.disable_jit():
        text = model.text(prompt_tokens(samples.base.data)(PROMPTS))
        model.denoiser(noise, np.ones(8, np.float32), text, sizes, None, "sample")
    assert len(routings) == 2
    for layer, routing in enumerate(routings):
        index, gate = np.asarray(routing.index), np.asarray(routing.gate)
        expected = np.zeros((8, 16, 4), np.float32)
        for image, expert, slot in np.ndindex(index.shape):
            expected[image, index[image, expert, slot], expert] = gate[image, expert, slot]
        found = gates[:, 0, layer]
        near_ties = (found > 0) != (expected > 0)
        assert near_ties.mean() < 0.005
        np.testing.assert_allclose(found[~near_ties], expected[~near_ties], rtol=1e-4, atol=1e-6)


def test_a_denoiser_without_gates_or_experts_is_refused(samples):
    with pytest.raises(ValueError, match="ask for one"):
        samples(with_gates=True, with_experts=True)
    dense = tiny(mesh__data=1, model__ffn="dense")
    with pytest.raises(ValueError, match="has no experts"):
        make_sampler(
            make_system(dense.system), dense.sampling, make_mesh(dense.mesh, jax.devices()[:1]), with_gates=True
        )


def test_token_choice_without_drops_gives_each_token_two_experts(emoji_data):
    samples = Samples(emoji_data, model__ffn="token_choice", model__token_choice_dropless=True)
    _, counts = samples(with_experts=True, num_steps=1)
    assert (counts == 2).all()


def test_ranks_by_hand():
    """Four images of one pixel on a line; the first two are identical."""
    images = np.array([10, 10, 20, 40], np.uint8).reshape(4, 1, 1, 1)
    samples = np.array([12, 12, 16, 39], np.uint8).reshape(4, 1, 1, 1)
    ranks = target_ranks(samples, images, np.array([0, 1, 0, 2]))
    np.testing.assert_array_equal(ranks, [0, 0, 1, 1])  # 16 is nearer to 20; 39 is nearest to 40
    assert recall(ranks, 1) == 0.5
    assert recall(ranks, 2) == 1.0


def test_ranks_among_candidates_by_hand():
    images = np.array([10, 11, 20, 40], np.uint8).reshape(4, 1, 1, 1)
    samples = np.array([12, 30], np.uint8).reshape(2, 1, 1, 1)
    candidates = np.array([[True, False, True, True], [False, False, True, True]])
    ranks = target_ranks(samples, images, np.array([2, 0]), candidates)
    np.testing.assert_array_equal(ranks, [1, 2])  # 10 alone is nearer to 12 than 20 is; 20 and 40 nearer to 30 than 10
    np.testing.assert_array_equal(target_ranks(samples, images, np.array([2, 0])), [2, 3])
    assert chance(np.array([2, 10]), 5) == (1 + 0.5) / 2


def test_distances_are_exact_over_blocks():
    rng = np.random.default_rng(0)
    samples, images = (rng.integers(0, 256, (n, 3, 3, 3)).astype(np.uint8) for n in (3, 2050))
    difference = samples[:, None].astype(np.int64) - images[None]
    np.testing.assert_array_equal(squared_distances(samples, images), np.square(difference).sum(axis=(2, 3, 4)))


def test_the_nearest_other_style_is_a_usable_image_of_the_name():
    images = np.array([10, 11, 14, 40, 10], np.uint8).reshape(5, 1, 1, 1)
    names, usable = np.array([0, 0, 0, 0, 1]), np.array([False, False, True, True, True])
    np.testing.assert_array_equal(nearest_other_styles(images, np.array([0, 1]), names, usable), [2, 2])


def test_a_name_that_training_has_in_no_other_style_does_not_count_for_the_copy():
    """Of two held-out pairs, the name of the second is in no training image; the copy of the first is a perfect one."""
    images = np.array([10, 90, 10, 40], np.uint8).reshape(4, 1, 1, 1)
    keys = ["noto/owl", "noto/fox", "twemoji/owl", "twemoji/cat"]
    trained, held_out = np.array([False, False, True, True]), np.array([0, 1])
    found = compared(images[held_out], images, held_out, keys, trained)
    assert found["of_all"]["samples"] == {"r_at_1": 1.0, "r_at_5": 1.0}
    assert found["of_all"]["other_style"] == {"r_at_1": 1.0, "r_at_5": 1.0}
    alone = compared(images[held_out[1:]], images, held_out[1:], keys, trained)
    assert [sorted(values) for values in alone.values()] == [["chance", "samples"]] * 2


def test_the_fixed_choice_is_fixed_and_spread():
    chosen = fixed_choice(1913)
    assert len(set(chosen.tolist())) == 480
    np.testing.assert_array_equal(chosen, fixed_choice(1913))
    assert chosen.min() < 40
    assert chosen.max() > 1870
    assert abs(chosen.mean() - 956) < 60


def test_the_protocol_is_the_same_for_every_run():
    """Only how many images are drawn at once, and what size training told the model, are the run's own."""
    own = dataclasses.replace(tiny().sampling, batch_size=4, original_size=50, num_grid=3)
    other = dataclasses.replace(
        own, solver="heun", num_steps=7, seed=5, guidance=GuidanceConfig(9.0, "renormalized", 0.0, 1.0)
    )
    expected = dataclasses.replace(
        own, solver="euler", num_steps=25, seed=0, guidance=GuidanceConfig(3.0, "plain", 0.0, 1.0)
    )
    assert protocol(own) == protocol(other) == expected


def test_the_protocol_keeps_what_its_user_changes():
    """The changes are in the config already, as `open_run` reads it; nothing else of the run's own stays."""
    own = dataclasses.replace(
        tiny().sampling, solver="heun", num_steps=7, guidance=GuidanceConfig(9.0, "plain", 0.1, 1)
    )
    found = protocol(own, seed=2, changes=["sampling.guidance.scale=9", "sampling.num_steps=7"])
    fixed = protocol(own, seed=2)
    assert found == dataclasses.replace(fixed, num_steps=7, guidance=dataclasses.replace(fixed.guidance, scale=9.0))
    whole = protocol(own, seed=2, changes=['sampling.guidance={"scale": 9.0, "mode": "plain"}'])
    assert whole == dataclasses.replace(fixed, guidance=own.guidance)
