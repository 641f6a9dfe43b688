"""Workdirs in a bucket of Google Cloud Storage: what has to be done otherwise than on a disk.

A path on a disk is pathlib's; gs://BUCKET/PATH is one of etils.epath, which goes through gcsfs. Most of what the code
does with a path works with both, so signatures say Path for either. In a bucket there are no directories to make, and
an object is written whole or not at all; but nothing can be appended to one, and what is renamed is copied.
"""

import contextlib
import datetime
import importlib.util
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from ecdit.errors import UserError
from ecdit.files import is_remote

# Else epath takes TensorFlow's file system where TensorFlow is installed: seconds to import, and it knows no emulator.
os.environ.setdefault("EPATH_USE_TF", "false")

PART_SECONDS = 60.0  # a part is written when it is so old, or at a save
_CLIENTS = ("aiohttp", "gcsfs", "google", "requests")  # packages whose errors are those of the way
COMMITTED = "commit_success.txt"  # Orbax's mark, in a bucket, of a checkpoint that was saved to its end


def as_path(text: str, name: str = "--workdir") -> Path:
    """`text` as a path; `name` is what a message calls it.

    Raises:
      UserError: it has another scheme than gs://, names no path in the bucket, or needs a package that is missing.
    """
    if "://" not in text:
        return Path(text)
    if not re.fullmatch(r"gs://[^/]+/+[^/].*", text):
        raise UserError(f"{name}={text}: must be a directory, or gs://BUCKET/PATH")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{name}={text}: needs the package gcsfs: pip install -e '.[gcs]'")
    import fsspec

    # Its cache of listings knows nothing of what tensorstore or another process writes.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(text)


def check_workdir(workdir: Path) -> None:
    """Raises UserError, before work is done for nothing, where this process has not all rights to a bucket's workdir.

    Without that of listing, its checkpoints would not be seen, and the run would begin anew.
    """
    if not is_remote(workdir):
        return
    probe = workdir / f"write_check_{secrets.token_hex(4)}"
    try:
        probe.write_bytes(b"to be deleted")  # an empty one would be read without asking the bucket
        list(workdir.iterdir())
        _bucket().cat_file(str(probe))
        probe.unlink()
    except Exception as error:
        raise UserError(f"--workdir={workdir}: cannot be read, listed and written: {_said(error)}") from error


def write_time(workdir: Path) -> float:
    """The Unix time that a bucket gives an object written now, which is deleted again."""
    probe = workdir / f"clock_check_{secrets.token_hex(4)}"
    with reading(workdir):
        probe.write_bytes(b"to be deleted")
        changed = _bucket().info(str(probe))["mtime"]
        probe.unlink()
    return changed.timestamp()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Makes an error of the way to a bucket a UserError that names `path`."""
    try:
        yield
    except Exception as error:
        if not is_outage(error):
            raise
        raise UserError(f"{path} cannot be read: {_said(error)}") from error


def is_outage(error: BaseException) -> bool:
    """Whether an error is of the way to a bucket (network, permissions), and not of what is stored there."""
    package = type(error).__module__.partition(".")[0]
    refused = type(error) is OSError and error.errno is None  # gcsfs's for 401 and 403; those of disks have a number
    if refused or isinstance(error, ConnectionError | TimeoutError) or package in _CLIENTS:
        return True
    behind = error.__cause__ or error.__context__
    return behind is not None and is_outage(behind)


def make_directory(path: Path) -> None:
    """Makes a directory and those above it, where they are missing; in a bucket there is nothing to make."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def children(directory: Path) -> list[Path]:
    """What is in a directory, nothing if it is missing: is_dir says that too of what a bucket does not let one read."""
    try:
        return list(directory.iterdir())
    except FileNotFoundError:
        return []


def size_and_time(directory: Path) -> tuple[int, datetime.datetime]:
    """Bytes of all files below, and the local time of the last change: in a bucket, of any object below."""
    if not is_remote(directory):
        size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        return size, datetime.datetime.fromtimestamp(directory.stat().st_mtime)
    found = _bucket().find(str(directory), detail=True).values()
    newest = max(info["mtime"] for info in found)
    return sum(info["size"] for info in found), newest.astimezone().replace(tzinfo=None)


def move_checkpoint(directory: Path, place: Path) -> None:
    """Moves a checkpoint. In a bucket it is copied, by the service, and deleted.

    A kill meanwhile leaves it whole where it was, or whole in its new place and without its mark, so that the next
    start removes the rest.
    """
    if not is_remote(directory):
        place.parent.mkdir(exist_ok=True)
        directory.rename(place)
        return
    bucket = _bucket()
    bucket.copy(str(directory), str(place), recursive=True)
    (directory / COMMITTED).unlink(missing_ok=True)
    bucket.rm(str(directory), recursive=True)


def upload(directory: Path, target: Path) -> None:
    """Copies all files of a directory on a disk below `target` in a bucket."""
    _bucket().put(f"{directory}/", f"{target}/", recursive=True)


def read_all(paths: list[Path]) -> list[bytes]:
    """The contents of files; those of a bucket are read at the same time."""
    if not paths or not is_remote(paths[0]):
        return [path.read_bytes() for path in paths]
    found = _bucket().cat([str(path) for path in paths])
    return [found[str(path).removeprefix("gs://")] for path in paths]


class AppendedObjects:
    """Stands for a file that is appended to: what is written becomes objects, one for each flush that is due."""

    def __init__(self, name: Callable[[bytes], Path]):
        """`name` gives the path of a part by its contents."""
        self.name, self.buffer, self.began = name, [], time.monotonic()

    def write(self, data: bytes) -> None:
        """Keeps `data` for the next part."""
        self.buffer.append(data)

    def flush(self) -> None:
        """Between lines or records: writes a part if the last one is PART_SECONDS old."""
        if time.monotonic() - self.began >= PART_SECONDS:
            self.save()

    def save(self) -> None:
        """Writes a part now, if there is anything to write."""
        self.began = time.monotonic()
        if self.buffer:
            data = b"".join(self.buffer)
            self.name(data).write_bytes(data)
            self.buffer = []

    def close(self) -> None:
        """Writes the last part."""
        self.save()


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


def _bucket() -> Any:
    """The file system that epath uses too."""
    import fsspec

    return fsspec.filesystem("gcs", finalize_on_close=True)
