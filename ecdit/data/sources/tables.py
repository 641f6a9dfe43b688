"""Reads a folder of images with a table of their captions, CSV or JSON lines.

    file,caption,aesthetic
    cats/one.jpg,"a cat, asleep",6.1
Paths of images are relative to the table's folder and may not leave it, not even through links. A CSV file has a header
line and quotes fields by RFC 4180, so that captions may have newlines. Numbers become columns for filters.
"""

import csv
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from ecdit.data import DataError
from ecdit.data.sources.protocol import (
    Keep,
    Pair,
    Rejected,
    Scalar,
    is_unicode,
    judged,
    parse_object,
    split_fields,
    with_captions,
)

_MAX_LINE_BYTES = 1 << 20
_INTEGER, _FLOAT = re.compile(r"[+-]?[0-9]{1,18}"), re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


class _BadRow(Exception):
    """A row that cannot be used; its arguments are the reason and the detail."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Reads the pairs of a table, for example `Table("/data/pairs.csv", image="file", captions=("caption",))`.

    The key is the column `key` if there is one, else the image's path without its extension, such as "cats/one". In
    that case rows that share an image also share their key.
    """

    path: str  # ends in .csv or .jsonl
    image: str = "file"  # the column of paths
    captions: tuple[str, ...] = ("caption",)  # columns with a caption or, in JSON, a list of captions
    rows_per_part: int = 10_000
    keep: Keep | None = None  # a function of a module, so that other processes can import it
    max_image_bytes: int = 256 << 20
    attribution: str = ""

    def parts(self) -> tuple[str, ...]:
        """Returns the parts, named by their first rows. Reads the table once to find where they begin."""
        return tuple(self._offsets)

    def stamp(self, part: str) -> str:
        """Returns a hash of the part's lines and of its images' sizes and times."""
        digest = hashlib.sha256()
        for _, row in self._rows(part):
            digest.update(repr(row).encode("utf-8", "surrogatepass"))
            try:
                found = os.stat(self._image_path(row))
                digest.update(json.dumps([found.st_size, found.st_mtime_ns]).encode())
            except (_BadRow, OSError, ValueError):
                digest.update(b"none")
        return digest.hexdigest()

    def read(self, part: str) -> Iterator[Pair | Rejected]:
        """Yields the records of a part in the order of its rows."""
        for number, row in self._rows(part):
            name = f"{Path(self.path).name}:row {number}"
            try:
                pair = self._pair(row, name)
            except _BadRow as error:
                pair = Rejected(name, *error.args)
            yield judged(pair, name, self.keep) if isinstance(pair, Pair) else pair

    def _pair(self, row: dict[str, Any] | _BadRow, name: str) -> Pair | Rejected:
        path = self._image_path(row)
        assert isinstance(row, dict)  # `_image_path` raises a _BadRow
        image = self._image(path)
        fields = {column: value for column, value in row.items() if column not in (self.image, "key")}
        texts, columns = split_fields(fields, lambda column: column in self.captions)
        if self._is_csv:
            columns = {column: _number(value) for column, value in columns.items()}
        key = row["key"] if "key" in row else str(PurePosixPath(row[self.image]).with_suffix(""))
        if not isinstance(key, str | int) or isinstance(key, bool) or not str(key) or not is_unicode(str(key)):
            raise _BadRow("unsafe name", f"key {key!r}")
        return with_captions(str(key), image, texts, columns, name)

    def _image_path(self, row: dict[str, Any] | _BadRow) -> Path:
        """Returns the path of a row's image.

        Raises:
          _BadRow: the row is a _BadRow, or its path is missing or not allowed.
        """
        if isinstance(row, _BadRow):
            raise row
        path = row.get(self.image)
        if not isinstance(path, str) or not path:
            raise _BadRow("no image", f"column {self.image!r} is {path!r}")
        if not is_unicode(path):
            raise _BadRow("not UTF-8", f"path {path!r}")
        try:
            resolved = (self._folder / path).resolve()
        except (ValueError, OSError, RuntimeError) as error:  # a NUL, a name that is too long, links in a circle
            raise _BadRow("unsafe name", f"path {path!r}: {error}") from None
        if not resolved.is_relative_to(self._folder):
            raise _BadRow("unsafe name", f"path {path!r} leaves the table's folder")
        return resolved

    def _image(self, path: Path) -> bytes:
        try:
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                raise _BadRow("not a file", str(path))
            if found.st_size > self.max_image_bytes:
                raise _BadRow("too large", f"{path} has {found.st_size} bytes, more than {self.max_image_bytes}")
            return path.read_bytes()
        except OSError as error:
            raise _BadRow("no image", f"{type(error).__name__}: {error}") from None

    @property
    def _is_csv(self) -> bool:
        return Path(self.path).suffix.lower() == ".csv"

    @functools.cached_property
    def _folder(self) -> Path:
        return Path(self.path).parent.resolve()

    @functools.cached_property
    def _offsets(self) -> dict[str, tuple[int, int]]:
        """Returns the (byte, row) at which each part begins; rows count from 1."""
        if self.rows_per_part < 1:
            raise DataError(f"rows_per_part = {self.rows_per_part} must be at least 1")
        offsets = {}
        with self._open() as file:
            lines = _Lines(file)
            rows = self._parsed(lines, self._columns(lines))
            for number in itertools.count(1):
                begin = lines.offset
                if next(rows, None) is None:
                    break
                if number % self.rows_per_part == 1 or self.rows_per_part == 1:
                    offsets[f"rows-{number:012d}"] = (begin, number)
        if not offsets:
            raise DataError(f"{self.path} has no rows")
        return offsets

    def _rows(self, part: str) -> Iterator[tuple[int, dict[str, Any] | _BadRow]]:
        """Yields the rows of a part with their numbers."""
        if part not in self._offsets:
            raise DataError(f"{self.path} has no part {part!r}")
        offset, first = self._offsets[part]
        with self._open() as file:
            lines = _Lines(file)
            columns = self._columns(lines)
            lines.seek(offset)
            rows = itertools.islice(self._parsed(lines, columns), self.rows_per_part)
            yield from enumerate(rows, first)

    def _open(self) -> BinaryIO:
        if Path(self.path).suffix.lower() not in (".csv", ".jsonl"):
            raise DataError(f"{self.path} must be a .csv or a .jsonl file")
        try:
            return open(self.path, "rb")
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error}") from None

    def _columns(self, lines: "_Lines") -> list[str]:
        """Returns the header of a CSV file, or [] for JSON lines."""
        if not self._is_csv:
            return []
        try:
            columns = next(csv.reader(lines, strict=True), [])
        except csv.Error as error:
            raise DataError(f"{self.path}: the header cannot be parsed: {error}") from None
        if missing := [column for column in (self.image, *self.captions) if column not in columns]:
            raise DataError(f"{self.path} has no column {missing[0]!r}; it has {', '.join(columns) or 'none'}")
        if len(set(columns)) < len(columns):
            raise DataError(f"{self.path}: the header has a column twice: {', '.join(columns)}")
        return columns

    def _parsed(self, lines: "_Lines", columns: list[str]) -> Iterator[dict[str, Any] | _BadRow]:
        """Yields the rows from the position of `lines` on. Skips empty lines."""
        rows: Any = csv.reader(lines, strict=True) if self._is_csv else lines
        while True:
            begin = lines.offset
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:  # the next call continues behind the bad row
                yield _BadRow("bad row", f"bytes {begin} to {lines.offset}: {error}")
                continue
            if row and (self._is_csv or row.strip()):
                yield _checked_row(row, columns) if self._is_csv else _json_row(row)


