"""Sets XLA flags, the compilation cache and jax.distributed, before a process touches a device.

A run and its plan both call `configure`, so that both compile the same program.
"""

import ctypes
import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ecdit import chips
from ecdit.config import require
from ecdit.errors import OutageError
from ecdit.files import is_remote
from ecdit.storage import as_path, is_temporary

# The only kinds of device on which an option is safe. On others, libtpu 0.0.52 warns that it may give wrong results or
# hang, and older compilers accept it silently.
SAFE_ON = {"xla_tpu_enable_async_collective_fusion_fuse_all_gather": ("TPU v5 lite",)}

# In the RuntimeError that JAX raises if the name of the first host cannot be resolved for five minutes.
NO_COORDINATOR = "Failed to recognize coordinator address"


@dataclasses.dataclass(frozen=True)
class TpuOptions:
    """Options of the TPU compiler, each "xla_...=value". Those of a kind of chip replace those of `all`."""

    all: tuple[str, ...]
    v4: tuple[str, ...]
    v5e: tuple[str, ...]
    v5p: tuple[str, ...]
    v6e: tuple[str, ...]
    tpu7x: tuple[str, ...]

    def __post_init__(self):
        for field in dataclasses.fields(self):
            for option in getattr(self, field.name):
                fits = option.startswith("xla_") and "=" in option
                require(fits, field.name, option, "each option must be xla_...=value")

    def of(self, chip: str) -> dict[str, str]:
        """Returns the options by name for a chip as `chips` names it; only those of `all` for one that it lacks."""
        return dict(option.split("=", 1) for option in (*self.all, *getattr(self, chip, ())))


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    """Process-wide settings."""

    xla_flags: tuple[str, ...]  # each "--xla_...=value", added to XLA_FLAGS
    tpu_options: TpuOptions  # of the training step's compilation
    keep_host_memory: bool  # reuses freed memory instead of returning it, which halves the time of a step on CPU
    compilation_cache: str  # directory of the persistent compilation cache; "" for none (see `configure`)
    distributed: bool  # joins the other hosts by jax.distributed, which needs no further setting on a TPU pod
    heartbeat_seconds: int  # seconds of silence after which a process counts as dead and the others end

    def __post_init__(self):
        for flag in self.xla_flags:
            require(flag.startswith("--xla"), "xla_flags", flag, "each flag must start with --xla")
        require(self.heartbeat_seconds >= 1, "heartbeat_seconds", self.heartbeat_seconds, "must be 1 or more")


def configure(config: RuntimeConfig, workdir: Path | None = None) -> None:
    """Applies `config`. Call it before the first use of a device.

    A run with its `workdir` in a bucket caches compiled programs there, because a restarted host has a new disk. It
    does not if the config names no cache or another bucket. `launch.local` sets ECDIT_COORDINATOR, ECDIT_NUM_PROCESSES
    and ECDIT_PROCESS_ID, which say which processes to join.

    Raises:
      OutageError: the other processes could not be reached.
    """
    present = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join(present + [flag for flag in config.xla_flags if flag not in present])
    if config.keep_host_memory:
        _keep_freed_memory()
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", _cache_directory(config.compilation_cache, workdir))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    if "ECDIT_COORDINATOR" in os.environ:
        _join(
            config,
            coordinator_address=os.environ["ECDIT_COORDINATOR"],
            num_processes=int(os.environ["ECDIT_NUM_PROCESSES"]),
            process_id=int(os.environ["ECDIT_PROCESS_ID"]),
        )
    elif config.distributed:
        _join(config)


def _join(config: RuntimeConfig, **processes: Any) -> None:
    """Joins the other processes. Launchers restart a run after an outage, and not after other errors.

    Hosts of several slices on GKE find the first one by a DNS name, which may exist only minutes after they start.
    """
    try:
        jax.distributed.initialize(**processes, heartbeat_timeout_seconds=config.heartbeat_seconds)
    except RuntimeError as error:
        if NO_COORDINATOR not in str(error) and not is_temporary(error):
            raise
        raise OutageError(f"the other processes of the run cannot be reached: {error}") from error


def _cache_directory(named: str, workdir: Path | None) -> str:
    if is_remote(named):
        return str(as_path(named, "config.runtime.compilation_cache"))
    return str(workdir / "compilation_cache") if workdir and is_remote(workdir) else os.path.expanduser(named)


def compiler_options(config: RuntimeConfig, mesh: Mesh) -> dict[str, str] | None:
    """Returns jax.jit's compiler_options for a mesh of TPUs, or None for other devices, whose compilers refuse them.

    Raises:
      ConfigError: an option may give wrong results on these devices.
    """
    device = mesh.devices.flat[0]
    chip = chips.chip(device.device_kind)
    options = config.tpu_options.of(chip.name if chip else "")
    if device.platform != "tpu" or not options:
        return None
    for name, kinds in SAFE_ON.items():
        require(
            options.get(name, "false") == "false" or device.device_kind in kinds,
            "runtime.tpu_options",
            f"{name}={options.get(name)}",
            f"may give wrong results on {device.device_kind}: allowed only on {', '.join(kinds)}",
        )
    return options


def _keep_freed_memory() -> None:
    """Tells glibc to reuse freed memory. Does nothing if the C library has no mallopt.

    XLA's CPU client allocates and frees its buffers in each step. By default malloc maps and unmaps the large ones, and
    the kernel zeroes about a gigabyte of fresh pages per step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8  # <malloc.h>
    mallopt(arena_max, 1)
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)  # never
    mallopt(top_pad, 2**28)
