"""Checksums of arrays, computed on the devices that hold their shards; equal on any sharding, mesh and process count.

A bijection scrambles every 32-bit word of an array's bits with its position. Two sums modulo 2^32 are kept: of the
scrambled words, and of those scrambled again. So any change within one word changes both sums, for certain. Damage of
several words, or words that change places, escapes if both sums happen to agree: one case in 2^64, as far as the
scrambling looks random (nobody is defended against who wants them to agree).

Odd weights alone would not do. Flip the signs of any two words, and 2^31 times one odd weight plus 2^31 times another
is 0 modulo 2^32.
"""

import functools
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, UInt32

from ecdit.partitioning import replicated

GOLDEN = 0x9E3779B1  # 2^32 / golden ratio, an odd number whose bits have no pattern


def start_checksums(arrays: Mapping[str, jax.Array]) -> UInt32[Array, "arrays 2"]:
    """Starts computing the sums of `arrays`, all on one mesh, in the order of their names. Collective.

    No array leaves its device or is copied on it. The arrays may be donated once this returns.
    """
    ordered = [arrays[name] for name in sorted(arrays)]
    return _program(ordered[0].sharding.mesh)(ordered)  # pyright: ignore[reportAttributeAccessIssue]  # NamedSharding


def finish_checksums(names: Iterable[str], sums: UInt32[Array, "arrays 2"]) -> dict[str, str]:
    """Waits for the sums that `start_checksums` started for arrays of these names; each is 16 hexadecimal digits."""
    rows = np.asarray(sums).tolist()
    return {name: f"{first:08x}{second:08x}" for name, (first, second) in zip(sorted(names), rows, strict=True)}


def checksums(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    """Returns the checksum of every array by its name; waits for them."""
    return finish_checksums(arrays, start_checksums(arrays))


@functools.cache
def _program(mesh: Mesh) -> Callable[[list[jax.Array]], jax.Array]:
    return jax.jit(lambda arrays: jnp.stack([shard_sums(x) for x in arrays]), out_shardings=replicated(mesh))


@jax.jit  # traced once for all arrays of a shape
def shard_sums(x: Array) -> UInt32[Array, " 2"]:
    """Returns the two sums of an array, or of the shard of one inside a shard_map."""
    words = _words(x)
    first = _scramble(words ^ _scramble(_positions(words.shape)))
    second = _scramble(first + jnp.uint32(GOLDEN))
    zero, add = jnp.uint32(0), lambda a, b: (a[0] + b[0], a[1] + b[1])
    # One reduction computes both, because two would make XLA store the scrambled words, a second copy of the array.
    return jnp.stack(lax.reduce((first, second), (zero, zero), add, tuple(range(words.ndim))))


def _words(x: Array) -> UInt32[Array, "..."]:
    """Returns the bits of `x` as words: numbers of up to 32 bits take one each, larger ones two."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _positions(shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Returns a number for each place of an array. In one of 2^32 places some share a number; they are far apart."""
    places = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = jnp.uint32((2 * axis + 1) * GOLDEN % 2**32)
        places += stride * lax.broadcasted_iota(jnp.uint32, shape, axis)
    return places


def _scramble(words: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Maps words one to one, so that each bit changes half of all bits: products carry it up, shifts carry it down."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x7FEB352D)
    words = (words ^ (words >> 15)) * jnp.uint32(0x846CA68B)
    return words ^ (words >> 16)
