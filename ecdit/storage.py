"""Workdirs in a bucket of Google Cloud Storage: the operations that differ from those on a disk.

A path on a disk is pathlib's; gs://BUCKET/PATH is one of etils.epath, which goes through gcsfs. Most operations on
paths work with both, so signatures say Path for either. A bucket has no directories to make, and an object is written
whole or not at all; but nothing can be appended to an object, and renaming one copies it.
"""

import contextlib
import datetime
import importlib.util
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from ecdit.errors import UserError, chain
from ecdit.files import is_remote

# Otherwise epath takes TensorFlow's file system where TensorFlow is installed, which takes seconds to import and cannot
# use an emulator.
os.environ.setdefault("EPATH_USE_TF", "false")

PART_SECONDS = 60.0  # age at which buffered data is written as an object
# How tensorstore begins the message of an error of a service.
STATUSES = ("PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")
OUTAGE_SECONDS = 1800.0  # for which data that cannot be written is kept and tried again, before that is an error
CLOSE_SECONDS = 120.0  # the same when a run ends, which waits for it
_CLIENTS = ("aiohttp", "gcsfs", "google", "requests")  # packages whose errors mean network or permissions
COMMITTED = "commit_success.txt"  # Orbax's mark, in a bucket, of a checkpoint that was saved to its end


def as_path(text: str, name: str = "--workdir") -> Path:
    """Returns `text` as a path; messages call it `name`.

    Raises:
      UserError: it has another scheme than gs://, names no path in the bucket, or needs a package that is missing.
    """
    if "://" not in text:
        return Path(text)
    if not re.fullmatch(r"gs://[^/]+/+[^/].*", text):
        raise UserError(f"{name}={text}: must be a directory, or gs://BUCKET/PATH")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{name}={text}: needs the package gcsfs: pip install -e '.[gcs]'")
    import fsspec.config

    # Its cache of listings does not notice what tensorstore or another process writes.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(text)  # pyright: ignore[reportReturnType]  # it has all that a pathlib.Path has


def check_workdir(workdir: Path) -> None:
    """Raises UserError if a workdir is a file, or if this process lacks a right to one in a bucket.

    Without the right to list, it would not see the checkpoints, and the run would start over.
    """
    if not is_remote(workdir):
        if workdir.exists() and not workdir.is_dir():
            raise UserError(f"--workdir={workdir}: is a file, must be a directory")
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
    """Returns the Unix time that a bucket gives to an object written now; deletes the object."""
    probe = workdir / f"clock_check_{secrets.token_hex(4)}"
    with reading(workdir):
        probe.write_bytes(b"to be deleted")
        changed = _bucket().info(str(probe))["mtime"]
        probe.unlink()
    return changed.timestamp()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an error of network or permissions into a UserError that names `path`."""
    try:
        yield
    except Exception as error:
        if not is_outage(error):
            raise
        raise UserError(f"{path} cannot be read: {_said(error)}") from error


def is_outage(error: BaseException) -> bool:
    """Returns whether an error comes from network or permissions, and not from what a bucket holds."""
    return any(_is_outage(one) for one in chain(error))


def _is_outage(error: BaseException) -> bool:
    refused = type(error) is OSError and error.errno is None  # gcsfs's for 401 and 403; those of disks have a number
    away = isinstance(error, ConnectionError | TimeoutError) or _package(error) in _CLIENTS
    return refused or away or str(error).startswith(STATUSES)


def _package(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def seconds_since_change(path: Path, workdir: Path) -> float:
    """Returns the age of an object by the bucket's own clock; writes and deletes an object in `workdir` to read it."""
    return write_time(workdir) - _bucket().info(str(path))["mtime"].timestamp()


def read_generation(path: Path) -> tuple[bytes | None, bytes]:
    """Returns the contents of an object in a bucket, None if it is missing, and its generation."""
    found = _key_value_store(path).read(path.name).result()
    return (found.value if found.state == "value" else None), found.stamp.generation


def replace_generation(path: Path, data: bytes | None, generation: bytes) -> bytes | None:
    """Writes an object in a bucket, or deletes it for None, if it is still of `generation`.

    Returns the new generation; None if it was of another one. Of several processes that try at once, one succeeds.
    """
    written = _key_value_store(path).write(path.name, data, if_equal=generation).result()
    return written.generation or None


def is_temporary(error: BaseException) -> bool:
    """Returns whether an error, or one behind it, comes from an outage that may end, and not from missing rights."""
    return any(_is_temporary(one) for one in chain(error))


