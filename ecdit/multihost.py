"""Agreement between processes: what fails on one of them fails on all, and what must be equal is compared."""

import json
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np


def anywhere(problem: str | None) -> str | None:
    """Returns `problem`, or says which other process has one, or None if none has. Collective."""
    if jax.process_count() == 1:
        return problem
    from jax.experimental import multihost_utils

    found = multihost_utils.process_allgather(np.int32(problem is not None)).reshape(-1)
    return problem or (f"process {int(np.argmax(found))} cannot" if found.any() else None)


def wait_for_all(name: str) -> None:
    """Returns when all processes have called it. Collective."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def host_differences(facts: Mapping[str, str]) -> list[str]:
    """Returns a line for every fact that is not the same on all processes, the same lines on all. Collective.

    Args:
      facts: what must be equal, by a name for people; short texts, or hashes.
    """
    if jax.process_count() == 1:
        return []
    return differing(_gathered({"host": socket.gethostname(), "facts": dict(facts)}))


def differing(processes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a line for every fact in which a process differs from most; by process its host and facts."""
    lines = []
    for name in sorted({name for process in processes for name in process["facts"]}):
        values = [process["facts"].get(name, "nothing") for process in processes]
        usual = max(values, key=values.count)  # of equally frequent ones that of the first process
        example = processes[values.index(usual)]["host"]
        lines += [
            f"{name}: process {number} (host {process['host']}) has {value}, most have {usual} (as host {example})"
            for number, (process, value) in enumerate(zip(processes, values, strict=True))
            if value != usual
        ]
    return lines


def _gathered(value: Any) -> list[Any]:
    """Returns a JSON value of every process, in their order. Collective."""
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size)).reshape(-1)
    rows = multihost_utils.process_allgather(np.pad(data, (0, int(sizes.max()) - data.size)))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
