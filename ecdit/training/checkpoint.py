"""Checkpoints of a run: `<workdir>/checkpoints/<step>/{state,meta}`, by Orbax, asynchronous.

`state` holds the arrays of a TrainState; `meta` is JSON: resolved config, data position and dataset fingerprint.
Three verbs that never mix: resume (the same run goes on), start from another run's weights (`restore_ema` into a new
run), export (see interop.weights).
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from ecdit.conditioning.text_to_image import Params, System
from ecdit.config import UserError, flatten, to_dict
from ecdit.training.experiment import CheckpointConfig, Experiment
from ecdit.training.state import TrainState

FORMAT = 2

# Keys, or groups of keys, that a resumed run may change: they alter how it runs, not what it computes.
MAY_CHANGE = (
    "train.num_steps",
    "train.log_every",
    "train.max_bad_steps",
    "train.pictures_every",
    "train.profile_start",
    "train.profile_steps",
    "train.wandb_project",
    "train.accumulation",
    "model.remat",
    "model.scan_unroll",
    "model.dispatch",
    "data.directory",
    "data.source",
    "data.num_threads",
    "data.prefetch",
    "checkpoint.",
    "mesh.",
    "sampling.",
    "runtime.",
)


class CheckpointError(UserError):
    """A checkpoint that is missing, does not fit, or could not be written."""


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a checkpoint holds beside its arrays."""

    format: int
    config: dict[str, Any]  # the resolved Experiment, as config.to_dict gives it
    next_row: int  # global row of the data that the next step reads first
    dataset: str  # fingerprint of the prepared data
    versions: dict[str, str]  # of the libraries that wrote it


def open_manager(workdir: Path, config: CheckpointConfig | None) -> ocp.CheckpointManager:
    """The manager of a run's checkpoints; None for one that only reads."""
    if config is None:
        options = ocp.CheckpointManagerOptions(create=False)  # read_only=True says the same with three warnings
    else:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(config.keep),
            cleanup_tmp_directories=True,  # what a killed save left
        )
    # A save that fails is raised once, by check_saves; asyncio would print it again for each of its arrays.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(checkpoint_directory(workdir), options=options, item_handlers=handlers)


