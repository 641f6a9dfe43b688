"""Tests that checksums of arrays are the same for any shards, and differ for every damage."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ecdit.checkpoints import checksums as module
from ecdit.checkpoints.checksums import checksums
from ecdit.partitioning import MESH_AXES, MeshConfig, make_mesh

DTYPES = ["float32", "bfloat16", "int32", "uint8", "bool", "float16"]


def on(array, mesh=None, *spec):
    mesh = mesh or Mesh(np.array(jax.devices()[:1]), ("data",))
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))


def checksum(array):
    return checksums({"x": on(array)})["x"]


def noise(shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(jnp.dtype(dtype))


def scrambled(word):
    word = (word ^ word >> 16) * 0x7FEB352D % 2**32
    word = (word ^ word >> 15) * 0x846CA68B % 2**32
    return word ^ word >> 16


@pytest.mark.parametrize("dtype", DTYPES)
def test_by_hand(dtype):
    """Word by word, in Python's integers."""
    array = noise((3, 5, 2), dtype)
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize]
    first = second = 0
    for place in itertools.product(*map(range, array.shape)):
        position = sum((2 * axis + 1) * 0x9E3779B1 * i for axis, i in enumerate(place)) % 2**32
        word = scrambled(int(array[place].view(unsigned)) ^ scrambled(position))
        first, second = first + word, second + scrambled((word + 0x9E3779B1) % 2**32)
    assert checksum(array) == f"{first % 2**32:08x}{second % 2**32:08x}"


@pytest.mark.parametrize("sizes", [(1, 8, 1, 1, 1), (2, 1, 2, 2, 1), (1, 1, 1, 2, 4)])
def test_the_same_on_any_mesh_and_sharding(sizes):
    mesh = make_mesh(MeshConfig(*sizes))
    arrays = {dtype: noise((8, 16, 8), dtype) for dtype in DTYPES} | {"scalar": np.float32(3)}
    expected = {name: checksum(array) for name, array in arrays.items()}
    for spec in [(), (MESH_AXES,), (None, ("data", "expert"), "tensor"), ("fsdp", None, ("slices", "data"))]:
        placed = {name: on(array, mesh, *spec[: array.ndim]) for name, array in arrays.items()}
        assert checksums(placed) == expected, spec


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_flipped_bit_changes_both_sums(dtype):
    array = noise((2, 3), dtype)
    before, data = checksum(array), array.tobytes()
    bits = [place * 8 for place in range(len(data))] if dtype == "bool" else range(8 * len(data))
    for bit in bits:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        after = checksum(np.frombuffer(bytes(flipped), array.dtype).reshape(array.shape))
        assert after[:8] != before[:8], bit
        assert after[8:] != before[8:], bit


def test_damage_that_cancels_under_odd_weights_is_found():
    """Two flipped signs, words that change places, rows that do, a block of zeros, one moved by a place."""
    array = noise((4, 256))
    before = checksum(array)
    signs, words, rows, zeros = (array.copy() for _ in range(4))
    signs[0, :2] *= -1
    words[0, 0], words[0, 128] = array[0, 128], array[0, 0]
    rows[[0, 2]] = array[[2, 0]]
    zeros[1] = 0
    for damaged in (signs, words, rows, zeros, np.roll(array, 1), array.reshape(256, 4)):
        assert checksum(damaged) != before


def test_two_damaged_words_escape_a_short_sum_as_often_as_chance_has_it():
    """The lowest 8 bits of a sum agree in 1 of 256 cases of random damage: the sums have no bias to speak of."""
    arrays = np.repeat(noise((1, 64)), 4096, axis=0)
    rng = np.random.default_rng(1)
    words = arrays.view(np.uint32)
    for row in range(1, len(arrays)):
        words[row, rng.choice(64, 2, replace=False)] ^= np.uint32(1) << rng.integers(0, 32, 2).astype(np.uint32)
    sums = np.asarray(jax.jit(jax.vmap(module.shard_sums))(jnp.asarray(arrays)))
    for column in range(2):
        agree = (sums[1:, column] & 0xFF == sums[0, column] & 0xFF).mean()
        assert 0.5 / 256 < agree < 2 / 256
    assert len({tuple(row) for row in sums.tolist()}) > 4000  # some damage is drawn twice


def test_each_array_has_its_own_sum_in_whatever_order_they_come():
    arrays = {name: on(noise((4, 4), seed=seed)) for seed, name in enumerate("cab")}
    assert checksums(arrays) == {name: checksum(np.asarray(array)) for name, array in arrays.items()}


def test_keys_have_checksums():
    one, other = (on(jax.random.split(jax.random.key(seed), 4)) for seed in (0, 1))
    assert checksums({"x": one}) != checksums({"x": other})


def test_nothing_is_copied():
    """On the device: the sums of 16 MiB take less than a thousandth of it beside."""
    mesh = make_mesh(MeshConfig(1, 2, 2, 2, 1))
    for dtype in ("float32", "bfloat16"):
        array = on(np.zeros((64, 256, 256), jnp.dtype(dtype)), mesh, ("fsdp", "expert"))
        compiled = module._program(mesh).lower([array]).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < array.nbytes // 1000
