"""Sums over the bits of tensors, by which processes compare what each has read of them.

The sum of a tensor is that of all its slices, however it is cut. Every word is weighted by its place, by a product of
odd numbers, one for each axis, modulo 2^64. So a change of one word always changes the sum, and one of several words
does so but for one case in about 2^64. Nobody is defended against who wants sums to agree; fingerprints are sha256.
"""

import numpy as np

_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # by bytes


def slice_sum(values: np.ndarray, index: tuple[slice, ...]) -> int:
    """Returns the sum of a slice of a tensor, below 2^64.

    Args:
      values: the slice.
      index: where it is in the tensor.
    """
    total = np.ascontiguousarray(values).view(_WORDS[values.dtype.itemsize]).astype(np.uint64).reshape(values.shape)
    for axis in reversed(range(values.ndim)):
        total = np.einsum("...i,i->...", total, _weights(axis, index[axis]))  # twice as fast as @
    return int(total)


def _weights(axis: int, part: slice) -> np.ndarray:
    """Returns an odd number for each place on an axis, uint64: SplitMix64 of the place and the axis."""
    x = np.arange(part.start, part.stop, dtype=np.uint64) + np.uint64((axis + 1) << 48)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return (x ^ (x >> np.uint64(31))) | np.uint64(1)
