"""Scans the headers of a tar for members and damage, and extracts nothing.

`tarfile` ends silently at a zeroed header and at a damaged one that is not the first. This scan continues at the next
block with a valid checksum and reports the skipped bytes. It reads extension headers (long names, PAX) up to a limit,
so that a false size takes no memory.
"""

import re
import tarfile
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

BLOCK = tarfile.BLOCKSIZE
_MAX_EXTENSION_BYTES = 1 << 20
_CHUNK_BLOCKS = 128  # blocks read at a time while searching for a valid header
_LONG_NAME, _LONG_LINK = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENSIONS = (_LONG_NAME, _LONG_LINK, *_PAX, tarfile.XGLTYPE)
_GZIP = b"\x1f\x8b"
# The header of a regular file with a short name, or of PAX keywords, as most programs write it. The numbers are octal.
_USUAL = re.compile(
    rb"(?P<name>.{100})(?:[0-7]{7}\0){3}(?P<size>[0-7]{11})\0[0-7]{11}\0(?P<sum>[0-7]{6})\0 (?P<kind>[0x]).{100}"
    rb"ustar.{67}(?:[0-7]{7}\0|\0{8}){2}\0.{166}",
    re.DOTALL,
)


class Header(NamedTuple):
    """Holds what a scan needs of a header whose checksum is valid."""

    name: str
    kind: bytes  # a type flag of tarfile
    size: int  # bytes of the data behind it; negative if the header is wrong


class Member(NamedTuple):
    """A member, as its header describes it."""

    name: str
    kind: bytes  # a type flag of tarfile
    start: int  # byte offset of its data
    size: int  # bytes of its data, all of which are in the file
    sparse: bool

    @property
    def is_file(self) -> bool:
        """Returns whether its data are the bytes of a file."""
        return self.kind in tarfile.REGULAR_TYPES and not self.sparse


class Damage(NamedTuple):
    """Bytes that belong to no valid member."""

    start: int
    end: int
    detail: str
    member: str = ""  # the member that they belong to, if known


def scan(file: BinaryIO) -> Iterator[Member | Damage]:
    """Yields the members of a tar in the order of their headers, and the damage between them."""
    scanner = _Scanner(file)
    while scanner.offset < scanner.end:
        if found := scanner.step():
            yield found
    if found := scanner.ending():
        yield found


