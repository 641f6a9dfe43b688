"""Agreement between processes: what fails on one of them fails on all."""

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
