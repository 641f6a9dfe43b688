"""Reads tars of img2dataset and webdataset, in which an image, its text and its JSON share a key.

The key is a member's path up to the first dot of its last part, as in webdataset: `00012/000120034.jpg` and
`00012/000120034.json` are the record `00012/000120034`. Members of a record may lie anywhere in their tar.
Images are .jpg, .jpeg, .png or .webp; .txt is the caption field `caption` unless the JSON has one; .json has captions
and columns. Other members are ignored, but a key without an image is rejected.
"""

import dataclasses
import functools
import glob
import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ecdit.data import DataError
from ecdit.data.sources import archive
from ecdit.data.sources.protocol import (
    Keep,
    Pair,
    Rejected,
    is_unicode,
    judged,
    parse_object,
    split_fields,
    with_captions,
)

_ROLES = {"jpg": "image", "jpeg": "image", "png": "image", "webp": "image", "txt": "text", "json": "json"}
_MAX_TEXT_BYTES = 4 << 20  # limit of a .txt or .json, because parsing takes many times its size in memory


@dataclasses.dataclass(frozen=True)
class Tars:
    """Reads the tars that a pattern names, such as `Tars("/data/cc12m/*.tar")`; `**` matches folders at any depth."""

    pattern: str
    keep: Keep | None = None  # a function of a module, so that other processes can import it
    captions: tuple[str, ...] = ()  # JSON fields beside those whose names end in "caption" or "captions"
    tars_per_part: int = 1
    max_member_bytes: int = 256 << 20
    attribution: str = ""

    def parts(self) -> tuple[str, ...]:
        """Returns the parts, named by their tar, or by the first and last tar of a group."""
        return tuple(self._files)

    def stamp(self, part: str) -> str:
        """Returns a hash of the names, sizes and times of the part's tars."""
        files = [(name, os.stat(path)) for name, path in self._paths(part)]
        return hashlib.sha256(
            json.dumps([(name, found.st_size, found.st_mtime_ns) for name, found in files]).encode()
        ).hexdigest()

    def read(self, part: str) -> Iterator[Pair | Rejected]:
        """Yields each tar's damage, then its records in the order of their first members."""
        for name, path in self._paths(part):
            try:
                with open(path, "rb") as file:
                    samples, rejected = _index(file, name, self.max_member_bytes)
                    yield from rejected
                    while samples:  # `pop` frees the index while the records are read
                        key = next(iter(samples))
                        yield self._record(file, f"{name}:{key}", key, samples.pop(key))
            except OSError as error:
                raise DataError(f"cannot read {path}: {error}") from None

    def _record(self, file: BinaryIO, name: str, key: str, sample: "_Sample") -> Pair | Rejected:
        if sample.problem:
            return Rejected(name, *sample.problem)
        if "image" not in sample.members:
            return Rejected(name, "no image", "none of .jpg, .jpeg, .png, .webp")
        fields = {}
        for role in ("text", "json"):
            if role in sample.members:
                try:
                    text = _bytes(file, sample.members[role]).decode("utf-8-sig")
                    fields |= {"caption": text} if role == "text" else _merged(fields, parse_object(text))
                except UnicodeDecodeError as error:
                    return Rejected(name, "not UTF-8", f".{sample.members[role].name.rpartition('.')[2]}: {error}")
                except ValueError as error:
                    return Rejected(name, "bad JSON", str(error))
        texts, columns = split_fields(fields, self._is_caption)
        pair = with_captions(key, _bytes(file, sample.members["image"]), texts, columns, name)
        return judged(pair, name, self.keep) if isinstance(pair, Pair) else pair

    def _is_caption(self, field: str) -> bool:
        return field in self.captions or field.endswith(("caption", "captions"))

    def _paths(self, part: str) -> list[tuple[str, str]]:
        if part not in self._files:
            raise DataError(f"{self.pattern} has no part {part!r}")
        return self._files[part]

    @functools.cached_property
    def _files(self) -> dict[str, list[tuple[str, str]]]:
        """Returns the (name, path) of tars by part. Names are relative to the folder above the first wildcard."""
        if self.tars_per_part < 1:
            raise DataError(f"tars_per_part = {self.tars_per_part} must be at least 1")
        paths = sorted(path for path in glob.glob(self.pattern, recursive=True) if os.path.isfile(path))
        if not paths:
            raise DataError(f"no tar is named like {self.pattern}")
        root = _fixed_folder(self.pattern)
        named = [(Path(path).relative_to(root).as_posix(), path) for path in paths]
        groups = [named[start : start + self.tars_per_part] for start in range(0, len(named), self.tars_per_part)]
        return {group[0][0] if len(group) == 1 else f"{group[0][0]}..{group[-1][0]}": group for group in groups}


