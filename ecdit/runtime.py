"""What a process sets before it touches a device: XLA flags, the compilation cache, jax.distributed.

A run and its plan both call `configure`, so that both compile the same program.
"""

import dataclasses
import os

import jax

from ecdit.config import require


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    """Process-wide settings."""

    xla_flags: tuple[str, ...]  # each "--xla_...=value", added to XLA_FLAGS
    compilation_cache: str  # directory of the persistent compilation cache; "" for none
    distributed: bool  # join the other hosts by jax.distributed (a TPU pod; needs no further setting there)

    def __post_init__(self):
        for flag in self.xla_flags:
            require(flag.startswith("--xla"), "xla_flags", flag, "each flag must start with --xla")


def configure(config: RuntimeConfig) -> None:
    """Applies `config`; call it before the first use of a device.

    Where ECDIT_COORDINATOR, ECDIT_NUM_PROCESSES and ECDIT_PROCESS_ID are set (by `launch.local`), they say whom to
    join.
    """
    present = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join(present + [flag for flag in config.xla_flags if flag not in present])
    if config.compilation_cache:
        cache = os.path.expanduser(config.compilation_cache)
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    if "ECDIT_COORDINATOR" in os.environ:
        jax.distributed.initialize(
            os.environ["ECDIT_COORDINATOR"],
            num_processes=int(os.environ["ECDIT_NUM_PROCESSES"]),
            process_id=int(os.environ["ECDIT_PROCESS_ID"]),
        )
    elif config.distributed:
        jax.distributed.initialize()
