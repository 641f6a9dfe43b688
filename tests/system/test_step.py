"""Tests the training step on real data and on meshes of eight devices."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ecdit.config import ConfigError
from ecdit.experiment import check_mesh
from ecdit.interop.weights import flat_names
from ecdit.models.dit import kept_tokens
from ecdit.partitioning import make_mesh
from ecdit.runs.workload import device_batches
from ecdit.system import make_system
from ecdit.training.optimizer import make_optimizer, make_schedule
from ecdit.training.state import abstract_state, init_state, run_key, state_shardings
from ecdit.training.step import make_train_step
from tests.runs import tiny

MESHES = {
    "one device": (1, 1, 1, 1),
    "data 8": (8, 1, 1, 1),
    "data 2 fsdp 2 expert 2": (2, 2, 2, 1),
    "fsdp 2 expert 2 tensor 2": (1, 2, 2, 2),
}


KINDS = {
    "plain": {},
    "tuned": {"model__attention": "fused", "model__projections": "tokens_last", "model__expert_products": "halves"},
}


def mesh_overrides(sizes):
    return {f"mesh__{axis}": size for axis, size in zip(("data", "fsdp", "expert", "tensor"), sizes, strict=True)}


def step_experiment(data, **overrides):
    """Tests share what this gives them, down to the compiled step: state another field only where the test needs it."""
    return tiny(data__directory=str(data), **{"mesh__data": 1, "optimizer__warmup_steps": 2, **overrides})


@functools.cache
def first_state(system_config, optimizer_config, seed):
    """The state at step 0, drawn on one device. Drawn sharded it is the same: see test_moments_and_ema_are_sharded."""
    system, optimizer = make_system(system_config), make_optimizer(optimizer_config)
    mesh = make_mesh(tiny(mesh__data=1).mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        return jax.device_get(init_state(system, optimizer, state_shardings(system, optimizer, mesh), seed))


@functools.cache
def compiled(experiment):
    mesh = make_mesh(experiment.mesh, jax.devices()[: np.prod([abs(s) for s in vars(experiment.mesh).values()])])
    check_mesh(experiment, mesh)
    system, optimizer = make_system(experiment.system), make_optimizer(experiment.optimizer)
    with jax.set_mesh(mesh):
        return mesh, state_shardings(system, optimizer, mesh), make_train_step(experiment.step_config, system, mesh)


def start(experiment):
    """The mesh, the first state, the step and the batches of a run."""
    mesh, shardings, step = compiled(experiment)
    # Groups, accumulation, losses and tuned functions are of the step: runs that differ in them alone start from one
    # drawn state.
    plain = {"attention": "plain", "projections": "plain", "expert_products": "plain"}
    model = dataclasses.replace(experiment.system.model, group="image", router_z_loss=0.0, **plain)
    system = dataclasses.replace(experiment.system, model=model)
    state = jax.device_put(first_state(system, experiment.optimizer, experiment.seed), shardings)
    return mesh, state, step, device_batches(experiment, mesh, 0)


def train(experiment, num_steps):
    """Losses of the first steps, the last state and its metrics."""
    mesh, state, step, batches = start(experiment)
    losses = []
    with jax.set_mesh(mesh):
        for batch in itertools.islice(batches, num_steps):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    return np.array(losses), state, metrics


@pytest.fixture(scope="module")
def one_device_losses(emoji_data):
    return train(step_experiment(emoji_data), 20)[0]


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "plain") for name in list(MESHES)[1:]), *((name, "tuned") for name in MESHES if "fsdp 2" in name)],
)
def test_every_mesh_gives_the_losses_of_one_device(name, kind, emoji_data, one_device_losses):
    losses = train(step_experiment(emoji_data, **KINDS[kind], **mesh_overrides(MESHES[name])), 20)[0]
    np.testing.assert_allclose(losses, one_device_losses, rtol=1e-4)
    assert one_device_losses[-5:].mean() < one_device_losses[:5].mean() - 0.05  # it learned: equal is not constant


@pytest.mark.parametrize("ffn", ["dense", "token_choice", "expert_choice"])
def test_each_ffn_trains_by_changing_one_field(ffn, emoji_data):
    losses, _, metrics = train(step_experiment(emoji_data, model__ffn=ffn), 12)
    assert losses[-4:].mean() < losses[:4].mean()
    assert ("balance_loss" in metrics) == (ffn == "token_choice")
    expected = metrics["flow_loss"] + (
        tiny().model.balance_loss_weight * metrics["balance_loss"] if ffn == "token_choice" else 0
    )
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
    assert metrics["router_grad_norm"].shape == ((0,) if ffn == "dense" else (2,))
    assert ffn == "dense" or (np.asarray(metrics["router_grad_norm"]) > 0).all()


@pytest.mark.slow
def test_a_frozen_text_tower_stays_as_it_was(emoji_data):
    frozen = step_experiment(emoji_data, text__frozen=True)
    losses, state, _ = train(frozen, 6)
    sharded, sharded_state, _ = train(
        step_experiment(emoji_data, text__frozen=True, **mesh_overrides(MESHES["data 2 fsdp 2 expert 2"])), 6
    )
    np.testing.assert_allclose(sharded, losses, rtol=1e-4)
    before = jax.jit(make_system(frozen.system).init)(run_key(frozen.seed, "init"))["text"]
    for found in (state, sharded_state):
        assert found.params.keys() == found.ema.keys() == {"denoiser"}
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(found.frozen), {"text": jax.device_get(before)})
    moments = optax.tree_utils.tree_get(state.optimizer, "nu")
    assert moments.keys() == {"denoiser"}
    trained, _, _ = train(step_experiment(emoji_data), 6)
    np.testing.assert_allclose(losses[0], trained[0], rtol=1e-6)  # the same model
    assert losses[-1] != trained[-1]  # trained otherwise


OPTIONS = {
    "model__router_input": "decoupled",
    "model__gate_norm": "renormalized",
    "model__route_scale": 2.5,
    "model__num_shared_experts": 1,
    "model__expert_width": 64,
    "model__router_z_loss": 1e-3,
}


@pytest.fixture(scope="module")
def losses_with_options(emoji_data):
    losses, _, metrics = train(step_experiment(emoji_data, **OPTIONS), 12)
    assert losses[-4:].mean() < losses[:4].mean()
    np.testing.assert_allclose(metrics["loss"], metrics["flow_loss"] + 1e-3 * metrics["router_z_loss"], rtol=1e-6)
    return losses


@pytest.mark.slow
def test_options_beyond_the_paper_train_alike_on_every_mesh(emoji_data, losses_with_options):
    mesh = mesh_overrides(MESHES["data 2 fsdp 2 expert 2"])
    np.testing.assert_allclose(
        train(step_experiment(emoji_data, **OPTIONS, **mesh), 12)[0], losses_with_options, rtol=1e-4
    )


@pytest.mark.parametrize("name", ["adamw", pytest.param("adafactor", marks=pytest.mark.slow)])
def test_other_optimizers_train(name, emoji_data):
    losses, _, _ = train(step_experiment(emoji_data, optimizer__name=name, optimizer__learning_rate=1e-3), 12)
    assert losses[-4:].mean() < losses[:4].mean()


@pytest.mark.parametrize("group", [pytest.param("image", marks=pytest.mark.slow), "16"])  # an image: 8 kept tokens
def test_accumulation_changes_no_result(group, emoji_data):
    whole, state, _ = train(step_experiment(emoji_data, model__group=group), 4)
    accumulated = step_experiment(emoji_data, model__group=group, train__accumulation=4, mesh__data=2)
    split, split_state, _ = train(accumulated, 4)
    np.testing.assert_allclose(split, whole, rtol=1e-5)
    for (name, a), b in zip(flat_names(state.params).items(), jax.tree.leaves(split_state.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4, err_msg=name)


@pytest.mark.slow
def test_groups_of_two_images_compete(emoji_data):
    """The control of the test above: groups do matter to the loss, once a step has moved the head from zero."""
    alone, together = (
        train(step_experiment(emoji_data, model__group=group, optimizer__learning_rate=1e-3), 4)[0]
        for group in ("image", "16")
    )
    assert (alone[1:] != together[1:]).all()


@pytest.mark.parametrize("poison", ["image", "parameter"])
def test_a_step_that_is_not_finite_changes_nothing_but_its_counters(poison, emoji_data):
    experiment = step_experiment(emoji_data, **mesh_overrides((2, 2, 2, 1)))
    mesh, state, step, batches = start(experiment)
    with jax.set_mesh(mesh):
        state, metrics = step(state, next(batches))
        assert (int(metrics["bad_steps"]), int(metrics["bad_leaf"])) == (0, -1)
        batch = next(batches)
        if poison == "image":
            bad = {**batch, "size_crop": batch["size_crop"] * jnp.nan}
        else:
            bad = batch
            head = state.params["denoiser"]["head"]
            head["kernel"] = head["kernel"].at[0, 0].set(jnp.inf)
        before = jax.device_get((state.params, state.ema, state.optimizer))
        state, metrics = step(state, bad)
        state, metrics = step(state, {name: jnp.copy(x) for name, x in bad.items()})
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((state.params, state.ema, state.optimizer)), before)
    assert (int(state.step), int(state.bad_steps), int(state.bad_in_row)) == (3, 2, 2)
    assert not np.isfinite(metrics["grad_norm"])
    assert not np.isfinite(metrics["loss"])
    assert int(metrics["bad_leaf"]) == -1  # the loss is to blame, before any gradient
    if poison == "image":
        with jax.set_mesh(mesh):
            state, metrics = step(state, next(batches))
        assert (int(state.bad_steps), int(state.bad_in_row)) == (2, 0)


def test_ema_follows_the_warmed_up_decay(emoji_data):
    mesh, state, step, batches = start(step_experiment(emoji_data))
    with jax.set_mesh(mesh):
        expected = np.asarray(state.params["denoiser"]["head"]["bias"])
        for decay in (1 / 10, 2 / 11, 3 / 12):  # (1 + n) / (10 + n), below the config's
            state, _ = step(state, next(batches))
            expected = decay * expected + (1 - decay) * np.asarray(state.params["denoiser"]["head"]["bias"])
            np.testing.assert_allclose(state.ema["denoiser"]["head"]["bias"], expected, rtol=1e-5, atol=1e-9)


def test_rmsprop_by_hand():
    """Clipped gradient, mean square with bias correction, eps outside the root, momentum behind the rate."""
    config = tiny(optimizer__warmup_steps=2, optimizer__learning_rate=0.5, optimizer__clip_norm=3.0).optimizer
    optimizer = make_optimizer(config)
    params = {"w": jnp.array(1.0)}
    state, w, nu, trace = optimizer.init(params), 1.0, 0.0, 0.0
    for n, gradient in enumerate([2.0, -5.0, 1.0]):
        updates, state = optimizer.update({"w": jnp.array(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        clipped = np.clip(gradient, -3, 3)
        nu = 0.99 * nu + 0.01 * clipped**2
        rate = 0.5 * min(1.0, (n + 1) / 2)
        trace = 0.9 * trace + rate * clipped / (np.sqrt(nu / (1 - 0.99 ** (n + 1))) + 1e-8)
        w -= trace
        np.testing.assert_allclose(params["w"], w, rtol=1e-5)


@pytest.mark.parametrize(("in_sqrt", "moved"), [(False, 2 / (2 + 0.1)), (True, 2 / (4 + 0.1) ** 0.5)])
def test_rmsprop_s_eps_is_where_the_config_says(in_sqrt, moved):
    """One gradient of 2: its mean square, bias corrected, is 4. Only an eps that is not tiny shows where it stands."""
    config = tiny(optimizer__warmup_steps=1, optimizer__learning_rate=1.0, optimizer__clip_norm=9.0).optimizer
    config = dataclasses.replace(config, rmsprop_eps=0.1, rmsprop_eps_in_sqrt=in_sqrt)
    params = {"w": jnp.array(1.0)}
    optimizer = make_optimizer(config)
    updates, _ = optimizer.update({"w": jnp.array(2.0)}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], -moved, rtol=1e-5)


@pytest.mark.parametrize(("corrected", "moved"), [(True, 1.0), (False, 10.0)])
def test_rmsprop_s_first_step_is_ten_times_too_long_without_bias_correction(corrected, moved):
    """At a decay of 0.99 the first mean square is a hundredth of the gradient's square."""
    config = tiny(optimizer__warmup_steps=1, optimizer__learning_rate=1.0, optimizer__clip_norm=9.0).optimizer
    config = dataclasses.replace(config, rmsprop_decay=0.99, rmsprop_bias_correction=corrected)
    params = {"w": jnp.array(1.0)}
    optimizer = make_optimizer(config)
    updates, _ = optimizer.update({"w": jnp.array(2.0)}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], -moved, rtol=1e-5)