def _checked_row(values: list[str], columns: list[str]) -> dict[str, str] | _BadRow:
    """Returns the fields of a CSV row by column."""
    if len(values) != len(columns):
        return _BadRow("bad row", f"{len(values)} fields, the header has {len(columns)}")
    if not all(map(is_unicode, values)):
        return _BadRow("not UTF-8", "the row")
    return dict(zip(columns, values, strict=True))


def _json_row(line: str) -> dict[str, Any] | _BadRow:
    if not is_unicode(line):
        return _BadRow("not UTF-8", "the row")
    try:
        return parse_object(line)
    except ValueError as error:
        return _BadRow("bad JSON", str(error))


def _number(value: Scalar) -> Scalar:
    """Returns a CSV field as a number if it is one, None if it is empty, else the field itself."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return value if text else None


class _Lines:
    """Iterates over the lines of a file as text and counts bytes. Undecodable bytes become lone surrogates.

    csv.reader takes only the lines of one row at a time, so that `offset` is where the next row begins.
    """

    def __init__(self, file: BinaryIO):
        self._file, self.offset = file, 0

    def seek(self, offset: int) -> None:
        """Moves to a byte at which a line begins."""
        self._file.seek(offset)
        self.offset = offset

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        first = self.offset == 0
        line = self._file.readline(_MAX_LINE_BYTES)
        self.offset += len(line)
        if len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = self._file.readline(_MAX_LINE_BYTES)
                self.offset += len(line)
            raise csv.Error(f"a line of more than {_MAX_LINE_BYTES} bytes")
        if not line:
            raise StopIteration
        return line.decode("utf-8-sig" if first else "utf-8", "surrogateescape")
