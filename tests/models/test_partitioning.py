import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from ecdit.config import ConfigError
from ecdit.models.layers import param, zeros
from ecdit.models.moe import MixtureOfExperts
from ecdit.partitioning import (
    AXIS_RULES,
    BATCH_AXES,
    MESH_AXES,
    MeshConfig,
    batch_sharding,
    batch_shards,
    constrain,
    logical_spec,
    make_mesh,
    mesh_shape,
    param_shardings,
    replicated,
)
from tests.models.helpers import Model, close, config, dit, inputs, jit, normal

CUBE = MeshConfig(slices=1, data=2, fsdp=2, expert=2, tensor=1)


def mesh_config(*sizes):
    return MeshConfig(**dict(zip(MESH_AXES, sizes, strict=True)))


@pytest.mark.parametrize(
    ("sizes", "devices", "shape"),
    [
        ((1, -1, 1, 1, 1), 8, (1, 8, 1, 1, 1)),
        ((1, 2, -1, 2, 1), 8, (1, 2, 2, 2, 1)),
        ((2, 2, 2, 2, -1), 16, (2, 2, 2, 2, 1)),
        ((1, 1, 1, 1, 1), 1, (1, 1, 1, 1, 1)),
    ],
)
def test_the_free_axis_takes_what_the_devices_leave(sizes, devices, shape):
    assert mesh_shape(mesh_config(*sizes), devices) == shape


@pytest.mark.parametrize("sizes", [(1, 2, 2, 1, 1), (1, -1, 3, 1, 1), (1, 16, 1, 1, -1), (2, 2, 2, 2, 1)])
def test_meshes_that_do_not_fit_the_devices_are_refused(sizes):
    with pytest.raises(ConfigError, match="must multiply to the number of devices, 8") as error:
        mesh_shape(mesh_config(*sizes), 8)
    for axis, size in zip(MESH_AXES, sizes, strict=True):
        assert f"{axis} {size}" in str(error.value)


def test_two_free_axes_are_refused():
    with pytest.raises(ConfigError, match="only one axis can be -1, data and expert are"):
        mesh_config(1, -1, 1, -1, 1)


@pytest.mark.parametrize("size", [0, -2])
def test_sizes_below_one_are_refused(size):
    with pytest.raises(ConfigError, match=rf"config.fsdp = {size}"):
        mesh_config(1, 1, size, 1, 1)


def test_rules_name_axes_of_the_mesh():
    for axis, mesh_axes in AXIS_RULES.items():
        assert set(mesh_axes) <= set(MESH_AXES), axis
    # Else an axis that somebody forgot to give a rule could be mistaken for one of the mesh.
    assert not set(AXIS_RULES) & set(MESH_AXES)


def state_of(shape, axes):
    """The abstract state of a module with one parameter, `branch/kernel`."""

    class Branch(nnx.Module):
        def __init__(self, rngs):
            self.kernel = nnx.Param(jnp.zeros(shape), **({} if axes is None else {"out_sharding": axes}))

    class Whole(nnx.Module):
        def __init__(self, rngs):
            self.branch = Branch(rngs)

    return Model(Whole).abstract


@pytest.mark.parametrize("axis", ["colour", "expert", "fsdp", "tensor"])
def test_an_axis_without_a_rule_is_an_error(axis):
    """Also one that is called like an axis of the mesh: Flax would shard it over that."""
    with pytest.raises(ValueError, match=rf"branch/kernel: logical axis '{axis}' of \('embed', '{axis}'\) has no rule"):
        param_shardings(state_of((8, 8), ("embed", axis)), make_mesh(CUBE))


@pytest.mark.parametrize("axes", [None, ("embed",), ("layers", "embed", "mlp")])
def test_every_dimension_needs_an_axis(axes):
    with pytest.raises(
        ValueError, match=r"branch/kernel: shape \(8, 8\) needs one logical axis per dimension, but it has"
    ):
        param_shardings(state_of((8, 8), axes), make_mesh(CUBE))


def test_sizes_that_do_not_divide_are_refused_with_the_numbers():
    message = r"branch/kernel: axis 'embed' of size 6 \(shape \(8, 6\)\) does not divide over fsdp 2 x expert 2"
    with pytest.raises(ValueError, match=message):
        param_shardings(state_of((8, 6), ("features", "embed")), make_mesh(CUBE))
    shardings = param_shardings(state_of((8, 6), ("features", "embed")), make_mesh(mesh_config(1, 4, 2, 1, 1)))
    assert shardings["branch"]["kernel"].shard_shape((8, 6)) == (8, 3)


