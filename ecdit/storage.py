"""Supports workdirs in a bucket of Google Cloud Storage, by the operations that differ from those on a disk.

A path on a disk is pathlib's, and gs://BUCKET/PATH is one of etils.epath, which uses gcsfs. Most operations on paths
work with both, so signatures say Path for either. A bucket has no directories to make and writes objects atomically,
but it cannot append to an object, and renaming copies it.
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

from ecdit.errors import OutageError, UserError, causes, chain
from ecdit.files import is_remote

# Otherwise epath would use TensorFlow's file system if TensorFlow is installed. Its import takes seconds, and it cannot
# use an emulator.
os.environ.setdefault("EPATH_USE_TF", "false")

PART_SECONDS = 60.0  # age at which buffered data is written as an object
# Beginnings of tensorstore's messages for errors of a service.
STATUSES = ("PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")
OUTAGE_SECONDS = 1800.0  # time for which data that cannot be written is kept and retried before it is an error
CLOSE_SECONDS = 120.0  # the same time at the end of a run, which waits for it
_CLIENTS = ("aiohttp", "gcsfs", "google", "requests")  # packages whose errors come from network or permissions
COMMITTED = "commit_success.txt"  # Orbax's mark of a complete checkpoint in a bucket


def as_path(text: str, name: str = "--workdir") -> Path:
    """Returns `text` as a path; messages call it `name`.

    Raises:
      UserError: the scheme is not gs://, the text names no path in the bucket, or a package is missing.
    """
    if "://" not in text:
        return Path(text)
    if not re.fullmatch(r"gs://[^/]+/+[^/].*", text):
        raise UserError(f"{name}={text}: must be a directory, or gs://BUCKET/PATH")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{name}={text}: needs the package gcsfs: pip install -e '.[gcs]'")
    import fsspec.config

    # gcsfs's cache of listings would not notice writes of tensorstore or of other processes.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(text)  # pyright: ignore[reportReturnType]  # it has the methods of a pathlib.Path


def check_workdir(workdir: Path) -> None:
    """Raises UserError if a workdir is a file, or in a bucket in which this process lacks permissions.

    Without permission to list, a run would not find its checkpoints and would start over.
    """
    if not is_remote(workdir):
        if workdir.exists() and not workdir.is_dir():
            raise UserError(f"--workdir={workdir}: must be a directory, not a file")
        return
    probe = workdir / f"write_check_{secrets.token_hex(4)}"
    try:
        probe.write_bytes(b"to be deleted")  # gcsfs would read an empty object without asking the bucket
        list(workdir.iterdir())
        _bucket().cat_file(str(probe))
        probe.unlink()
    except Exception as error:
        raise UserError(f"--workdir={workdir}: cannot be read, listed and written: {_said(error)}") from error


def write_time(workdir: Path) -> float:
    """Returns the Unix time of a bucket's clock, by writing an object and deleting it."""
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
    """Returns whether an error comes from network or permissions, and not from a bucket's contents."""
    return any(_is_outage(one) for one in chain(error))


def _is_outage(error: BaseException) -> bool:
    refused = type(error) is OSError and error.errno is None  # gcsfs raises it for 401 and 403; a disk's has a number
    away = isinstance(error, ConnectionError | TimeoutError) or _package(error) in _CLIENTS
    return refused or away or str(error).startswith(STATUSES)


