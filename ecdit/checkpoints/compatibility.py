"""Whether a run may go on from a checkpoint: what of its config must be as it was saved, and what may change."""

from collections.abc import Mapping, Set
from typing import Any

from ecdit.checkpoints.arrays import CheckpointError
from ecdit.checkpoints.restore import Meta
from ecdit.config import flatten


def config_differences(saved: Mapping[str, Any], now: Mapping[str, Any], may_change: Set[str], step: int) -> list[str]:
    """Returns a line for every key of the saved config that differs and may not, where a run goes on after `step`.

    Args:
      saved: the config in the checkpoint, nested.
      now: the config of the run that is to go on, nested.
      may_change: dotted keys (see `config.changeable`); phases that begin after `step` may change too.
      step: of the checkpoint.
    """
    old, new = flatten(saved), flatten(now)
    for values in (old, new):
        values["phases"] = [phase for phase in values.get("phases", []) if phase["after"] < step]
    return [
        f"config.{key}: saved {old.get(key)!r}, now {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in may_change
    ]


def check_resume(saved: Meta, now: Mapping[str, Any], may_change: Set[str], fingerprint: str, step: int) -> None:
    """Raises CheckpointError naming every key that differs from the saved run's and may not.

    `fingerprint` is of the data that the steps before `step` were trained on; the other arguments are those of
    `config_differences`.
    """
    differences = config_differences(saved.config, now, may_change, step)
    if not differences and saved.dataset != fingerprint:
        differences = [f"prepared data: saved fingerprint {saved.dataset[:12]}, now {fingerprint[:12]}"]
    if differences:
        raise CheckpointError(
            "this workdir holds a run that differs in what cannot change on resume:\n  "
            + "\n  ".join(differences)
            + "\nUse another --workdir, or set these back; to start anew from its weights, set checkpoint.init_from."
        )
