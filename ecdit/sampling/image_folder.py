"""A folder of images that a call draws, and another call may go on with: manifest.json, the images, grid.png.

The manifest comes first and says what all images follow from; a call of something else is refused. Images are written
whole or not at all, so one that is there is kept, and a folder that was left in the middle is finished by the same
command. In a finished folder the same command draws only images that are damaged or gone. Several processes of one call
write into one folder, which all of them must see.
"""

import contextlib
import fcntl
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ecdit.config import flatten
from ecdit.errors import UserError
from ecdit.files import in_threads, replace_text
from ecdit.sampling.grids import save_grid
from ecdit.sampling.layouts import Planned, read_alike
from ecdit.sampling.prompts import shortened

MANIFEST = "manifest.json"
GRID_IMAGES = 64  # in grid.png, the first ones
_SHORT = 60  # characters of two values that a message shows
# Of a manifest: what does not decide the images (but for rounding). What --set changed stands among the others, with
# its outcome; a run may have moved, the checkpoint's hash says which one it is.
NOT_COMPARED = ("set", "workdir", "folder")
_FREE = ("finished", "machines", *NOT_COMPARED)
_PNG_START = b"\x89PNG\r\n\x1a\n"


def check_folder(out: Path) -> dict[str, Any] | None:
    """Returns the manifest of a folder of images, or None if `out` is empty or missing.

    Raises:
      UserError: it holds anything else, which images would be mixed with or written over.
    """
    if not out.exists() or all(_is_begun_manifest(path) for path in out.iterdir()):
        return None
    try:
        manifest = json.loads((out / MANIFEST).read_text())
    except (OSError, ValueError):
        manifest = None
    if not isinstance(manifest, dict) or "finished" not in manifest:
        raise UserError(f"--out={out}: holds other files; take an empty directory")
    return manifest


@contextlib.contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Keeps other calls out of a folder, where the file system can lock a directory. The lock ends with the process.

    Raises:
      UserError: another call is drawing into it.
    """
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out={out}: another process is drawing into it; wait for it") from None
        except OSError:  # network file systems may have no such locks
            pass
        yield
    finally:
        os.close(descriptor)


def check_empty(out: Path) -> None:
    """Raises UserError if a directory holds anything."""
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out={out}: holds other files; take an empty directory")


@contextlib.contextmanager
def alone_in_empty(out: Path) -> Iterator[None]:
    """Makes a directory, and keeps other calls out of it, as `alone_in`.

    Raises:
      UserError: another call is writing into it, or has done so since it was looked at last.
    """
    out.mkdir(parents=True, exist_ok=True)
    with alone_in(out):
        check_empty(out)
        yield


def begin_folder(out: Path, planned: Sequence[Planned], source: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
    """Writes the manifest of images that are still to be drawn, and removes what a killed process was writing.

    Args:
      out: the folder.
      planned: the images.
      source: all else that decides them.
      machine: what they are drawn on, which decides their last bits; kept for each call that drew some.

    Raises:
      UserError: `out` has images of another call.
    """
    found, manifest = check_folder(out), _manifest(planned, source)
    machines = []
    if found is not None:
        if differing := _differing(found, manifest):
            state, what = "finished" if found["finished"] else "unfinished", ", ".join(differing)
            raise UserError(
                f"--out={out}: holds the {state} images of another call, which differs in {what}; take an empty "
                "directory"
            )
        if found["finished"] and all(in_threads(is_finished, [out / one.file for one in planned])):
            return  # nothing will be drawn, here or on this machine
        machines = found.get("machines", [])
    if machine not in machines:
        machines = [*machines, dict(machine)]
    out.mkdir(parents=True, exist_ok=True)
    _write(out, manifest | {"machines": machines, "finished": False})
    for scratch in out.rglob(".*.tmp"):
        scratch.unlink(missing_ok=True)


def is_finished(file: Path) -> bool:
    """Returns whether a file is a whole PNG, by the checksums of its parts; a copy that was cut or damaged is not."""
    try:
        data = file.read_bytes()
    except OSError:  # it is missing
        return False
    if not data.startswith(_PNG_START):
        return False
    start, end = len(_PNG_START), 0
    while start + 12 <= len(data):  # of a chunk: length of the data, name, data, checksum of both
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if zlib.crc32(data[start + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            return False
        if data[start + 4 : start + 8] == b"IEND":
            return end == len(data)
        start = end
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
    save_grid(read_alike([out / one.file for one in first]), [one.prompt for one in first], out / "grid.png")
    _write(out, json.loads((out / MANIFEST).read_text()) | {"finished": True})


def _is_begun_manifest(path: Path) -> bool:
    """Returns whether a file is a manifest that `replace_text` was writing when its process was killed."""
    return path.name.startswith(f".{MANIFEST}.") and path.name.endswith(".tmp")


def _differing(found: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    """Returns the keys in which two manifests are of different images, with both values where they are short."""
    there, here = (flatten({key: value for key, value in one.items() if key not in _FREE}) for one in (found, manifest))
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    values = {key: f"{there.get(key)!r} there, {here.get(key)!r} here" for key in keys}
    values["images"] = _first_difference(there.get("images"), here["images"])
    return [f"{key} ({values[key]})" if key == "images" or len(values[key]) <= _SHORT else key for key in keys]


def _first_difference(there: Any, here: Sequence[Mapping[str, Any]]) -> str:
    """Returns how two manifests' lists of images differ: in number, or else in the first image that does."""
    if not isinstance(there, list) or len(there) != len(here):
        return f"{len(there) if isinstance(there, list) else there!r} there, {len(here)} here"
    for one, other in zip(there, here, strict=True):
        if one != other:
            prompts = [shortened(str(row.get("prompt"))) for row in (one, other)]
            repeats = [f", repeat {row.get('repeat')}" if prompts[0] == prompts[1] else "" for row in (one, other)]
            return f"{other['file']}: {prompts[0]}{repeats[0]} there, {prompts[1]}{repeats[1]} here"
    return ""


def _manifest(planned: Sequence[Planned], source: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        {"file": one.file, "prompt": one.prompt, "repeat": one.repeat} | ({"name": one.name} if one.name else {})
        for one in planned
    ]
    return json.loads(json.dumps({**source, "images": rows}))


def _write(out: Path, manifest: Mapping[str, Any]) -> None:
    replace_text(out / MANIFEST, json.dumps(manifest, indent=2) + "\n")
