"""Makes processes agree: an error on one fails all of them, and values that must be equal are compared."""

import json
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import jax
import numpy as np

from ecdit.errors import OutageError, UserError
from ecdit.storage import expected_error, is_temporary

T = TypeVar("T")


def anywhere(error: Exception | None) -> Exception | None:
    """Returns `error`; or one that names another process with an error; or None if no process has one. Collective.

    The error that names another process is an OutageError if all errors are outages, otherwise a UserError. So all
    processes end with codes that restart, or one of them with a code that does not.
    """
    if jax.process_count() == 1:
        return error
    from jax.experimental import multihost_utils

    kind = 0 if error is None else 1 if is_temporary(error) else 2
    found = multihost_utils.process_allgather(np.int32(kind)).reshape(-1)
    if error is not None or not found.any():
        return error
    text = f"process {int(np.argmax(found))} cannot"
    return OutageError(text) if found.max() == 1 else UserError(text)


def together(do: Callable[[], T]) -> T:
    """Returns what `do` returns, which every process does. Where it fails on one, it fails on all: collective.

    Raises:
      UserError: it failed here or on another process; here it may be an OSError too.
    """
    result, problem = None, None
    try:
        result = do()
    except Exception as error:
        problem = expected_error(error)
        if problem is None:
            raise
    if problem := anywhere(problem):
        raise problem
    return cast(T, result)


def say(line: str) -> None:
    """Prints a line on the first process."""
    if jax.process_index() == 0:
        print(line, flush=True)


def on_first(do: Callable[[], object]) -> None:
    """Does something on the first process. Where it fails there, it fails on all: collective. Raises as `together`."""
    together(lambda: do() if jax.process_index() == 0 else None)


def from_first(values: np.ndarray) -> np.ndarray:
    """Returns the first process's array, of one shape and dtype everywhere, on all of them. Collective."""
    if jax.process_count() == 1:
        return values
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(values))


def wait_for_all(name: str) -> None:
    """Waits until all processes have called it. Collective."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def host_differences(facts: Mapping[str, str]) -> list[str]:
    """Returns the same lines on all processes: one for each process and fact that differs from most. Collective.

    Args:
      facts: values that must be equal, as short texts or hashes, by a readable name.
    """
    if jax.process_count() == 1:
        return []
    return differing(gathered({"host": socket.gethostname(), "facts": dict(facts)}))


def differing(processes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a line for each fact in which a process differs from most; `processes` have a host and facts."""
    lines = []
    for name in sorted({name for process in processes for name in process["facts"]}):
        values = [process["facts"].get(name, "nothing") for process in processes]
        usual = max(values, key=values.count)  # ties go to the first process
        example = processes[values.index(usual)]["host"]
        lines += [
            f"{name}: process {number} (host {process['host']}) has {value}, most have {usual} (as host {example})"
            for number, (process, value) in enumerate(zip(processes, values, strict=True))
            if value != usual
        ]
    return lines


def gathered(value: Any) -> list[Any]:
    """Returns the JSON values of all processes in order. Collective."""
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size)).reshape(-1)
    rows = multihost_utils.process_allgather(np.pad(data, (0, int(sizes.max()) - data.size)))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
