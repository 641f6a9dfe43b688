"""Tests that headers of tars which are read without `tarfile` say what `tarfile` says."""

import random
import subprocess
import tarfile

import pytest

from ecdit.data.sources import archive

NAMES = ["a.jpg", "0/1.txt", "", "/", "a/", "ß" * 49, "x" * 99, "x" * 100, "d" * 60 + "/" + "x" * 90]
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def with_checksum(block: bytes, wrong: int = 0, style: bytes = b"%06o\0 ") -> bytes:
    total = sum(block[:148]) + sum(block[156:]) + 8 * ord(" ") + wrong
    return block[:148] + style % total + block[156:]


def blocks() -> list[bytes]:
    """Returns headers of every kind of member, which `tarfile` writes."""
    found = []
    for name in NAMES:
        for kind in (*tarfile.SUPPORTED_TYPES, b"V"):
            for form in FORMATS:
                info = tarfile.TarInfo(name)
                info.type, info.size, info.mtime = kind, 123456, 1.7e9
                data = info.tobuf(form)
                found += [data[place : place + 512] for place in range(0, len(data), 512)]
    return found


def test_the_fast_reading_of_headers_agrees_with_tarfile():
    chance, whole, fast = random.Random(0), 0, 0
    for block in blocks():
        cases = [block, block[:-1], with_checksum(block, wrong=1), with_checksum(block, style=b"%07o\0")]
        for _ in range(20):
            changed = bytearray(block)
            for _ in range(chance.randint(1, 4)):
                changed[chance.randrange(400)] = chance.choice(
                    [0, 9, 32, 48, 55, 56, 0x80, 0xFF, chance.randrange(256)]
                )
            cases += [bytes(changed), with_checksum(bytes(changed))]
        for case in cases:
            expected = archive.any_header(case)
            assert archive.parse_header(case) == expected, case
            whole += expected is not None
            fast += archive._usual_header(case) is not None
    assert whole > 10_000
    assert fast > 500


GNU = b"GNU tar" in subprocess.run(["tar", "--version"], check=True, capture_output=True).stdout


@pytest.mark.parametrize(
    "writer", ["tarfile", pytest.param("tar", marks=pytest.mark.skipif(not GNU, reason="tar is not GNU's"))]
)
def test_files_that_programs_write_are_read_the_fast_way(writer, tmp_path, monkeypatch):
    (tmp_path / "0").mkdir()
    for name in ("1.jpg", "1.txt", "2.json"):
        (tmp_path / "0" / name).write_bytes(name.encode() * 1000)
    path = tmp_path / "found.tar"
    if writer == "tar":
        options = ["--format=gnu", "--owner=0", "--group=0", f"--directory={tmp_path}", f"--file={path}"]
        command = ["tar", "--create", *options, "0/1.jpg", "0/1.txt", "0/2.json"]
        subprocess.run(command, check=True)
    else:
        with tarfile.open(path, "w") as tar:
            for name in ("0/1.jpg", "0/1.txt", "0/2.json"):
                tar.add(tmp_path / name, name)
    monkeypatch.setattr(archive, "any_header", lambda _: pytest.fail("read by tarfile"))
    with path.open("rb") as file:
        found = list(archive.scan(file))
    assert [(one.name, one.kind, one.size) for one in found] == [
        ("0/1.jpg", tarfile.REGTYPE, 5000),
        ("0/1.txt", tarfile.REGTYPE, 5000),
        ("0/2.json", tarfile.REGTYPE, 6000),
    ]
