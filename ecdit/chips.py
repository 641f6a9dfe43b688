"""Lists the limits of accelerators.

Peaks and memories come from public data sheets (cloud.google.com/tpu/docs; NVIDIA's for H100, H200 and A100, without
sparsity). Links and networks are rounded as in "How to Scale Your Model" (jax-ml.github.io/scaling-book/tpus). A
"device" is an entry of jax.devices(): a chip from v4 to v6e (v4 and v5p join two cores), or one of the two dies of a
TPU7x.

A TPU7x has 2307 TFLOP/s in bfloat16, 192 GB of memory at 7380 GB/s, and 100 Gb/s of the data-centre network
(cloud.google.com/tpu/docs/tpu7x). Each of its links carries 90 GB/s one way (the scaling book). Here each die has half
of all that. The dies send each other six times as much as a link carries; this number is second-hand, quoted from
Google's page by others.
Some of its limits are not published. The clock is the one at which 16 arrays of 128 x 128 multipliers reach the peak
(the compiler counts 13 arrays for a large product, so eight are too few). The vector unit is assumed to have as many
lanes as those of other chips, as JAX's pltpu.get_tpu_info also says. The bandwidth to the host is assumed to be that of
other chips, shared by two dies.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of a JAX device."""

    name: str
    peak_flops: float  # FLOP/s of matrix products in bfloat16
    hbm_bytes: float  # as the data sheets count: GB of 10^9 bytes
    hbm_bandwidth: float  # bytes/s


@dataclasses.dataclass(frozen=True)
class Chip(Limits):
    """The limits of a TPU, with further fields for plans."""

    clock: float  # Hz, in which the compiler counts cycles
    vector_flops: float  # operations/s with one vector unit of 8 x 128 lanes per core
    link_bandwidth: float  # bytes/s, the device's share of a link to a neighbouring chip, one way
    wraps_at: int  # a dimension of a slice is a ring if it is a multiple of this number
    dcn_bandwidth: float  # bytes/s, the device's share of its host's network, one way
    host_bandwidth: float  # bytes/s from the device to its host's memory
    die_bandwidth: float = 0.0  # bytes/s to the chip's other device, one way; 0 if the chip has only one


# Keys are jax.Device.device_kind.
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
    """Returns the limits of the TPU or GPU with a `device_kind` of JAX, or None if no table has it."""
    return CHIPS.get(device_kind) or GPUS.get(device_kind)


def chip(device_kind: str) -> Chip | None:
    """Returns the TPU with a `device_kind` of JAX, or None if the table lacks it, because limits are not guessed."""
    return CHIPS.get(device_kind)


def chip_named(name: str) -> Chip | None:
    """Returns the TPU with a name such as v5p, or None if the table lacks it."""
    return next((kind for kind in CHIPS.values() if kind.name == name), None)
