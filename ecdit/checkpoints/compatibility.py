"""Checks that a run may resume from a checkpoint, or start from the weights of another run."""

from collections.abc import Mapping, Set
from typing import Any

from ecdit.checkpoints.read_errors import CheckpointError
from ecdit.checkpoints.restore import Meta
from ecdit.config import flatten


def config_differences(
    saved: Mapping[str, Any], now: Mapping[str, Any], may_change: Set[str], step: int
) -> dict[str, tuple[Any, Any]]:
    """Returns (saved, now) by the keys of the saved config that differ and may not, where a run goes on after `step`.

    Args:
      saved: the config in the checkpoint, nested.
      now: the config of the run that is to go on, nested.
      may_change: dotted keys (see `config.changeable`); phases that begin after `step` may change too.
      step: of the checkpoint.
    """
    old, new = flatten(saved), flatten(now)
    for values in (old, new):
        values["phases"] = [_fixed(phase, may_change) for phase in values.get("phases", []) if phase["after"] < step]
    return {
        key: (old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in may_change
    }


def _fixed(phase: Mapping[str, Any], may_change: Set[str]) -> dict[str, Any]:
    """Returns a phase without the changes of keys that may change on a resume anyway."""
    return {**phase, "changes": {key: value for key, value in phase["changes"].items() if key not in may_change}}


def check_resume(
    saved: Meta,
    now: Mapping[str, Any],
    may_change: Set[str],
    fingerprint: str,
    step: int,
    in_phases: Set[str] = frozenset(),
) -> None:
    """Raises CheckpointError naming every key that differs from the saved run's and may not.

    Args:
      saved: of the checkpoint.
      now: as for `config_differences`, like `may_change` and `step`.
      fingerprint: of the data that the steps before `step` were trained on.
      in_phases: dotted keys that a phase may change; the error has the phase that would.
    """
    differing = config_differences(saved.config, now, may_change, step)
    lines = [f"config.{key}: saved {old!r}, now {new!r}" for key, (old, new) in differing.items()]
    if not lines and saved.dataset != fingerprint:
        lines = [f"prepared data: saved fingerprint {saved.dataset[:12]}, now {fingerprint[:12]}"]
    if not lines:
        return
    changes = {key: differing[key][1] for key in differing if key in in_phases}
    raise CheckpointError(
        "this workdir holds a run that differs in what cannot change on resume:\n  "
        + "\n  ".join(lines)
        + "\nUse another --workdir, or set these back; to start anew from its weights, set checkpoint.init_from."
        + (f"\nA phase can change from here on: {dict(after=step, changes=changes)}" if changes else "")
    )


# Libraries that determine the record of a row of the data; another version may shuffle differently.
ORDERS_DATA = ("grain",)


def check_position(saved: Meta, next_row: int, versions: Mapping[str, str], allow: bool) -> None:
    """Raises CheckpointError if the run would read on elsewhere in the data than where the checkpoint stopped.

    Args:
      saved: of the checkpoint.
      next_row: that the run's config gives for the next step.
      versions: of this process's libraries.
      allow: whether other versions of ORDERS_DATA are accepted.
    """
    if saved.next_row != next_row:
        raise CheckpointError(
            f"the checkpoint goes on with row {saved.next_row} of the data, but by this config it is row {next_row}: "
            "the checkpoint was changed, or this version counts rows in another way"
        )
    other = [name for name in ORDERS_DATA if saved.versions.get(name) != versions.get(name)]
    if other and not allow:
        changed = ", ".join(f"{name} {saved.versions.get(name)}, now {versions.get(name)}" for name in other)
        raise CheckpointError(
            f"the checkpoint was written with {changed}: the data may come in another order, so that the run could see "
            "some of it twice and some never. Install that version, or accept it with --accept_data_order."
        )


def changed_code(saved: Meta, versions: Mapping[str, str], code: Mapping[str, str]) -> str:
    """Returns one line that names the versions and the code that differ from the checkpoint's; "" if none do."""
    parts = [
        f"{name} {saved.versions.get(name, 'unknown')} -> {versions.get(name, 'none')}"
        for name in sorted(saved.versions.keys() | versions.keys())
        if saved.versions.get(name) != versions.get(name)
    ]
    if saved.code["sources"] != code["sources"]:
        before, now = (f"{one['sources'][:12]} ({_commit(one)})" for one in (saved.code, code))
        parts.append(f"ecdit's sources {before} -> {now}")
    return f"the checkpoint was written by other code: {', '.join(parts)}" if parts else ""


def check_same_model(saved: Meta, now: Mapping[str, Any], may_differ: Set[str], vocabulary: str, allow: bool) -> str:
    """Compares the run that weights are taken from with the one that starts from them: model, text and vocabulary.

    Args:
      saved: of the checkpoint.
      now: the config of the run that starts, nested, with the hashes of the user's files.
      may_differ: dotted keys that may.
      vocabulary: the hash of the vocabulary of this run's data.
      allow: whether differences are accepted.

    Returns what differs, if it is accepted.

    Raises:
      CheckpointError: something differs, and `allow` is False.
    """
    old, new = (_model_keys(config) for config in (saved.config, now))
    lines = [
        f"config.{key}: there {old.get(key)!r}, here {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in may_differ
    ]
    if saved.vocabulary != vocabulary:
        lines.append(f"vocabulary: there {saved.vocabulary[:12]}, here {vocabulary[:12]}")
    if lines and not allow:
        raise CheckpointError(
            "checkpoint.init_from names a run whose weights mean something else:\n  "
            + "\n  ".join(lines)
            + "\nSet these as there, or accept the differences with --accept_init_differences."
        )
    return "; ".join(lines)


def _model_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of a config that gives weights their meaning, flat: of files the denoiser's, not the data's."""
    groups = {key: config.get(key) for key in ("denoiser", "model", "text", "autoencoder")}
    denoiser = str(config.get("denoiser")).rpartition(":")[0]
    files = {path: digest for path, digest in (config.get("files") or {}).items() if path == denoiser}
    return flatten(groups | {"files": files, "weights": config.get("weights") or {}})


def _commit(code: Mapping[str, str]) -> str:
    return (
        f"commit {code['commit'][:12]}{', changed' if code['dirty'] == 'yes' else ''}" if code["commit"] else "no git"
    )
