"""Describes and reads the checkpoints of a run: `<workdir>/checkpoints/<step>/{state,meta}`, by Orbax.

`state` holds the arrays of a TrainState; `meta` is JSON: resolved config, data position, dataset fingerprint, versions,
code, and a checksum of every array. `async_save` writes them; `resume` deals with damaged ones.
Three verbs that never mix: resume (the same run goes on), start from another run's weights (`restore_ema` into a new
run), export (see interop.weights).
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from ecdit.checkpoints.arrays import check_sums, flat_arrays, read_json, read_records, restore_arrays
from ecdit.checkpoints.checksums import checksums
from ecdit.checkpoints.config import CheckpointConfig
from ecdit.checkpoints.read_errors import CheckpointError
from ecdit.files import is_remote
from ecdit.storage import as_path, reading
from ecdit.system import Params, System
from ecdit.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Meta:
    """The JSON that a checkpoint holds beside its arrays."""

    format: int
    config: dict[str, Any]  # the resolved Experiment, from config.to_dict
    next_row: int  # first global row of the data that the next step reads
    dataset: str  # fingerprint of the prepared data
    versions: dict[str, str]  # versions of the libraries that wrote it
    arrays: dict[str, list[str]]  # type, shape and checksum of each array (see arrays.ArrayRecords)
    vocabulary: str  # hash of the vocabulary of captions
    code: dict[str, str]  # the code that wrote it (see runs.provenance.code_state)
    config_hash: str


def open_manager(workdir: Path, config: CheckpointConfig | None, **options: Any) -> ocp.CheckpointManager:
    """Opens the manager of a run's checkpoints; without a config it only reads. `options` are further ones of Orbax."""
    if config is None:
        options = {"create": False}  # read_only=True does the same with three warnings
    else:
        options["preservation_policy"] = _kept(config)
        options["cleanup_tmp_directories"] = True  # removes those of killed saves
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(
        checkpoint_directory(workdir), options=ocp.CheckpointManagerOptions(**options), item_handlers=handlers
    )


def _kept(config: CheckpointConfig) -> ocp.checkpoint_managers.PreservationPolicy:
    """Returns which checkpoints stay when a new one is saved."""
    newest = ocp.checkpoint_managers.LatestN(config.keep)
    if not config.keep_every:
        return newest
    milestones = ocp.checkpoint_managers.EveryNSteps(config.keep_every)
    return ocp.checkpoint_managers.AnyPreservationPolicy([newest, milestones])


def checkpoint_directory(workdir: Path) -> Path:
    """Returns where a run keeps its checkpoints."""
    return (workdir if is_remote(workdir) else workdir.absolute()) / "checkpoints"


def open_reader(workdir: Path) -> ocp.CheckpointManager:
    """Opens a manager that only reads.

    Raises:
      CheckpointError: the run has no checkpoint.
      UserError: the bucket refuses or is away.
    """
    with reading(workdir):
        if not checkpoint_directory(workdir).exists():
            raise CheckpointError(f"{workdir}: no run's workdir, it has no {checkpoint_directory(workdir).name}/")
        manager = open_manager(workdir, None)
    if manager.latest_step() is None:
        raise CheckpointError(f"{workdir}: the run has no finished checkpoint yet")
    return manager


def find_step(manager: ocp.CheckpointManager, workdir: Path, step: int | None) -> int:
    """Returns `step`, or the newest for None; raises CheckpointError if there is no checkpoint of it."""
    steps = sorted(manager.all_steps())
    if step is None:
        return steps[-1]
    if step not in steps:
        raise CheckpointError(f"{workdir}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    return step


def step_directory(manager: ocp.CheckpointManager, step: int) -> Path:
    """Returns where the checkpoint of `step` is."""
    return as_path(str(manager.directory)) / str(step)


def read_meta(manager: ocp.CheckpointManager, step: int) -> Meta:
    """Reads the JSON of a checkpoint.

    Raises:
      DamagedError: it is not what was saved.
      CheckpointError: written in another format.
    """
    return Meta(**read_json(step_directory(manager, step)))


def restore_unverified(manager: ocp.CheckpointManager, step: int, meta: Meta, abstract: TrainState) -> TrainState:
    """Reads a checkpoint's state but for `loaded`, with the shapes, dtypes and shardings of `abstract`.

    Raises as `restore`.
    """
    return TrainState(**restore_arrays(step_directory(manager, step), meta.arrays, state_parts(abstract)))


def restore(manager: ocp.CheckpointManager, step: int, abstract: TrainState) -> TrainState:
    """Reads a checkpoint's state but for `loaded`, as `abstract` describes it, and compares its checksums.

    Raises:
      DamagedError: an array cannot be read, or is not what was saved.
      CheckpointError: an array is missing, or has another shape or dtype.
    """
    meta = read_meta(manager, step)
    state = restore_unverified(manager, step, meta, abstract)
    check_sums(step_directory(manager, step), meta.arrays, checksums(state_arrays(state)))
    return state


def restore_ema(
    workdir: Path, system: System, mesh: Mesh, step: int | None = None, part: Literal["ema", "params"] = "ema"
) -> tuple[Params, int]:
    """Reads the EMA weights and the frozen ones of a run's checkpoint; returns them, sharded over `mesh`, and its step.

    Those of folders of public weights are not among them: see `System.load`. It reads and verifies nothing else.
    `step` is by default the newest. `part` "params" reads the weights that the optimizer changes in place of their EMA.

    Raises:
      CheckpointError: no such checkpoint, a damaged one, or one of another model.
    """
    with open_reader(workdir) as manager:
        step = find_step(manager, workdir, step)
        directory = step_directory(manager, step)
    records = read_records(directory)
    abstract, shardings = (system.drawn(tree) for tree in (system.shapes(), system.shardings(mesh)))
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    # That run may have frozen other parameters than this one.
    frozen = {name.split("/")[1] for name in records if name.startswith("frozen/")}
    target = {part: {n: p for n, p in params.items() if n not in frozen}}
    target |= {"frozen": {n: p for n, p in params.items() if n in frozen}} if frozen else {}
    values = restore_arrays(directory, records, target)
    check_sums(directory, records, checksums(flat_arrays(values)))
    return {**values[part], **values.get("frozen", {})}, step


def state_parts(state: TrainState) -> dict[str, Any]:
    """Returns the parts of a state by name, as they are saved: all but what is read from folders of public weights."""
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if field.name != "loaded"}


def state_arrays(state: TrainState) -> dict[str, jax.Array]:
    """Returns the arrays of a state by their names in a checkpoint."""
    return flat_arrays(state_parts(state))