@dataclasses.dataclass(slots=True)
class _Sample:
    """Collects a key's members by role, and why it is rejected, (reason, detail)."""

    members: dict[str, archive.Member] = dataclasses.field(default_factory=dict)
    problem: tuple[str, str] | None = None


def _index(file: BinaryIO, tar: str, max_bytes: int) -> tuple[dict[str, _Sample], list[Rejected]]:
    """Returns the samples of a tar by key, in the order of their first members, and damage that belongs to no key."""
    samples: dict[str, _Sample] = {}
    rejected = []
    for found in archive.scan(file):
        name = found.member if isinstance(found, archive.Damage) else found.name
        key, role = _key_and_role(name)
        if isinstance(found, archive.Damage):
            detail = f"bytes {found.start} to {found.end}: {found.detail}"
            if not name or _unsafe(name, key):
                rejected.append(Rejected(f"{tar}:{name}" if name else tar, "damaged tar", detail))
                continue
            problem = ("damaged tar", detail)
        elif found.kind == tarfile.DIRTYPE:
            continue
        elif unsafe := _unsafe(name, key):
            rejected.append(Rejected(f"{tar}:{name}", "unsafe name", unsafe))
            continue
        else:
            problem = None
        sample = samples.setdefault(key, _Sample())
        if isinstance(found, archive.Member) and problem is None:
            problem = _problem(found, role, sample, max_bytes)
        sample.problem = sample.problem or problem
        if role and isinstance(found, archive.Member):
            sample.members.setdefault(role, found)
    return samples, rejected


def _problem(member: archive.Member, role: str | None, sample: _Sample, max_bytes: int) -> tuple[str, str] | None:
    """Returns why a member makes its sample unusable, (reason, detail), or None."""
    if member.sparse:
        return "sparse member", member.name
    if not member.is_file:
        return "not a file", f"{member.name} has the type {member.kind.decode('latin-1')!r}"
    if role is None:
        return None
    if role in sample.members:
        # It is unknown which image belongs to which text.
        return "duplicate member", f"{sample.members[role].name} and {member.name}"
    limit = max_bytes if role == "image" else min(max_bytes, _MAX_TEXT_BYTES)
    if member.size > limit:
        return "too large", f"{member.name} has {member.size} bytes, more than {limit}"
    return None


def _key_and_role(name: str) -> tuple[str, str | None]:
    """Returns the key of a member's name, without a leading "./", and its role in the record, or None."""
    if "//" in name or "./" in name or "/." in name or name.endswith("/"):  # it may have an empty part or a "."
        name = str(PurePosixPath(name))
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, _ROLES.get(extension.lower())


def _unsafe(name: str, key: str) -> str:
    """Returns why a member's name is unsafe, or ''. `key` is that of the name."""
    if not is_unicode(name):
        return "not UTF-8"
    if name.startswith("/"):
        return "absolute"
    if ".." in name.split("/"):
        return "leaves its folder"
    return "" if key.rpartition("/")[2] else "no key before its first dot"


def _merged(text: dict[str, str], fields: dict) -> dict:
    """Returns the JSON's fields, with the text file's caption if the JSON has none."""
    own = fields.get("caption")
    texts = own if isinstance(own, list) else [own]
    return fields if any(isinstance(one, str) and one.strip() for one in texts) else {**fields, **text}


def _bytes(file: BinaryIO, member: archive.Member) -> bytes:
    file.seek(member.start)
    return file.read(member.size)


def _fixed_folder(pattern: str) -> Path:
    """Returns the folder above the first wildcard of a pattern, or above the file that it names."""
    parts = Path(pattern).parts
    fixed = next((place for place, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:fixed])
