"""What the accelerators can do at most.

Peaks and memories by the public data sheets (cloud.google.com/tpu/docs; NVIDIA's of H100, H200 and A100, without
sparsity), links and networks as "How to Scale Your Model" (jax-ml.github.io/scaling-book/tpus) rounds them. A "device"
is what jax.devices() lists: a chip from v4 to v6e, of which v4 and v5p join the two cores, and one of the two dies of a
TPU7x.

A TPU7x has 2307 TFLOP/s in bfloat16, 192 GB of memory at 7380 GB/s, and 100 Gb/s of the data-centre network
(cloud.google.com/tpu/docs/tpu7x); each of its links carries 90 GB/s one way (the scaling book). Here each die
has half of all that. That they send each other six times as much as a link carries is second-hand: others quote
Google's page.
What is not published of it: the clock is derived, as that at which its peak is 16 arrays of 128 x 128 multipliers (the
compiler counts 13 of them for a large product, so eight are too few); the vector unit is assumed to have as many lanes
as the others', which JAX's pltpu.get_tpu_info says too; the way to the host is assumed to be theirs, shared by two.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of one JAX device, whatever it is."""

    name: str
    peak_flops: float  # FLOP/s of matrix products in bfloat16
    hbm_bytes: float  # as the data sheets count: GB of 10^9 bytes
    hbm_bandwidth: float  # bytes/s


@dataclasses.dataclass(frozen=True)
class Chip(Limits):
    """Those of a TPU, with what plans need beside them."""

    clock: float  # Hz, in which the compiler counts cycles
    vector_flops: float  # operations/s of one vector unit on each core: 8 x 128 lanes each
    link_bandwidth: float  # bytes/s of a link to a neighbouring chip, one way: the device's share
    wraps_at: int  # a dimension of a slice is a ring if it is a multiple of this
    dcn_bandwidth: float  # bytes/s of the device's share of its host's network, one way
    host_bandwidth: float  # bytes/s from the device to its host's memory
    die_bandwidth: float = 0.0  # bytes/s from a device to the other one of its chip, one way; 0: there is none


# By jax.Device.device_kind.
CHIPS = {
    "TPU v4": Chip("v4", 275e12, 32e9, 1.2e12, 1.05e9, 2.2e12, 45e9, 4, 6.25e9, 16e9),
    "TPU v5": Chip("v5p", 459e12, 95e9, 2.765e12, 1.75e9, 3.6e12, 90e9, 4, 6.25e9, 16e9),
    "TPU v5 lite": Chip("v5e", 197e12, 16e9, 0.82e12, 1.5e9, 1.5e12, 45e9, 16, 3.125e9, 16e9),
    "TPU v6 lite": Chip("v6e", 918e12, 32e9, 1.64e12, 1.75e9, 1.8e12, 90e9, 16, 6.25e9, 16e9),
    "TPU7x": Chip("tpu7x", 1153.5e12, 96e9, 3.69e12, 2.2e9, 2.3e12, 45e9, 4, 6.25e9, 8e9, die_bandwidth=540e9),
}


GPUS = {
    "NVIDIA H100 80GB HBM3": Limits("H100-SXM", 989e12, 80e9, 3.35e12),
    "NVIDIA H100 PCIe": Limits("H100-PCIe", 756e12, 80e9, 2.0e12),
    "NVIDIA H100 NVL": Limits("H100-NVL", 835e12, 94e9, 3.9e12),
    "NVIDIA H200": Limits("H200-SXM", 989e12, 141e9, 4.8e12),
    "NVIDIA H200 NVL": Limits("H200-NVL", 835e12, 141e9, 4.8e12),
    "NVIDIA A100-SXM4-80GB": Limits("A100-SXM-80GB", 312e12, 80e9, 2.039e12),
    "NVIDIA A100-SXM4-40GB": Limits("A100-SXM-40GB", 312e12, 40e9, 1.555e12),
}


def limits(device_kind: str) -> Limits | None:
    """The limits of a TPU or GPU that JAX calls `device_kind`; None for one that no table has."""
    return CHIPS.get(device_kind) or GPUS.get(device_kind)


def chip(device_kind: str) -> Chip | None:
    """The TPU that JAX calls `device_kind`; None for one that the table lacks: limits are not guessed."""
    return CHIPS.get(device_kind)


def chip_named(name: str) -> Chip | None:
    """The TPU of a name such as v5p; None for one that the table lacks."""
    return next((kind for kind in CHIPS.values() if kind.name == name), None)
