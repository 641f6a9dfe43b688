"""Makes sure that what a launcher checked is what runs: its config, the user's files and the sources of ecdit.

A container holds configs and code of its own, and a checkout may have changed since a dry run. So a job carries what
was checked, and the trainer compares that with what it has.
"""

import base64
import binascii
import json
import zlib
from pathlib import Path
from typing import Any

import ecdit
from ecdit.config import flatten, to_dict
from ecdit.errors import UserError
from ecdit.experiment import Experiment
from ecdit.runs.provenance import source_hash


def code_digest() -> str:
    """Returns a hash of ecdit's sources: a version number does not tell two states of a checkout apart."""
    return source_hash(Path(ecdit.__file__).parent)


def describe_checked(experiment: Experiment) -> dict[str, Any]:
    """Returns all that the training of `experiment` follows from, as far as files determine it."""
    return {"config": to_dict(experiment), "files": experiment.user_files(), "code": code_digest()}


def encode_checked(checked: dict[str, Any]) -> str:
    """Returns `describe_checked`'s values as letters and digits, for the flag --checked of `ecdit.train`."""
    return base64.urlsafe_b64encode(zlib.compress(json.dumps(checked, sort_keys=True).encode(), 9)).decode()


def refuse_other(encoded: str, experiment: Experiment) -> None:
    """Raises UserError if `encoded` is of another config, other files or other sources; the message names them."""
    try:
        wanted = json.loads(zlib.decompress(base64.urlsafe_b64decode(encoded)))
    except (binascii.Error, zlib.error, ValueError):
        raise UserError("--checked: is damaged: launch the job again") from None
    here = describe_checked(experiment)
    old, new = flatten(wanted["config"], "config."), flatten(json.loads(json.dumps(here["config"])), "config.")
    differences = [
        f"{key}: checked {old.get(key)!r}, here {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    for path in sorted(wanted["files"].keys() | here["files"].keys()):
        if wanted["files"].get(path) != here["files"].get(path):
            differences.append(f"{path} is another file")
    if wanted["code"] != here["code"]:
        differences.append(f"ecdit: sources {wanted['code'][:12]} were checked, {here['code'][:12]} are here")
    if differences:
        raise UserError(
            "this is not what the launcher checked:\n  "
            + "\n  ".join(differences)
            + "\nBuild the image from the checkout that you launch from, or launch from the one that it was built from."
        )
