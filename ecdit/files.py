"""Writes files atomically, on disks and in buckets, with the path in errors."""

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from ecdit.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
_THREADS = 32  # that look at files; on a mounted bucket each look waits for the network


def in_threads(look: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Returns `look` of each item, in order. Several threads call it, because a mounted bucket takes 50 ms a file."""
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(look, items))


def check_writable(path: Path) -> None:
    """Raises UserError if `path` cannot be created or written. Call it before the work whose result goes there."""
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    if (existing != path and not existing.is_dir()) or not os.access(existing, os.W_OK):
        raise UserError(f"{path} cannot be written: {existing} is no writable directory")


def check_file_writable(path: Path) -> None:
    """Raises UserError if `path` is a directory, or cannot be created or written. Call it like `check_writable`."""
    if path.is_dir():
        raise UserError(f"{path} cannot be written: it is a directory, and must be a file")
    check_writable(path)


def is_remote(path: str | os.PathLike) -> bool:
    """Returns whether a path is in a bucket (see `storage`)."""
    return os.fspath(path).startswith("gs://")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError, or any exception of a bucket's libraries, into a UserError that names `path`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_remote(path) and not isinstance(error, OSError):
            raise
        raise UserError(f"writing {path} failed: {str(error) or type(error).__name__}") from error


def replace_text(path: Path, text: str) -> None:
    """Writes a file atomically: readers find the old or the new text, even after a kill or a power failure.

    Several processes may write the same file; the last one wins.

    Raises:
      UserError: the file cannot be written; it keeps the old text.
    """
    _replace(path, lambda place: place.write_text(text))


def replace_bytes(path: Path, data: bytes) -> None:
    """Writes a file atomically, like `replace_text`.

    Raises:
      UserError: the file cannot be written; it keeps the old contents.
    """
    _replace(path, lambda place: place.write_bytes(data))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    if is_remote(path):  # buckets write objects atomically
        with writing(path):
            write(path)
        return
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    with writing(path):
        try:
            write(scratch)
            sync(scratch)  # otherwise a power failure could leave an empty file under the new name
            os.replace(scratch, path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
        sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file or the entries of a directory are on the disk, if the file system supports it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Applies `sync` to a directory and everything below it."""
    for path in (*directory.rglob("*"), directory):
        sync(path)
