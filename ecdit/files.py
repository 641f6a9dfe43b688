"""Writes files whole or not at all, and names the path when that fails; on disks and in buckets alike."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ecdit.errors import UserError


def check_writable(path: Path) -> None:
    """Raises UserError, before work is done for nothing, where `path` could not be made or written."""
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    if (existing != path and not existing.is_dir()) or not os.access(existing, os.W_OK):
        raise UserError(f"{path} cannot be written: {existing} is no directory to write in")


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is in a bucket and not on a disk: see `storage`."""
    return os.fspath(path).startswith("gs://")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes an OSError, or whatever a bucket's libraries raise, a UserError that names `path`: they often do not."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_remote(path) and not isinstance(error, OSError):
            raise
        raise UserError(f"writing {path} failed: {str(error) or type(error).__name__}") from error


def replace_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all: whoever reads it, after a kill too, finds the old text or the new.

    Raises:
      UserError: it cannot be written; the old text is still there.
    """
    if is_remote(path):  # an object is written so anyway
        with writing(path):
            path.write_text(text)
        return
    scratch = path.with_name(path.name + ".tmp")
    with writing(path):
        scratch.write_text(text)
        os.replace(scratch, path)