def test_adamw_by_hand():
    """Clipped gradient, both moments with bias correction, eps outside the root, the weight decays at the same rate."""
    changes = {"name": "adamw", "warmup_steps": 1, "learning_rate": 0.5, "clip_norm": 3.0, "weight_decay": 0.1}
    config = tiny(**{f"optimizer__{key}": value for key, value in changes.items()}).optimizer
    config = dataclasses.replace(config, adam_b1=0.8, adam_b2=0.95, adam_eps=1e-3)
    optimizer = make_optimizer(config)
    params = {"w": jnp.array(1.0)}
    state, w, mean, square = optimizer.init(params), 1.0, 0.0, 0.0
    for n, gradient in enumerate([2.0, -5.0, 1.0], 1):
        updates, state = optimizer.update({"w": jnp.array(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        clipped = np.clip(gradient, -3, 3)
        mean, square = 0.8 * mean + 0.2 * clipped, 0.95 * square + 0.05 * clipped**2
        w -= 0.5 * (mean / (1 - 0.8**n) / (np.sqrt(square / (1 - 0.95**n)) + 1e-3) + 0.1 * w)
        np.testing.assert_allclose(params["w"], w, rtol=1e-5)


def test_parameters_and_examples_have_keys_of_their_own():
    keys = [run_key(seed, use) for seed in (0, 1) for use in ("init", "examples")]
    assert len({jax.random.key_data(key).tobytes() for key in keys}) == 4


def test_warm_up_is_linear_then_constant():
    schedule = make_schedule(tiny(optimizer__warmup_steps=4, optimizer__learning_rate=2.0).optimizer)
    np.testing.assert_allclose([schedule(jnp.int32(n)) for n in range(6)], [0.5, 1.0, 1.5, 2.0, 2.0, 2.0])


def test_moments_and_ema_are_sharded_like_their_parameters(emoji_data):
    experiment = step_experiment(emoji_data, **mesh_overrides((2, 2, 2, 1)))
    mesh, system = make_mesh(experiment.mesh), make_system(experiment.system)
    optimizer = make_optimizer(experiment.optimizer)
    shardings = state_shardings(system, optimizer, mesh)
    with jax.set_mesh(mesh):
        state = init_state(system, optimizer, shardings, experiment.seed)
    drawn_on_one = first_state(experiment.system, experiment.optimizer, experiment.seed)
    for (name, sharded), whole in zip(
        flat_names(state.params).items(), jax.tree.leaves(drawn_on_one.params), strict=True
    ):
        np.testing.assert_allclose(sharded, whole, rtol=1e-6, atol=1e-7, err_msg=name)
    experts = lambda tree: tree["denoiser"]["pairs"]["even"]["experts"]["up"]  # noqa: E731
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.shape == experts(state.params).shape]
    assert len(moments) == 2  # mean square and trace
    for leaf in (experts(state.params), experts(state.ema), *moments):
        # layers, E over expert, d whole, f over tensor and fsdp
        assert leaf.sharding.spec == jax.sharding.PartitionSpec(None, ("expert",), None, ("tensor", "fsdp"))
        assert leaf.addressable_shards[0].data.shape == (2, 2, 32, 64)


def updates_of(optimizer, gradients):
    """Weights [8, 8] after updates with the gradients, less where they were, and the state."""
    params = {"w": jnp.linspace(-1.0, 1.0, 64).reshape(8, 8)}
    state, current = optimizer.init(params), params
    for gradient in gradients:
        updates, state = optimizer.update({"w": jnp.asarray(gradient)}, state, current)
        current = optax.apply_updates(current, updates)
    return np.asarray(current["w"] - params["w"]), state


@pytest.mark.parametrize("name", ["rmsprop", "adamw"])
def test_moments_in_bfloat16_change_little(name):
    """Sixteen noisy gradients: what bfloat16 rounds off of the moments moves no weight by more than 2 %."""
    gradients = np.random.default_rng(0).normal(1, 1, (16, 8, 8)).astype(np.float32)
    config = tiny(optimizer__name=name, optimizer__warmup_steps=1).optimizer
    moved, state = updates_of(make_optimizer(config), gradients)
    config = dataclasses.replace(config, moment_dtype="bfloat16")
    rounded, rounded_state = updates_of(make_optimizer(config), gradients)
    for tree, dtype in ((state, jnp.float32), (rounded_state, jnp.bfloat16)):
        assert [leaf.dtype for leaf in jax.tree.leaves(tree) if leaf.shape == (8, 8)] == [dtype] * 2
    np.testing.assert_allclose(rounded, moved, atol=0.02 * np.abs(moved).max())
    assert (rounded != moved).any()


def test_a_sharded_run_keeps_moments_in_bfloat16():
    experiment = tiny(optimizer__moment_dtype="bfloat16", **mesh_overrides((2, 2, 2, 1)))
    system, optimizer = make_system(experiment.system), make_optimizer(experiment.optimizer)
    mesh = make_mesh(experiment.mesh)
    shardings = state_shardings(system, optimizer, mesh)
    abstract = abstract_state(system, optimizer, shardings)
    trace = optax.tree_utils.tree_get(abstract.optimizer, "nu")["denoiser"]["pairs"]["even"]["experts"]["up"]
    param = abstract.params["denoiser"]["pairs"]["even"]["experts"]["up"]
    assert (trace.dtype, param.dtype, trace.sharding) == (jnp.bfloat16, jnp.float32, param.sharding)


def test_kept_tokens_are_a_uniform_sorted_subset():
    config = tiny().model  # 16 tokens, 8 kept
    kept = np.asarray(jax.vmap(lambda key: kept_tokens(key, config))(jax.random.split(jax.random.key(0), 4000)))
    assert kept.shape == (4000, 8)
    assert (np.diff(kept, axis=1) > 0).all()
    share = np.bincount(kept.ravel(), minlength=16) / 4000
    np.testing.assert_allclose(share, 0.5, atol=0.04)  # five standard deviations


@pytest.mark.parametrize(
    ("overrides", "key", "said"),
    [
        ({"mesh__data": 8, "train__batch_size": 12}, "train.batch_size", "multiple of 8"),
        ({"mesh__data": 8, "train__accumulation": 4}, "train.batch_size", "8 parts of the mesh x 4 microbatches"),
        ({"mesh__data": 8, "model__group": "32"}, "model.group", "2 images x 8 tokens"),
        ({"mesh__data": 8, "sampling__batch_size": 12}, "sampling.batch_size", "8 parts"),
        ({"mesh__data": 8, "model__sampling_group": "64"}, "model.sampling_group", "2 images x 16"),
        ({"mesh__fsdp": 4, "model__expert_products": "halves"}, "model.expert_products", "mesh.fsdp = 2, not 4"),
    ],
)
def test_what_does_not_divide_is_refused_with_its_numbers(overrides, key, said):
    experiment = tiny(**overrides)
    with pytest.raises(ConfigError) as error:
        check_mesh(experiment, make_mesh(experiment.mesh))
    assert error.value.key == key
    assert said in str(error.value)
