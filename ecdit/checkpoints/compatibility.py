"""Whether a run may go on from a checkpoint: what of its config must be as it was saved, and what may change."""

from collections.abc import Mapping
from typing import Any

from ecdit.checkpoints.arrays import CheckpointError
from ecdit.checkpoints.restore import Meta
from ecdit.config import flatten, to_dict
from ecdit.experiment import Experiment

# Keys, or groups of keys, that a resumed run may change: they alter how it runs, not what it computes.
MAY_CHANGE = (
    "train.num_steps",
    "train.log_every",
    "train.max_bad_steps",
    "train.watchdog_seconds",
    "train.pictures_every",
    "train.profile_start",
    "train.profile_steps",
    "train.wandb_project",
    "train.accumulation",
    "model.attention",
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


def config_differences(saved: Mapping[str, Any], experiment: Experiment, step: int) -> list[str]:
    """A line for every key of the saved config that differs and may not, where a run goes on after `step`."""
    old, new = flatten(saved), flatten(to_dict(experiment))
    for values in (old, new):
        values["phases"] = [phase for phase in values.get("phases", []) if phase["after"] < step]
    return [
        f"config.{key}: saved {old.get(key)!r}, now {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _may_change(key)
    ]


def check_resume(saved: Meta, experiment: Experiment, fingerprint: str, step: int) -> None:
    """Raises CheckpointError naming every key that differs from the saved run's and may not (see MAY_CHANGE).

    Phases may change that begin after `step`, the saved one; `fingerprint` is of the data that it was trained on.
    """
    differences = config_differences(saved.config, experiment, step)
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
