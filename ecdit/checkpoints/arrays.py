"""Reads a checkpoint's directory, `state` and `meta`, and detects that it differs from what was saved.

`meta` holds a digest of itself, and type, shape and checksum of every array of `state`. So a checkpoint of another
model (the user's mistake) can be told from a damaged one.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ecdit.checkpoints.checksums import checksums
from ecdit.checkpoints.read_errors import CheckpointError, DamagedError, read

FORMAT = 5  # format of checkpoints; others are refused

NAMED = 5  # damaged arrays that a message names

# By flat name: [type and shape, checksum], as ["float32[3, 4]", "00c0ffee00c0ffee"].
ArrayRecords = Mapping[str, list[str]]


def array_records(arrays: Mapping[str, jax.Array]) -> dict[str, list[str]]:
    """Returns type, shape and checksum of every array; waits for their computation."""
    return {name: [described(arrays[name]), checksum] for name, checksum in checksums(arrays).items()}


def described(x: Any) -> str:
    """Returns type and shape of an array as text, such as float32[3, 4]."""
    return f"{np.dtype(x.dtype)}{list(x.shape)}"


def meta_json(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of a Meta, as JSON has them, together with their digest."""
    return values | {"digest": _digest(values)}


def read_json(directory: Path) -> dict[str, Any]:
    """Returns the values of a checkpoint's `meta`.

    Raises:
      DamagedError: it is not what was saved.
      UnreadableError: it cannot be read now.
      CheckpointError: it was written in another format.
    """

    def values() -> dict[str, Any]:
        values = json.loads((directory / "meta" / "metadata").read_text())
        digest = values.pop("digest", None)
        if values["format"] != FORMAT and digest in (None, _digest(values)):  # the first checkpoints had no digest
            raise CheckpointError(f"{directory}: format {values['format']}, this version reads {FORMAT}")
        if digest != _digest(values):
            raise DamagedError(f"{directory} is damaged: its meta differs from what was saved")
        return values

    return read(directory, values)


def read_records(directory: Path) -> ArrayRecords:
    """Returns what is recorded of a checkpoint's arrays. Raises as `read_json`."""
    return read_json(directory)["arrays"]


def stored_arrays(directory: Path) -> dict[str, str]:
    """Returns type and shape of every array by its flat name, as Orbax wrote them. Raises as `stored_tree`."""
    tree = stored_tree(directory)
    return read(directory, lambda: {name: described(x) for name, x in flat_arrays(tree, serialized=True).items()})


def stored_tree(directory: Path) -> Any:
    """Returns the tree of a checkpoint's arrays without their data, as Orbax wrote it.

    Raises:
      DamagedError: it is not what was saved.
      UnreadableError: it cannot be read now.
    """
    return read(directory, lambda: ocp.PyTreeCheckpointHandler().metadata(_state(directory)).tree)


def restore_arrays(directory: Path, records: ArrayRecords, target: dict[str, Any]) -> dict[str, Any]:
    """Reads the arrays that a tree of ShapeDtypeStructs with shardings describes; does not verify them.

    The checkpoint may hold more arrays.

    Raises:
      DamagedError: an array cannot be decoded.
      UnreadableError: an array cannot be read now.
      CheckpointError: an array is missing, or has another type or shape.
    """
    wanted, stored = {name: described(x) for name, x in flat_arrays(target).items()}, stored_arrays(directory)
    for name, text in wanted.items():
        if name not in records:
            raise CheckpointError(f"{directory}: has no array {name}")
        if records[name][0] != text:
            raise CheckpointError(f"{directory}: {name} is {records[name][0]}, this run needs {text}")
        if stored.get(name) != text:  # Orbax would cast silently
            raise DamagedError(f"{directory} is damaged: {name}, saved as {text}, is now {stored.get(name, 'missing')}")

    def arrays() -> dict[str, Any]:
        # Uses the handler, because a manager would wait for all processes at the end, even if one could not read.
        arguments = ocp.checkpoint_utils.construct_restore_args(target)
        item = ocp.args.PyTreeRestore(item=target, restore_args=arguments, partial_restore=True)
        return ocp.PyTreeCheckpointHandler().restore(_state(directory), args=item)

    return read(directory, arrays)


def restore_array(directory: Path, tree: Any, name: str, sharding: jax.sharding.Sharding) -> jax.Array:
    """Reads one array of `stored_tree` by its flat name. Raises as `stored_tree`."""

    def only(value: Callable[[Any], Any], other: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: value(x) if _name(path) == name else other, tree, is_leaf=_is_array
        )

    def array() -> jax.Array:
        item = only(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), ocp.PLACEHOLDER)
        arguments = only(lambda _: ocp.ArrayRestoreArgs(sharding=sharding), ocp.RestoreArgs())
        target = ocp.args.PyTreeRestore(item=item, restore_args=arguments)
        return flat_arrays(ocp.PyTreeCheckpointHandler().restore(_state(directory), args=target), serialized=True)[name]

    return read(directory, array)


def check_sums(directory: Path, records: ArrayRecords, sums: Mapping[str, str]) -> None:
    """Raises DamagedError, which names the arrays whose checksum differs from the recorded one."""
    wrong = [name for name, found in sums.items() if records[name][1] != found]
    if wrong:
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise DamagedError(f"{directory} is damaged: {', '.join(wrong[:NAMED])}{more}: not what was saved")


def flat_arrays(tree: Any, serialized: bool = False) -> dict[str, Any]:
    """Returns the arrays of a tree by their names in a checkpoint, such as params/denoiser/head/kernel."""
    tree = tree if serialized else ocp.tree.serialize_tree(tree, keep_empty_nodes=True)
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_array)[0]
    return {_name(path): x for path, x in leaves if _is_array(x)}


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape")


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _state(directory: Path) -> epath.Path:
    return epath.Path(directory / "state")
