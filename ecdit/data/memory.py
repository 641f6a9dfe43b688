"""Says how many processes that each hold a network's weights fit the memory of this machine."""

import contextlib
import os
from pathlib import Path

PROCESS_BYTES = 500_000_000  # of a process with JAX, before it has weights
# What a container may take and takes, and the part of that which the kernel takes back when memory is short: of
# cgroups 2 and 1.
_CGROUPS = (
    ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_bytes(root: Path = Path("/")) -> int:
    """Returns the memory that processes can still take, of this machine or of the container if that has less.

    Where the kernel does not say what is free, for example on macOS, it is all that the machine has.
    """
    try:
        free = [1024 * _numbers(root / "proc/meminfo")["MemAvailable:"]]
    except FileNotFoundError:
        free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for folder, limit, used, reclaimed in _CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # there is none, or it is unlimited: "max"
            allowed, taken = (int((root / folder / name).read_text()) for name in (limit, used))
            free.append(max(allowed - taken + _numbers(root / folder / "memory.stat").get(reclaimed, 0), 0))
    return min(free)


def fitting(wanted: int, each: int, free: int) -> tuple[int, str]:
    """Returns how many processes may run, at least one, and a line that says why they are fewer or may not fit.

    Args:
      wanted: the number asked for.
      each: bytes that one takes; 0 if they are too few to matter.
      free: bytes that are free.
    """
    if each == 0 or wanted * each <= free:
        return wanted, ""
    numbers = f"each takes about {each / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free"
    if free < each:
        return 1, f"one process, which may be killed: {numbers}"
    return free // each, f"{free // each} of {wanted} processes: {numbers}"


def _numbers(path: Path) -> dict[str, int]:
    """Returns the numbers in a file of the kernel by the words before them."""
    return {name: int(number) for name, number, *_ in map(str.split, path.read_text().splitlines())}
