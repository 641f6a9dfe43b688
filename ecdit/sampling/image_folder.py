"""A folder of images that a call draws, and another call may go on with: manifest.json, the images, grid.png.

The manifest comes first and says what all images follow from; a call of something else is refused. Images are written
whole or not at all, so one that is there is kept, and a folder that was left in the middle is finished by the same
command. Several processes write into one folder, which all of them must see.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ecdit.errors import UserError
from ecdit.files import replace_text
from ecdit.sampling.grids import save_grid
from ecdit.sampling.layouts import Planned, read_image

MANIFEST = "manifest.json"
GRID_IMAGES = 64  # in grid.png, the first ones
# Of a manifest: what does not decide the images (but for rounding).
_FREE = ("finished", "machines", "set")  # what --set changed stands among the others, with its outcome
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"\x00\x00\x00\x00IEND\xaeB`\x82"


def check_folder(out: Path) -> dict[str, Any] | None:
    """Returns the manifest of an unfinished folder of images, or None if `out` is empty or missing.

    Raises:
      UserError: it holds anything else, which images would be mixed with or written over.
    """
    if not out.exists() or not any(out.iterdir()):
        return None
    try:
        manifest = json.loads((out / MANIFEST).read_text())
        finished = manifest["finished"]
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f"--out={out}: holds other files; take an empty directory") from None
    if finished:
        raise UserError(f"--out={out}: holds finished images; take an empty directory")
    return manifest


def is_done(out: Path, planned: Sequence[Planned], source: Mapping[str, Any]) -> bool:
    """Returns whether `out` has all images of this very call already; arguments are those of `begin_folder`."""
    try:
        found = json.loads((out / MANIFEST).read_text())
        return bool(found["finished"]) and not _differing(found, _manifest(planned, source))
    except (OSError, ValueError, LookupError, TypeError):
        return False


def begin_folder(out: Path, planned: Sequence[Planned], source: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
    """Writes the manifest of images that are still to be drawn, and removes what a killed process was writing.

    Args:
      out: the folder.
      planned: the images.
      source: all else that decides them.
      machine: what they are drawn on, which decides their last bits; kept for each call that drew some.

    Raises:
      UserError: `out` has the beginning of another call's images.
    """
    found, manifest = check_folder(out), _manifest(planned, source)
    machines = []
    if found is not None:
        if differing := _differing(found, manifest):
            what = ", ".join(differing)
            raise UserError(
                f"--out={out}: holds the unfinished images of another call, which differs in {what}; take an empty "
                "directory"
            )
        machines = found.get("machines", [])
    if machine not in machines:
        machines = [*machines, dict(machine)]
    out.mkdir(parents=True, exist_ok=True)
    _write(out, manifest | {"machines": machines, "finished": False})
    for scratch in out.rglob(".*.tmp"):
        scratch.unlink(missing_ok=True)


def is_finished(file: Path) -> bool:
    """Returns whether a file is a PNG from its first to its last bytes; a copy that was cut short is not."""
    try:
        with file.open("rb") as data:
            if data.read(len(_PNG_START)) != _PNG_START:
                return False
            data.seek(-len(_PNG_END), 2)
            return data.read() == _PNG_END
    except OSError:  # it is missing, or too short to seek
        return False


def finish_folder(out: Path, planned: Sequence[Planned]) -> None:
    """Writes grid.png of the first images, and into the manifest that all are there.

    Raises:
      UserError: an image is missing.
    """
    for one in planned:
        if not (out / one.file).exists():
            raise UserError(f"{out / one.file} is missing: all processes must see the same --out={out}")
    first = planned[:GRID_IMAGES]
    save_grid(np.stack([read_image(out / one.file) for one in first]), [one.prompt for one in first], out / "grid.png")
    _write(out, json.loads((out / MANIFEST).read_text()) | {"finished": True})


def _differing(found: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    """Returns the keys in which two manifests are of different images."""
    return [key for key in {**found, **manifest} if key not in _FREE and found.get(key) != manifest.get(key)]


def _manifest(planned: Sequence[Planned], source: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        {"file": one.file, "prompt": one.prompt, "repeat": one.repeat} | ({"name": one.name} if one.name else {})
        for one in planned
    ]
    return json.loads(json.dumps({**source, "images": rows}))


def _write(out: Path, manifest: Mapping[str, Any]) -> None:
    replace_text(out / MANIFEST, json.dumps(manifest, indent=2) + "\n")
