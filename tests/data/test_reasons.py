"""Tests that each reason of the table can occur, by the code that is meant to give it, and that no other can."""

import tarfile
from pathlib import Path

import pytest
from PIL import Image

from ecdit.data import reasons
from ecdit.data.filters import Filters, caption_reason, column_reason, size_reason
from ecdit.data.images import ImageRejected, decode
from ecdit.data.sources.protocol import Rejected
from ecdit.data.sources.tables import Table
from ecdit.data.sources.tars import Tars
from tests.data.broken import animated, encoded, member, noise, rotated, sample, tar_of, with_size

IMAGE = encoded()
FILTERS = Filters(min_side=8, max_aspect=2.0, min_caption=2, max_caption=4, columns={"a": (0, 1)})

TARS = {
    "damaged tar": b"",
    "unsafe name": tar_of(member("/a.jpg")),
    "not a file": tar_of(member("a.jpg", kind=tarfile.SYMTYPE)),
    "sparse member": tar_of(member("a.jpg", pax_headers={"GNU.sparse.major": "1"}), form=tarfile.PAX_FORMAT),
    "too large": tar_of(member("a.jpg", bytes(2000))),
    "duplicate member": tar_of(*sample("a", IMAGE), *sample("a", IMAGE)),
    "bad JSON": tar_of(*sample("a", IMAGE), member("a.json", b"{")),
    "not UTF-8": tar_of(*sample("a", IMAGE, b"\xff")),
    "no image": tar_of(member("a.txt", b"x")),
    "no caption": tar_of(member("a.jpg", IMAGE)),
    "empty caption": tar_of(*sample("a", IMAGE, "")),
    "predicate": tar_of(*sample("a", IMAGE)),
}
IMAGES = {
    "unknown format": b"x",
    "undecodable": b"\xff\xd8\xff",
    "truncated": encoded(noise(64, 64))[:-500],
    "zero-sized": with_size(encoded(kind="png"), 0, 1),
    "too many pixels": encoded(noise(100, 100)),
    "colour mode": encoded(Image.new("CMYK", (8, 8))),
    "transparency": encoded(noise(8, 8, 4), "png"),
    "animated": animated(),
    "orientation": rotated(),
}
FILTERED = {
    "too small": lambda: size_reason(FILTERS, 7, 9),
    "aspect ratio": lambda: size_reason(FILTERS, 8, 17),
    "caption too short": lambda: caption_reason(FILTERS, "a"),
    "caption too long": lambda: caption_reason(FILTERS, "abcde"),
    "no column NAME": lambda: column_reason(FILTERS, {}),
    "column NAME": lambda: column_reason(FILTERS, {"a": 2}),
}


def refuse(pair):
    return False


@pytest.mark.parametrize("reason", TARS)
def test_reasons_of_tars(tmp_path, reason):
    (tmp_path / "a.tar").write_bytes(TARS[reason])
    source = Tars(str(tmp_path / "a.tar"), refuse, max_member_bytes=1999)
    assert [record.reason for record in source.read("a.tar") if isinstance(record, Rejected)] == [reason]


def test_the_reason_of_a_table(tmp_path):
    (tmp_path / "a.csv").write_text("file,caption\na.jpg\n")
    table = Table(str(tmp_path / "a.csv"))
    assert [record.reason for record in table.read(table.parts()[0])] == ["bad row"]


@pytest.mark.parametrize("reason", IMAGES)
def test_reasons_of_images(reason):
    with pytest.raises(ImageRejected) as caught:
        decode(IMAGES[reason], "", 64 * 64)
    assert caught.value.reason == reason


@pytest.mark.parametrize("reason", FILTERED)
def test_reasons_of_filters(reason):
    assert reasons.entry(FILTERED[reason]()) == reason


def test_these_are_all_reasons():
    assert {*TARS, "bad row", *IMAGES, *FILTERED} == set(reasons.REASONS)


def test_the_page_has_the_table_as_it_is():
    text = (Path(__file__).parents[2] / "docs" / "data_sources.md").read_text(encoding="utf-8")
    for reason, meaning in reasons.REASONS.items():
        assert f"| {reason} | {meaning} |" in text