@pytest.mark.parametrize(
    ("size", "over"),
    [
        (128, ("fsdp", "expert")),  # 16 rows a shard
        (96, ("fsdp",)),  # 12 over all eight, 24 over four, 48 over two
        (64, ("expert",)),
        (32, ("fsdp",)),
        (24, ("fsdp", "expert")),  # no choice makes whole tiles
    ],
)
def test_shards_of_a_width_are_whole_tiles_where_they_can_be(size, over):
    mesh = make_mesh(mesh_config(1, 1, 2, 4, 1))
    kernel = param_shardings(state_of((3, size), ("features", "embed")), mesh)["branch"]["kernel"]
    assert kernel.spec == PartitionSpec(None, over)


def test_the_layers_axis_comes_first():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.bias = param(rngs, zeros, (8,), ("embed",))

    from ecdit.models.layers import stack

    shardings = param_shardings(Model(lambda rngs: stack(Block, 3, rngs)).abstract, make_mesh(CUBE))
    assert shardings["bias"].spec == PartitionSpec(None, ("fsdp", "expert"))


def test_a_logical_spec_by_hand():
    expected = PartitionSpec(("expert",), None, None, ("tensor", "fsdp"), ("tensor",))
    assert logical_spec(("experts", "expert_embed", None, "expert_mlp", "mlp"), "kernel") == expected


def test_a_batch_is_split_over_all_but_tensor():
    mesh = make_mesh(mesh_config(1, 1, 2, 2, 2))
    assert batch_shards(mesh) == 4
    rows = jax.device_put(np.arange(8), batch_sharding(mesh))
    for shard in rows.addressable_shards:
        _, _, fsdp, expert, _ = np.argwhere(mesh.devices == shard.device)[0]
        first = 2 * (2 * fsdp + expert)  # neighbours exchange slots
        np.testing.assert_array_equal(shard.data, [first, first + 1])
    whole = jax.device_put(np.arange(8), replicated(mesh))
    assert all(shard.data.shape == (8,) for shard in whole.addressable_shards)


def test_activations_are_constrained_where_a_mesh_is_set():
    x = np.zeros((8, 4), np.float32)
    assert constrain(x, "batch", None) is x
    mesh = make_mesh(CUBE)
    with jax.set_mesh(mesh):
        constrained = jit(lambda x: constrain(x + 1, "batch", None))(x)
        with pytest.raises(ValueError, match="activation: logical axis 'expert'"):
            jit(lambda x: constrain(x, "expert", None))(x)
    assert constrained.sharding.is_equivalent_to(jax.NamedSharding(mesh, PartitionSpec(BATCH_AXES)), 2)


# A model on a mesh is the model on one device

IMAGES, WIDTH = 64, 32  # the partitioner gathers what is smaller, which in earnest is the weights
CONFIG = config(width=WIDTH)
MESHES = {
    "data-fsdp-expert": ((1, 2, 2, 2, 1), "gather"),
    "fsdp-expert-tensor": ((1, 1, 2, 2, 2), "one_hot"),
    "fsdp-tensor": ((1, 1, 4, 1, 2), "gather"),
}
# What runs on which mesh; halves are for fsdp = 2. The remat policy decides which results the backward pass reads.
PLAIN = {name: (name, {}) for name in MESHES}
TUNED = {
    f"{name}-{products}-{remat}": (
        name,
        {"attention": "fused", "projections": "tokens_last", "expert_products": products, "remat": remat},
    )
    for name, products, remat in (
        ("data-fsdp-expert", "halves", "minimal"),
        ("data-fsdp-expert", "scattered", "full"),
        ("fsdp-expert-tensor", "halves", "none"),
        ("fsdp-tensor", "scattered", "minimal"),
    )
}


def gradient(values):
    """(params, inputs) -> ((loss, (velocity, report)), gradients) of a DiT."""

    def loss(params, data):
        velocity, report = dit(values)(params).forward(*data, values.num_kept)
        return jnp.square(velocity - 1).mean(), (velocity, report)

    return jax.value_and_grad(loss, has_aux=True)


