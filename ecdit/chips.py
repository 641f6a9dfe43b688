"""What the accelerators can do at most, by public data sheets (cloud.google.com/tpu/docs).

A "device" is what jax.devices() lists: from v4 on that is a chip, of which v4 and v5p join the two cores.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """The limits of one JAX device."""

    name: str
    peak_flops: float  # FLOP/s of matrix products in bfloat16
    hbm_bytes: float  # as the data sheets count: GB of 10^9 bytes


# By jax.Device.device_kind.
CHIPS = {
    "TPU v4": Chip("v4", 275e12, 32e9),
    "TPU v5": Chip("v5p", 459e12, 95e9),
    "TPU v5 lite": Chip("v5e", 197e12, 16e9),
    "TPU v6 lite": Chip("v6e", 918e12, 32e9),
}


def chip(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`; None for one that the table lacks: limits are not guessed."""
    return CHIPS.get(device_kind)
