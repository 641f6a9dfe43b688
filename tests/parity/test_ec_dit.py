"""Compares the denoiser and the text tower with their PyTorch models, which share no code with them."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecdit.components import TextStates
from ecdit.interop.pytorch_parts import denoiser_values, torch_weights, tower_values
from ecdit.interop.weights import flat_names
from ecdit.system import make_system
from tests.parity.networks import relative_error, report
from tests.runs import random_params, tiny

TOLERANCE = 1e-4  # of the spread
SIZES = {"model__heads": 4, "model__kv_heads": 2}  # two queries share a key
EVERY_OPTION = {
    "model__num_shared_experts": 2,
    "model__expert_width": 40,
    "model__router_input": "decoupled",
    "model__gate_norm": "renormalized",
    "model__route_scale": 2.5,
    "model__block_table": False,
    "model__absolute_positions": False,
    "model__prediction": "data",
}
RULES = {
    "expert choice": {},
    "token choice": {"model__ffn": "token_choice"},
    "dense": {"model__ffn": "dense", "model__even_ffn_multiplier": 8},
}
OPTIONS = {
    "expert choice, every option": EVERY_OPTION,
    "token choice, every option": EVERY_OPTION | {"model__ffn": "token_choice", "model__token_choice_dropless": True},
    "output norm sandwich": {"model__moe_output_norm": "sandwich", "model__num_shared_experts": 1},
    "no output norm": {"model__moe_output_norm": "none", "model__capacity_factor": 1.1},
    "groups of two images": {"model__group": "16", "model__sampling_group": "32"},
    "groups of half an image": {"model__group": "4", "model__sampling_group": "8"},
}
BATCH = 4


@pytest.fixture
def pytorch(torch):
    return importlib.import_module("ecdit.interop.pytorch.ec_dit")


class Pair:
    """The two denoisers with the same random weights, and one batch of inputs."""

    def __init__(self, torch, pytorch, changes):
        self.torch, experiment = torch, tiny(**SIZES | changes)
        self.system = make_system(experiment.system)
        self.params = jax.tree.map(jnp.asarray, random_params(self.system))["denoiser"]
        weights = {name: torch.tensor(array) for name, array in self.named(self.params).items()}
        self.network = pytorch.Denoiser(pytorch.DenoiserConfig(**denoiser_values(experiment.system)))
        self.network.load_state_dict(weights)
        config, rng = experiment.system, np.random.default_rng(1)
        draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
        size, channels, length, width = config.model.latent_size, 3, config.caption_length, config.text.width
        self.latents, self.noise = draw(BATCH, size, size, channels), draw(BATCH, size, size, channels)
        self.time = np.array([0.03, 0.4, 0.77, 1.0], np.float32)
        mask = np.arange(length)[None] < np.array([length, 3, 9, 1])[:, None]
        self.text = TextStates(draw(BATCH, length, width), mask, draw(BATCH, width))
        self.size_crop = np.array([[72, 72, 0, 0], [512, 300, 5, 7], [32, 32, 1, 0], [1000, 640, 30, 0]], np.float32)

    @staticmethod
    def named(params):
        return {name: np.ascontiguousarray(array) for name, array in torch_weights(flat_names(params)).items()}

    def ours(self, params, mask_keys, mode):
        model = self.system.bind({**self.system.shapes(), "denoiser": params}).denoiser
        return model(self.latents, self.time, self.text, self.size_crop, mask_keys, mode)

    def theirs(self, kept=None, group=None):
        to = self.torch.tensor
        states, mask, pooled = (to(np.asarray(x)) for x in self.text)
        latents, sizes = to(self.latents).permute(0, 3, 1, 2), to(self.size_crop)
        velocity = self.network(latents, to(self.time), states, mask, pooled, sizes, kept, group)
        return velocity.permute(0, 2, 3, 1)


@pytest.mark.parametrize("name", [*RULES, *OPTIONS])
def test_velocities(torch, pytorch, name, record_property):
    pair = Pair(torch, pytorch, (RULES | OPTIONS)[name])
    expected = jax.jit(lambda params: pair.ours(params, None, "sample").velocity)(pair.params)
    with torch.no_grad():
        error = relative_error(pair.theirs(), expected)
    report(record_property, f"EC-DIT's velocity, {name}", f"{BATCH} images", error)
    assert error <= TOLERANCE


@pytest.mark.parametrize("name", [*RULES, "expert choice, every option", "groups of two images"])
def test_gradients_with_half_of_the_tokens_dropped(torch, pytorch, name, record_property):
    """The loss is the mean square of velocity - noise; each parameter's gradient counts by its own spread."""
    pair = Pair(torch, pytorch, (RULES | OPTIONS)[name])

    def loss(params):
        prediction = pair.ours(params, jax.random.split(jax.random.key(5), BATCH), "train")
        return jnp.square(prediction.velocity - pair.noise).mean(), prediction.loss_weights

    (expected_loss, kept), expected = jax.jit(jax.value_and_grad(loss, has_aux=True))(pair.params)
    kept = torch.tensor(np.nonzero(np.asarray(kept))[1].reshape(BATCH, -1))
    found_loss = (pair.theirs(kept, pair.system.config.model.group) - torch.tensor(pair.noise)).square().mean()
    found_loss.backward()
    assert relative_error([found_loss.item(), 0], [expected_loss, 0]) <= TOLERANCE
    found = {name: parameter.grad for name, parameter in pair.network.named_parameters()}
    expected = pair.named(expected)
    assert found.keys() == expected.keys()
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    report(record_property, f"EC-DIT's gradients, {name}", f"{len(errors)} parameters", max(errors.values()))
    assert max(errors.values()) <= TOLERANCE, sorted(errors.items(), key=lambda item: -item[1])[:5]


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_text_tower(torch, activation, record_property):
    text_tower = importlib.import_module("ecdit.interop.pytorch.text_tower")
    experiment = tiny(text__activation=activation, text__layers=3)
    system = make_system(experiment.system)
    params = jax.tree.map(jnp.asarray, random_params(system))
    tower = text_tower.TextTower(text_tower.TextConfig(**tower_values(experiment.system)))
    tower.load_state_dict({name: torch.tensor(array) for name, array in Pair.named(params["text"]).items()})
    tokens = np.random.default_rng(0).integers(2, 2000, (BATCH, experiment.data.caption_length)).astype(np.int32)
    for row, end in enumerate((16, 3, 9, 1)):
        tokens[row, end:], tokens[row, end - 1] = 0, 1
    expected = jax.jit(lambda params: system.bind(params).text(tokens))(params)
    with torch.no_grad():
        found = TextStates(*tower(torch.tensor(tokens, dtype=torch.int64)))
    np.testing.assert_array_equal(found.mask, expected.mask)
    errors = [relative_error(getattr(found, name), getattr(expected, name)) for name in ("states", "pooled")]
    report(record_property, f"EC-DIT's text tower, {activation}", f"{BATCH} captions", max(errors))
    assert max(errors) <= TOLERANCE


def test_what_the_pytorch_model_does_not_know_is_refused_by_name(torch, pytorch, tmp_path):
    values = denoiser_values(tiny().system)
    with pytest.raises(TypeError, match="unexpected keyword argument 'registers'"):
        pytorch.DenoiserConfig(**values, registers=4)
    with pytest.raises(
        ValueError, match="router_input = 'noisy' is not supported: must be one of modulated, decoupled"
    ):
        pytorch.DenoiserConfig(**values | {"router_input": "noisy"})
    known = {field.name for field in dataclasses.fields(pytorch.DenoiserConfig)}
    assert values.keys() == known