@functools.cache
def compiled(case):
    """The program of `gradient` for a case of PLAIN or TUNED, and the shardings of its arguments."""
    name, changes = (PLAIN | TUNED)[case]
    sizes, dispatch = MESHES[name]
    values, mesh = dataclasses.replace(CONFIG, dispatch=dispatch, **changes), make_mesh(mesh_config(*sizes))
    shardings = (param_shardings(dit(values).abstract, mesh), batch_sharding(mesh))
    made = arguments()  # not on the mesh, where flax would take logical axes for mesh axes
    with jax.set_mesh(mesh):
        run = jit(gradient(values), in_shardings=shardings, out_shardings=None)
        return run.lower(*made).compile(), shardings


def arguments():
    return dit(CONFIG).params, inputs(CONFIG, IMAGES)


@pytest.fixture(scope="module")
def on_one_device():
    return jit(gradient(CONFIG))(*arguments())


@functools.cache
def results(case):
    """What the model of a case computes."""
    program, shardings = compiled(case)
    return program(*jax.device_put(arguments(), shardings))


def same(result, expected):
    """Asserts equal routing, and losses, velocities and all gradients that differ by rounding alone.

    Float32 has seven digits; a gradient is a sum over 64 images and 16 tokens, in another order on every mesh.
    """
    (loss, (velocity, report)), grads = result
    (expected_loss, (expected_velocity, expected_report)), expected_grads = expected
    np.testing.assert_array_equal(report.experts_per_token, expected_report.experts_per_token)
    close((loss, velocity), (expected_loss, expected_velocity), 1e-5)
    close(grads, expected_grads, 1e-4)


@pytest.mark.parametrize("case", PLAIN)
def test_sharded_is_unsharded(case, on_one_device):
    same(results(case), on_one_device)


@pytest.mark.parametrize("case", TUNED)
def test_tuned_is_plain(case):
    """Forward and backward, on every mesh: the attention, its projections and the experts' products at once."""
    same(results(case), results(TUNED[case][0]))


def collectives(program):
    """[(operation, dimensions of its first array)] of the collectives in a compiled program."""
    names = "all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute"
    lines = re.findall(rf" = (.*?) ({names})(?:-start)?\(", program.as_text())
    first = [re.search(r"\w+\[([\d,]*)\]", shape)[1] for shape, _ in lines]
    return [
        (name, tuple(map(int, shape.split(",") if shape else ())))
        for (_, name), shape in zip(lines, first, strict=True)
    ]


@pytest.mark.parametrize("case", PLAIN | TUNED)
def test_no_device_gathers_tokens(case):
    """Parameters are gathered, and slots travel to experts; the batch stays where it is, each token in one piece."""
    tokens = {(CONFIG.num_kept, WIDTH), (CONFIG.num_tokens, WIDTH)}
    gathered = [shape for name, shape in collectives(compiled(case)[0]) if name == "all-gather"]
    assert [shape for shape in gathered if shape[1:] in tokens and shape[0] >= IMAGES // 8] == []
    assert len(gathered) > 5


@pytest.mark.parametrize("dispatch", ["gather", "one_hot"])
@pytest.mark.parametrize("products", ["plain", "scattered"])
def test_tokens_travel_to_their_experts_by_all_to_all(dispatch, products):
    """Each of eight devices has one image and one expert. Slots go there and back, and so do their gradients.

    Gates go there too, and their gradients back: numbers, not tokens.
    """
    values = config(width=WIDTH, num_experts=8, dispatch=dispatch, expert_products=products)
    layer = Model(lambda rngs: MixtureOfExperts(values, rngs))
    mesh = make_mesh(mesh_config(1, 1, 1, 8, 1))
    shardings = (param_shardings(layer.abstract, mesh), batch_sharding(mesh))
    x = normal(np.random.default_rng(0), 8, 16, WIDTH)

    def loss(params, x):
        return jnp.square(layer(params)(x, 16)[0]).sum()

    with jax.set_mesh(mesh):
        run = jit(jax.grad(loss, argnums=(0, 1)), in_shardings=shardings, out_shardings=shardings)
        found = collectives(run.lower(layer.params, x).compile())
    # Arrays of fewer dimensions are the router: neither tokens nor their affinities go anywhere else.
    large = [(name, shape[-1]) for name, shape in found if len(shape) > 2]
    assert [name for name, width in large if width == WIDTH] == ["all-to-all"] * 4
    assert {name for name, width in large if width != WIDTH} == {"all-to-all"}