class _Scanner:
    """Keeps the state of a scan: its offset, and the extension headers of the next member."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.offset, self.end = 0, file.seek(0, 2)
        self._next: dict[str, str] = {}  # PAX keywords for the next member
        self._all: dict[str, str] = {}  # PAX keywords for all further members
        self._closed = False  # whether the last blocks were the mark of the tar's end

    def step(self) -> Member | Damage | None:
        """Reads one header, or skips bytes up to the next valid one; returns what it found."""
        start = self.offset
        block = self._read(start, BLOCK)
        if not any(block):
            return self._zeros(start)
        header = parse_header(block)
        if header is None:
            return self._resynchronize(start)
        self._closed = False
        self.offset = start + BLOCK
        if header.kind in _EXTENSIONS:
            return self._extension(header, start)
        return self._member(header, start, block)

    def ending(self) -> Damage | None:
        """Returns the damage at the end, if the mark of the tar's end is missing."""
        if self._closed:
            return None
        detail = "an empty file" if not self.end else "ends without the mark of a tar's end: it may have been cut"
        return Damage(self.end, self.end, detail)

    def _member(self, header: Header, start: int, block: bytes) -> Member | Damage:
        keywords, self._next = {**self._all, **self._next}, {}
        name = keywords.get("path", header.name)
        sparse = header.kind == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in keywords)
        if header.kind == tarfile.GNUTYPE_SPARSE:
            more = block[482]  # whether blocks of further pieces lie between header and data
            while more and self.offset < self.end:
                more = self._read(self.offset, BLOCK).ljust(BLOCK, b"\0")[504]
                self.offset += BLOCK
        if not _has_data(header.kind):
            return Member(name, header.kind, self.offset, 0, sparse)
        size = _decimal(keywords["size"]) if "size" in keywords else header.size
        if size is None or size < 0:
            return Damage(start, self.offset, f"a member of {keywords.get('size', header.size)} bytes", name)
        if size > self.end - self.offset:
            detail = f"{size} bytes of data, but {self.end - self.offset} are left"
            damage = Damage(self.offset, self.end, detail, name)
            self._closed, self.offset = True, self.end  # the missing end is reported already
            return damage
        member = Member(name, header.kind, self.offset, size, sparse)
        self.offset += _padded(size)
        return member

    def _extension(self, header: Header, start: int) -> Damage | None:
        """Reads an extension header, which describes the next member; returns its damage."""
        if not 0 <= header.size <= min(_MAX_EXTENSION_BYTES, self.end - self.offset):
            # The size is wrong and cannot locate the next header, so the scan searches from here on.
            return Damage(start, self.offset, f"an extended header of {header.size} bytes")
        data = self._read(self.offset, header.size)
        self.offset += _padded(header.size)
        if header.kind == _LONG_NAME:
            self._next["path"] = data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
        elif header.kind != _LONG_LINK:  # targets of links are not needed
            keywords = _pax_keywords(data)
            if keywords is None:
                return Damage(start, self.offset, "an extended header that cannot be parsed")
            (self._all if header.kind == tarfile.XGLTYPE else self._next).update(keywords)
        return None

    def _zeros(self, start: int) -> Damage | None:
        """Skips zeros. Two blocks of them end a tar if nothing follows; otherwise they are damage."""
        self._next = {}
        self.offset = self._first(start, any)
        self._closed = self.offset >= self.end and self.end - start >= 2 * BLOCK
        if self.offset >= self.end:
            return None
        return Damage(start, self.offset, "zeros before further members: overwritten, or several tars in one file")

    def _resynchronize(self, start: int) -> Damage:
        """Skips blocks up to a valid header or the end. Then a missing mark of the end is not reported again."""
        self._next, self._closed = {}, True
        begin = self._read(start, len(_GZIP))
        self.offset = self._first(start, lambda block: parse_header(block) is not None)
        packed = "; it is compressed by gzip: unpack it" if start == 0 and begin == _GZIP else ""
        return Damage(start, self.offset, f"no valid header{packed}")

    def _first(self, start: int, wanted: Callable[[bytes], bool]) -> int:
        """Returns the offset of the first wanted block from `start` on, or the end."""
        while start < self.end:
            chunk = self._read(start, BLOCK * _CHUNK_BLOCKS)
            for place in range(0, len(chunk), BLOCK):
                if wanted(chunk[place : place + BLOCK]):
                    return start + place
            start += len(chunk)
        return self.end

    def _read(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(size)


def parse_header(block: bytes) -> Header | None:
    """Returns the header in a block, or None unless its checksum is valid."""
    return _usual_header(block) or any_header(block)


def any_header(block: bytes) -> Header | None:
    """Returns the same for every kind of header, by `tarfile`, which takes four times as long."""
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return None
    return Header(header.name, header.type, header.size)


def _usual_header(block: bytes) -> Header | None:
    """Returns the header of a regular file or of PAX keywords, or None if it is unusual or wrong."""
    found = _USUAL.fullmatch(block)
    if found is None:
        return None
    name, size, stored, kind = found.groups()
    # The checksum is the sum of all bytes, with spaces in its own place. Most bytes are zeros, which need no adding.
    if sum(block.translate(None, b"\0")) - sum(block[148:156]) + 8 * ord(" ") != int(stored, 8):
        return None
    return Header(name.partition(b"\0")[0].decode("utf-8", "surrogateescape"), kind, int(size, 8))


def _has_data(kind: bytes) -> bool:
    """Returns whether data follow a header of this type. Like tar, it treats unknown types as files."""
    return kind in (*tarfile.REGULAR_TYPES, tarfile.GNUTYPE_SPARSE) or kind not in tarfile.SUPPORTED_TYPES


def _pax_keywords(data: bytes) -> dict[str, str] | None:
    """Returns the keywords of a PAX header, whose records are "LENGTH KEY=VALUE\\n", or None if it is damaged."""
    keywords, place = {}, 0
    while place < len(data) and data[place]:
        digits, space, _ = data[place : place + 20].partition(b" ")
        length = _decimal(digits.decode("ascii", "replace"))
        if not space or not length or place + length > len(data):
            return None
        key, equals, value = data[place + len(digits) + 1 : place + length].partition(b"=")
        if not equals or not value.endswith(b"\n"):
            return None
        keywords[key.decode("utf-8", "surrogateescape")] = value[:-1].decode("utf-8", "surrogateescape")
        place += length
    return keywords


def _decimal(digits: str) -> int | None:
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) <= 20 else None


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