def checkpoint_directory(workdir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return workdir.absolute() / "checkpoints"


def save(manager: ocp.CheckpointManager, state: TrainState, step: int, meta: Meta) -> None:
    """Starts saving `state`; returns when its arrays are copied off the devices.

    Raises:
      CheckpointError: this or an earlier save failed.
    """
    items = ocp.args.Composite(state=ocp.args.PyTreeSave(_as_dict(state)), meta=ocp.args.JsonSave(to_dict(meta)))
    try:
        manager.save(step, args=items, force=True)
    except Exception as error:
        raise _save_failed(manager, error) from error


def check_saves(manager: ocp.CheckpointManager) -> None:
    """Raises CheckpointError if a save that has ended since the last call failed."""
    try:
        manager.check_for_errors()
    except Exception as error:
        raise _save_failed(manager, error) from error


def finish_saves(manager: ocp.CheckpointManager) -> None:
    """Waits for running saves; raises CheckpointError if one failed."""
    try:
        manager.wait_until_finished()
    except Exception as error:
        raise _save_failed(manager, error) from error
    check_saves(manager)


def read_meta(manager: ocp.CheckpointManager, step: int) -> Meta:
    """The JSON of a checkpoint.

    Raises:
      CheckpointError: damaged, or written in another format.
    """
    with _readable(manager, step):
        values = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
    if values.get("format") != FORMAT:
        raise CheckpointError(f"{manager.directory}/{step}: format {values.get('format')}, this version reads {FORMAT}")
    return Meta(**values)


def restore(manager: ocp.CheckpointManager, step: int, abstract: TrainState) -> TrainState:
    """The state of a checkpoint, with the shapes, dtypes and shardings of `abstract`.

    Raises:
      CheckpointError: an array is missing, or has another shape or dtype.
    """
    return TrainState(**_restore_arrays(manager, step, _as_dict(abstract)))


def restore_ema(workdir: Path, system: System, mesh: Mesh, step: int | None = None) -> tuple[Params, int]:
    """The EMA weights of a run's checkpoint of `step`, by default the newest, sharded over `mesh`, and its step.

    With what the run has frozen; it reads nothing else.

    Raises:
      CheckpointError: no such checkpoint, or one of another model.
    """
    with open_reader(workdir) as manager:
        step = manager.latest_step() if step is None else step
        if step not in manager.all_steps():
            kept = ", ".join(map(str, sorted(manager.all_steps())))
            raise CheckpointError(f"{workdir}: no checkpoint of step {step}; there are {kept}")
        abstract = system.shapes()
        shardings = system.shardings(mesh)
        params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
        trained, frozen = _saved_split(manager, step, params)
        restored = _restore_arrays(manager, step, {"ema": trained} | ({"frozen": frozen} if frozen else {}))
        return {**restored["ema"], **restored.get("frozen", {})}, step


def open_reader(workdir: Path) -> ocp.CheckpointManager:
    """A manager that only reads.

    Raises:
      CheckpointError: the run has no checkpoint.
    """
    if not checkpoint_directory(workdir).is_dir():
        raise CheckpointError(f"{workdir}: no run's workdir, it has no {checkpoint_directory(workdir).name}/")
    manager = open_manager(workdir, None)
    if manager.latest_step() is None:
        raise CheckpointError(f"{workdir}: the run has no finished checkpoint yet")
    return manager


def check_resume(saved: Meta, experiment: Experiment, fingerprint: str, step: int) -> None:
    """Raises CheckpointError naming every key that differs from the saved run's and may not (see MAY_CHANGE).

    Phases may change that begin after `step`, the saved one; `fingerprint` is of the data that it was trained on.
    """
    old, new = flatten(saved.config), flatten(to_dict(experiment))
    for values in (old, new):
        values["phases"] = [phase for phase in values.get("phases", []) if phase["after"] < step]
    differences = [
        f"config.{key}: saved {old.get(key)!r}, now {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _may_change(key)
    ]
    if not differences and saved.dataset != fingerprint:
        differences = [f"prepared data: saved fingerprint {saved.dataset[:12]}, now {fingerprint[:12]}"]
    if differences:
        raise CheckpointError(
            "this workdir holds a run that differs in what cannot change on resume:\n  "
            + "\n  ".join(differences)
            + "\nUse another --workdir, or set these back; to start anew from its weights, set checkpoint.init_from."
        )


def _may_change(key: str) -> bool:
    return any(key == allowed or (allowed.endswith(".") and key.startswith(allowed)) for allowed in MAY_CHANGE)


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _restore_arrays(manager: ocp.CheckpointManager, step: int, target: dict[str, Any]) -> dict[str, Any]:
    """The arrays that `target` has, of which the checkpoint may hold more."""
    with _readable(manager, step):
        _check_arrays(manager, step, target)
        arguments = ocp.checkpoint_utils.construct_restore_args(target)
        item = ocp.args.PyTreeRestore(item=target, restore_args=arguments, partial_restore=True)
        return manager.restore(step, args=ocp.args.Composite(state=item)).state


@contextlib.contextmanager
def _readable(manager: ocp.CheckpointManager, step: int) -> Iterator[None]:
    """Whatever a damaged checkpoint makes the libraries raise, as a CheckpointError that names it."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{manager.directory}/{step} cannot be read: {_first_line(error)}") from error


def _saved_split(manager: ocp.CheckpointManager, step: int, params: Params) -> tuple[Params, Params]:
    """`params` as that run trained or froze them, which may not be how this one does."""
    with _readable(manager, step):
        frozen = manager.item_metadata(step).state.tree.get("frozen") or {}
    return {n: p for n, p in params.items() if n not in frozen}, {n: p for n, p in params.items() if n in frozen}


def _check_arrays(manager: ocp.CheckpointManager, step: int, target: Mapping[str, Any]) -> None:
    """Orbax casts a dtype that differs in silence, so compare before restoring."""
    saved = _arrays(manager.item_metadata(step).state.tree)
    for name, wanted in _arrays(ocp.tree.serialize_tree(target, keep_empty_nodes=True)).items():
        if name not in saved:
            raise CheckpointError(f"{manager.directory}/{step}: has no array {name}")
        found = saved[name]
        if tuple(found.shape) != tuple(wanted.shape) or np.dtype(found.dtype) != np.dtype(wanted.dtype):
            raise CheckpointError(
                f"{manager.directory}/{step}: {name} is {np.dtype(found.dtype)}{list(found.shape)}, "
                f"this run needs {np.dtype(wanted.dtype)}{list(wanted.shape)}"
            )


def _arrays(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))[0]
    return {
        "/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path): x
        for path, x in leaves
        if hasattr(x, "shape")
    }


def _save_failed(manager: ocp.CheckpointManager, error: Exception) -> CheckpointError:
    time.sleep(2)  # Orbax gives up at the first array; the others' writes still fail, and print that, after it
    failed = f"saving to {manager.directory} failed: {_first_line(error)}"
    return CheckpointError(f"{failed}. Earlier checkpoints are untouched.")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
