"""What the accelerators can do at most.

Peaks and memories by the public data sheets (cloud.google.com/tpu/docs; NVIDIA's of H100, H200 and A100, without
sparsity), links and networks as "How to Scale Your Model" (jax-ml.github.io/scaling-book/tpus) rounds them. A "device"
is what jax.devices() lists: from v4 on that is a chip, of which v4 and v5p join the two cores.
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
    link_bandwidth: float  # bytes/s of a link to a neighbour, one way
    wraps_at: int  # a dimension of a slice is a ring if it is a multiple of this
    dcn_bandwidth: float  # bytes/s of a chip's share of its host's network, one way
    host_bandwidth: float  # bytes/s from a chip to its host's memory


# By jax.Device.device_kind.
CHIPS = {
    "TPU v4": Chip("v4", 275e12, 32e9, 1.2e12, 1.05e9, 2.2e12, 45e9, 4, 6.25e9, 16e9),
    "TPU v5": Chip("v5p", 459e12, 95e9, 2.765e12, 1.75e9, 3.6e12, 90e9, 4, 6.25e9, 16e9),
    "TPU v5 lite": Chip("v5e", 197e12, 16e9, 0.82e12, 1.5e9, 1.5e12, 45e9, 16, 3.125e9, 16e9),
    "TPU v6 lite": Chip("v6e", 918e12, 32e9, 1.64e12, 1.75e9, 1.8e12, 90e9, 16, 6.25e9, 16e9),
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