def _is_temporary(error: BaseException) -> bool:
    code = getattr(error, "code", None)  # gcsfs's and google's, an HTTP status or an enumeration
    if _package(error) in _CLIENTS and str(code) not in ("401", "403", "404"):
        return True
    if isinstance(error, ConnectionError | TimeoutError) and not isinstance(error, BrokenPipeError):
        return True
    return bool(re.search(r"\b(UNAVAILABLE|DEADLINE_EXCEEDED)\b", str(error)))  # tensorstore's, which has no types


def make_directory(path: Path) -> None:
    """Makes a directory and its parents if they are missing. Does nothing in a bucket."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def children(directory: Path) -> list[Path]:
    """Returns the entries of a directory, none if it is missing.

    (`is_dir` would also be False where a bucket refuses to be read.)
    """
    try:
        return list(directory.iterdir())
    except FileNotFoundError:
        return []


def size_and_time(directory: Path) -> tuple[int, datetime.datetime]:
    """Returns the bytes of all files below a directory, and the local time of the last change."""
    if not is_remote(directory):
        size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        return size, datetime.datetime.fromtimestamp(directory.stat().st_mtime)
    found = _bucket().find(str(directory), detail=True).values()
    newest = max(info["mtime"] for info in found)
    return sum(info["size"] for info in found), newest.astimezone().replace(tzinfo=None)


def move_aside(paths: Sequence[Path], directory: Path) -> None:
    """Moves files and directories into `directory`, which is made. In a bucket the service copies and deletes them."""
    make_directory(directory)
    for path in paths:
        if is_remote(path):
            _bucket().mv(str(path), str(directory / path.name), recursive=True)
        else:
            path.rename(directory / path.name)


def move_checkpoint(directory: Path, place: Path) -> None:
    """Moves a checkpoint. In a bucket the service copies it, then the original is deleted.

    A kill in between leaves it complete where it was, or complete in its new place while the original has lost its
    mark, so that the next start removes the original.
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
    """Returns the contents of files; those of a bucket are read concurrently."""
    if not paths or not is_remote(paths[0]):
        return [path.read_bytes() for path in paths]
    found = _bucket().cat([str(path) for path in paths])
    return [found[str(path).removeprefix("gs://")] for path in paths]


class AppendedObjects:
    """Behaves like a file opened for appending, in a bucket: buffers data and writes it as one object after another.

    In an outage it keeps the data, and tries again a while later: training goes on.
    """

    def __init__(self, name: Callable[[bytes], Path]):
        """`name` returns the path of an object by its contents."""
        self.name, self.buffer, self.began = name, [], time.monotonic()
        self.failing_since: float | None = None

    def write(self, data: bytes) -> None:
        """Buffers `data` for the next object."""
        self.buffer.append(data)

    def flush(self) -> None:
        """Writes an object if the last one is PART_SECONDS old. Call it between lines or records."""
        if time.monotonic() - self.began >= PART_SECONDS:
            self.save()

    def save(self) -> None:
        """Writes an object now, if anything is buffered; keeps the data for up to OUTAGE_SECONDS if that fails."""
        self._save(OUTAGE_SECONDS)

    def close(self) -> None:
        """Writes the last object; tries for up to CLOSE_SECONDS."""
        self.failing_since = None
        self._save(CLOSE_SECONDS)
        while self.buffer:
            time.sleep(CLOSE_SECONDS / 20)
            self._save(CLOSE_SECONDS)

    def _save(self, limit: float) -> None:
        if self.buffer:
            data = b"".join(self.buffer)
            try:
                self.name(data).write_bytes(data)
            except Exception as error:
                if not is_temporary(error):
                    raise
                now = time.monotonic()
                if self.failing_since is None:
                    self.failing_since = now
                    print(f"a bucket cannot be written, its data is kept and tried again: {_said(error)}", flush=True)
                if now - self.failing_since >= limit:
                    raise
            else:
                self.buffer, self.failing_since = [], None
        self.began = time.monotonic()  # also after an attempt that failed


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


def _key_value_store(path: Path) -> Any:
    """Returns tensorstore's view of an object's directory: it can write on the condition of a generation."""
    import tensorstore

    return tensorstore.KvStore.open(f"{path.parent}/").result()


def _bucket() -> Any:
    """Returns the file system that epath uses too."""
    import fsspec

    return fsspec.filesystem("gcs", finalize_on_close=True)
