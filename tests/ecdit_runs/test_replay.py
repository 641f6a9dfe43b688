"""Tests that a bit flipped in a computation or in a copy by the hardware is found, and its device named."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ecdit.config import ConfigError
from ecdit.partitioning import make_mesh
from ecdit.runs.replay import CorruptionError, check_deterministic, device_sums, unequal_copies
from ecdit.runs.workload import make_workload
from tests.runs import tiny


def flipped(array, number):
    """The array with one bit flipped in the copy or shard of one device."""
    parts = []
    for shard in array.addressable_shards:
        values = np.array(shard.data)
        if shard.device.id == number:
            values.reshape(-1).view(np.uint32)[1] ^= 1 << 5
        parts.append(jax.device_put(values, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


class Faulty:
    """Gradients of the toy's parameters, with an error on a device in one of the calls."""

    def __init__(self, call, device):
        self.calls, self.call, self.device = 0, call, device

    def __call__(self, state, batch):
        self.calls += 1
        gradients = jax.tree.map(jnp.copy, state.params)
        if self.calls == self.call:
            gradients["denoiser"]["tail"] = flipped(gradients["denoiser"]["tail"], self.device)
        return gradients


def test_a_computation_that_went_wrong_once_names_step_and_device(toy):
    """Every second step is replayed, by two calls: the third and the fourth are those of step 4."""
    toy.gradients = Faulty(call=4, device=5)
    said = r"^step 4: the gradients of one batch, computed twice, differ on device 5 \(cpu, process 0\)\. "
    with pytest.raises(CorruptionError, match=said):
        toy.train(num_steps=9, every=3, train__replay_every=2)
    assert sorted(toy.saved()) == [3]


def test_without_a_fault_a_replay_changes_nothing(toy):
    toy.gradients = Faulty(call=0, device=0)
    assert toy.train(num_steps=9, every=4, train__replay_every=3) == 0
    assert toy.gradients.calls == 6
    assert toy.losses() == [(step, float(step)) for step in range(1, 10)]
    assert toy.train(num_steps=13, every=4, train__replay_every=3) == 0
    assert toy.gradients.calls == 8  # before step 12: a resumed run counts on


def test_without_replays_gradients_are_not_computed_twice(toy):
    toy.gradients = Faulty(call=0, device=0)
    toy.train(num_steps=3, every=4)
    assert toy.gradients.calls == 0


@pytest.mark.parametrize("part", ["params", "ema"])
def test_a_copy_of_a_parameter_that_has_changed_names_its_device(toy, part):
    step = toy.train_step

    def faulty_step(state, bad):
        state, metrics = step(state, bad)
        values = getattr(state, part)
        if int(state.step) == 3:
            values["denoiser"]["tail"] = flipped(values["denoiser"]["tail"], 6)
        return state, metrics

    toy.train_step = faulty_step
    name = {"params": "parameters", "ema": "EMA weights"}[part]
    said = rf"^step 4: copies of the {name} on device 6 \(cpu, process 0\) differ"
    with pytest.raises(CorruptionError, match=said):
        toy.train(num_steps=9, every=100, train__replay_every=4)


@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec("data"), PartitionSpec(None, ("data", "expert"))])
def test_every_device_s_shard_has_a_sum_of_its_own(spec):
    mesh = make_mesh(tiny(mesh__data=2, mesh__expert=4).mesh)
    array = jax.device_put(np.arange(128, dtype=np.float32).reshape(16, 8), NamedSharding(mesh, spec))
    before = device_sums({"a": array})
    assert len(before) == 8
    for number in range(8):
        after = device_sums({"a": flipped(array, number)})
        assert [device.id for device in before if (before[device] != after[device]).any()] == [number]


def test_copies_of_a_shard_are_compared_with_each_other_alone():
    """Half of the array is on four devices each: the halves differ by right."""
    mesh = make_mesh(tiny(mesh__data=2, mesh__expert=4).mesh)
    array = jax.device_put(np.arange(8, dtype=np.float32), NamedSharding(mesh, PartitionSpec("data")))
    assert unequal_copies({"a": array}) == []
    assert [device.id for device in unequal_copies({"a": array, "b": flipped(array, 6)})] == [6]


def test_the_model_s_gradients_are_the_same_bits_twice():
    """On CPU, for the real model; each device computes on rows of its own."""
    experiment = tiny(model__depth=2, model__extra_blocks=1)
    mesh = make_mesh(experiment.mesh)
    workload = make_workload(experiment, mesh)
    (phase,) = experiment.resolved_phases()
    side, length = experiment.data.image_size, experiment.data.caption_length
    random = np.random.default_rng(0)
    batch = {
        "image": random.integers(0, 255, (16, side, side, 3), np.uint8),
        "tokens": np.ones((16, length), np.int32),
        "size_crop": np.ones((16, 4), np.float32),
    }
    with jax.set_mesh(mesh):
        state, _ = workload.first_state()
        gradients = workload.gradients(phase)
        first, again = (device_sums(gradients(state, batch)) for _ in range(2))
        other = device_sums(gradients(dataclasses.replace(state, step=state.step + 1), batch))
    for device, sums in first.items():
        np.testing.assert_array_equal(sums, again[device])
        assert (sums != other[device]).any()


def test_a_backend_that_gives_other_bits_is_refused():
    check_deterministic(0, "gpu", ())
    check_deterministic(100, "tpu", ())
    check_deterministic(100, "gpu", ("--xla_gpu_deterministic_ops=true",))
    with pytest.raises(ConfigError, match=r"train\.replay_every = 100: must be 0 on gpu, or runtime\.xla_flags must"):
        check_deterministic(100, "gpu", ())