def _package(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def seconds_since_change(path: Path, workdir: Path) -> float:
    """Returns the age of an object by the bucket's own clock. Writes and deletes an object in `workdir` for that."""
    return write_time(workdir) - _bucket().info(str(path))["mtime"].timestamp()


def read_generation(path: Path) -> tuple[bytes | None, bytes]:
    """Returns the contents of an object in a bucket, or None if it is missing, and its generation."""
    found = _key_value_store(path).read(path.name).result()
    return (found.value if found.state == "value" else None), found.stamp.generation


def replace_generation(path: Path, data: bytes | None, generation: bytes, seconds: float | None = None) -> bytes | None:
    """Writes an object in a bucket, or deletes it if `data` is None, unless its generation has changed.

    Returns the new generation, or None if another process changed it first. Only one of several processes succeeds.

    Raises:
      TimeoutError: it took longer than `seconds`. (In an outage tensorstore goes on for minutes.)
    """
    written = _key_value_store(path).write(path.name, data, if_equal=generation).result(seconds)
    return written.generation or None


def is_temporary(error: BaseException) -> bool:
    """Returns whether an error comes from an outage that may end, and not from missing permissions."""
    return any(_is_temporary(one) for one in chain(error))


def _is_temporary(error: BaseException) -> bool:
    if isinstance(error, OutageError):
        return True
    code = getattr(error, "code", None)  # an HTTP status or an enumeration, in errors of gcsfs and google
    if _package(error) in _CLIENTS and str(code) not in ("401", "403", "404"):
        return True
    if isinstance(error, ConnectionError | TimeoutError) and not isinstance(error, BrokenPipeError):
        return True
    return bool(re.search(r"\b(UNAVAILABLE|DEADLINE_EXCEEDED)\b", str(error)))  # tensorstore has no error types


def expected_error(error: Exception) -> UserError | OSError | None:
    """Returns the error that a command reports in one line, or None if it is a bug and needs its traceback.

    The libraries that reach a bucket have exceptions of their own for an outage: those become an OutageError. All that
    a command does goes through it (`command_line.run_command`), and what processes do together (`multihost.together`).
    An error that is raised while an outage is handled, and not from it, is a bug.
    """
    if isinstance(error, UserError | OSError):
        return error
    outage = any(_is_temporary(one) for one in causes(error))
    if not outage or _package(error) == "jax":  # JAX says UNAVAILABLE of its own services
        return None
    expected = OutageError(f"a bucket or the network cannot be reached: {_said(error)}")
    expected.__cause__ = error
    return expected


def make_directory(path: Path) -> None:
    """Makes a directory and its parents if they are missing. Does nothing in a bucket."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def children(directory: Path) -> list[Path]:
    """Returns the entries of a directory, or none if it is missing.

    Checking `is_dir` first would hide a bucket that cannot be read, because it returns False then, too.
    """
    try:
        return list(directory.iterdir())
    except FileNotFoundError:
        return []


def size_and_time(directory: Path) -> tuple[int, datetime.datetime]:
    """Returns the bytes of all files below a directory, and the local time of the newest change."""
    if not is_remote(directory):
        size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        return size, datetime.datetime.fromtimestamp(directory.stat().st_mtime)
    found = _bucket().find(str(directory), detail=True).values()
    newest = max(info["mtime"] for info in found)
    return sum(info["size"] for info in found), newest.astimezone().replace(tzinfo=None)


def move_aside(paths: Sequence[Path], directory: Path) -> None:
    """Moves files and directories into a new `directory`. In a bucket the service copies and deletes them."""
    make_directory(directory)
    for path in paths:
        if is_remote(path):
            _bucket().mv(str(path), str(directory / path.name), recursive=True)
        else:
            path.rename(directory / path.name)


def move_checkpoint(directory: Path, place: Path) -> None:
    """Moves a checkpoint. In a bucket the service copies it, and then this function deletes the original.

    A kill in between leaves the original complete, or the copy complete and the original without its mark, so that the
    next start removes the original.
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
    """Copies all files of a directory on a disk to `target` in a bucket."""
    _bucket().put(f"{directory}/", f"{target}/", recursive=True)


def read_all(paths: list[Path]) -> list[bytes]:
    """Returns the contents of files. It reads those in a bucket concurrently."""
    if not paths or not is_remote(paths[0]):
        return [path.read_bytes() for path in paths]
    found = _bucket().cat([str(path) for path in paths])
    return [found[str(path).removeprefix("gs://")] for path in paths]


class AppendedObjects:
    """Behaves like a file opened for appending: buffers data and writes it as one object of a bucket after another.

    In an outage it keeps the data and retries later, so that training continues.
    """

    def __init__(self, name: Callable[[bytes], Path], permit: Callable[[], None] = lambda: None):
        """Makes an empty buffer.

        Args:
          name: returns the path of an object by its contents.
          permit: is called before each write; a ConnectionError that it raises counts as an outage.
        """
        self.name, self.permit, self.buffer, self.began = name, permit, [], time.monotonic()
        self.failing_since: float | None = None

    def write(self, data: bytes) -> None:
        """Buffers `data` for the next object."""
        self.buffer.append(data)

    def flush(self) -> None:
        """Writes an object if the last attempt is PART_SECONDS old. Call it between lines or records."""
        if time.monotonic() - self.began >= PART_SECONDS:
            self.save()

    def save(self) -> None:
        """Writes buffered data as an object now. If that fails, keeps the data for up to OUTAGE_SECONDS."""
        self._save(OUTAGE_SECONDS)

    def close(self) -> None:
        """Writes the last object, with retries for up to CLOSE_SECONDS."""
        self.failing_since = None
        self._save(CLOSE_SECONDS)
        while self.buffer:
            time.sleep(CLOSE_SECONDS / 20)
            self._save(CLOSE_SECONDS)

    def _save(self, limit: float) -> None:
        if self.buffer:
            data = b"".join(self.buffer)
            try:
                self.permit()
                self.name(data).write_bytes(data)
            except Exception as error:
                if not is_temporary(error):
                    raise
                now = time.monotonic()
                if self.failing_since is None:
                    self.failing_since = now
                    print(f"a bucket cannot be written; its data is kept and retried: {_said(error)}", flush=True)
                if now - self.failing_since >= limit:
                    raise
            else:
                self.buffer, self.failing_since = [], None
        self.began = time.monotonic()  # also after an attempt that failed


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


def _key_value_store(path: Path) -> Any:
    """Returns tensorstore's view of an object's directory, which can write if a generation is unchanged."""
    import tensorstore

    return tensorstore.KvStore.open(f"{path.parent}/").result()


def _bucket() -> Any:
    """Returns the file system that epath also uses."""
    import fsspec

    return fsspec.filesystem("gcs", finalize_on_close=True)
