"""Tests counted operations against those of the real forward pass and against numbers worked out by hand."""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from ecdit.components import total_flops
from ecdit.encoders.text_tower import TextTower
from ecdit.system import make_system
from tests.runs import tiny

BATCH = 4


def dots(jaxpr) -> Iterator[int]:
    """The FLOPs of every dot_general in a jaxpr, those inside a scan once for each turn. None is left out."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            yield 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
        assert equation.primitive.name not in ("while", "cond"), "how often it runs is unknown"
        turns = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(equation.params):
            yield from (turns * flops for flops in dots(inner))


def traced_flops(system_config, mode):
    """The FLOPs of BATCH images' forward pass."""
    system, config = make_system(system_config), system_config.model

    def forward(params, latents, time, captions, size_crop):
        model, keys = system.bind(params), jax.random.split(jax.random.key(0), BATCH) if mode == "train" else None
        return model.denoiser(latents, time, model.text(captions), size_crop, keys, mode)

    shapes = {
        "latents": ((BATCH, config.latent_size, config.latent_size, config.latent_channels), jnp.float32),
        "time": ((BATCH,), jnp.float32),
        "captions": ((BATCH, system_config.caption_length), jnp.int32),
        "size_crop": ((BATCH, 4), jnp.float32),
    }
    arguments = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
    params = jax.eval_shape(system.init, jax.random.key(0))
    return sum(dots(jax.make_jaxpr(lambda p, a: forward(p, **a))(params, arguments).jaxpr))


@pytest.mark.parametrize(
    "changes",
    [
        {"ffn": "dense"},
        {"ffn": "dense", "remat": "full", "mask_ratio": 0.0, "extra_blocks": 0},
        {"ffn": "expert_choice"},
        {"ffn": "expert_choice", "capacity_factor": 1.1, "mask_ratio": 0.0, "heads": 4, "kv_heads": 1},
        {"ffn": "expert_choice", "group": "32", "num_experts": 8},  # four images of eight kept tokens
        {"ffn": "expert_choice", "group": "4", "depth": 6},
        {"ffn": "dense", "even_ffn_multiplier": 7},
        {"ffn": "expert_choice", "expert_width": 48, "num_shared_experts": 2, "gate_norm": "renormalized"},
        {"ffn": "expert_choice", "router_input": "decoupled", "router_z_loss": 1e-3},
        {"ffn": "token_choice"},
        {"ffn": "token_choice", "token_choice_dropless": True, "group": "16", "mask_ratio": 0.25, "patch_size": 4},
    ],
)
def test_counts_equal_those_of_the_real_pass(changes):
    config = tiny(**{f"model__{key}": value for key, value in changes.items()}).system
    for mode in ("train", "sample"):
        assert BATCH * total_flops(make_system(config).forward_flops(mode)) == traced_flops(config, mode)


def test_parts_by_hand():
    """Two pairs on 8 of 16 tokens, two blocks on all; width 32, hidden 128, 4 experts of 4 slots, captions of 16."""
    system = make_system(tiny().system)
    parts = {part.name: part for part in system.forward_flops("train")}
    assert parts["router"].tokens == 2 * 8
    assert parts["router"].flops == 2 * 8 * 2 * 32 * 4
    assert parts["experts"].tokens == 2 * 4 * 4
    assert parts["experts"].flops == 2 * 4 * 4 * 2 * 2 * 32 * 128
    assert parts["ffn"].tokens == 2 * 8 + 2 * 16
    assert parts["self_attention"].flops == 2 * (4 * 8 + 2 * 16) * 4 * 32**2 + 4 * (4 * 8**2 + 2 * 16**2) * 32
    assert parts["text_tower"].flops == 2 * 16 * 12 * 32**2 + 4 * 16**2 * 32
    assert parts["head"].flops == 2 * 2 * 16 * 192 * 32
    assert system.training_flops() == 3 * sum(part.flops for part in parts.values())
    frozen = make_system(tiny(text__frozen=True).system)
    assert system.training_flops() - frozen.training_flops() == 2 * parts["text_tower"].flops


def test_token_choice_with_room_for_two_choices_costs_what_expert_choice_of_factor_two_does():
    experts = [
        {part.name: part for part in make_system(tiny(model__ffn=ffn).system).forward_flops("train")}["experts"]
        for ffn in ("expert_choice", "token_choice")
    ]
    assert experts[0] == experts[1]


def test_a_doubled_dense_ffn_costs_what_experts_of_factor_two_do():
    """The fair control: even blocks of hidden width 8 d work as much as two experts of 4 d on every token."""
    dense, experts = (
        {
            part.name: part.flops
            for part in make_system(tiny(model__ffn=ffn, model__even_ffn_multiplier=8).system).forward_flops("train")
        }
        for ffn in ("dense", "expert_choice")
    )
    assert dense["ffn"] == experts["ffn"] + experts["experts"]


def test_the_towers_of_the_paper_s_recipe():
    """32 layers of 12 x 1280^2 parameters, on 128 tokens."""
    config = dataclasses.replace(tiny().text, width=1280, layers=32, heads=20)
    with nnx.use_eager_sharding(False):
        tower = nnx.eval_shape(lambda: TextTower(config, 128, nnx.Rngs(0)))
    assert tower.flops(128).flops == 2 * 128 * 32 * 12 * 1280**2 + 4 * 32 * 128**2 * 1280
