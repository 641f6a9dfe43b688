"""Tests folders of images with CSV or JSON lines."""

import json
import os
import pickle

import pytest

from ecdit.data import DataError
from ecdit.data.sources.protocol import Pair, Rejected
from ecdit.data.sources.tables import Table
from tests.data.broken import encoded

IMAGE = encoded()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data" / "cats").mkdir(parents=True)
    for name in ("a.jpg", "b.png", "cats/c.jpg"):
        (tmp_path / "data" / name).write_bytes(IMAGE)
    return tmp_path / "data"


def csv_table(folder, text, **options):
    (folder / "pairs.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return Table(str(folder / "pairs.csv"), **options)


def json_table(folder, *rows, **options):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "pairs.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return Table(str(folder / "pairs.jsonl"), **options)


def read(source):
    return [record for part in source.parts() for record in source.read(part)]


def test_csv_gives_captions_and_numbers(folder):
    text = (
        '\ufefffile,caption,aesthetic,width,note\r\na.jpg,"a ""cat"",\nasleep",6.5,12,x\r\n\r\ncats/c.jpg, c ,,1e3,\r\n'
    )
    assert read(csv_table(folder, text)) == [
        Pair("a", IMAGE, {"caption": 'a "cat",\nasleep'}, {"aesthetic": 6.5, "width": 12, "note": "x"}),
        Pair("cats/c", IMAGE, {"caption": "c"}, {"aesthetic": None, "width": 1000.0, "note": None}),
    ]


def test_json_lines_give_captions_and_values(folder):
    row = {"file": "a.jpg", "caption": ["one", "two"], "re": "x", "score": 1, "ok": True, "more": [1]}
    assert read(json_table(folder, row, "", captions=("caption", "re"))) == [
        Pair("a", IMAGE, {"caption.0": "one", "caption.1": "two", "re": "x"}, {"score": 1, "ok": True})
    ]


def test_a_column_key_is_the_key(folder):
    (pair,) = read(csv_table(folder, "key,file,caption\n7,a.jpg,x\n"))
    assert (pair.key, pair.columns) == ("7", {})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("missing.jpg,x", "no image"),
        (",x", "no image"),
        ("../secret.jpg,x", "unsafe name"),
        ("/etc/passwd,x", "unsafe name"),
        ("link.jpg,x", "unsafe name"),
        ("a.jpg,x,y", "bad row"),
        ("a.jpg", "bad row"),
        ('a.jpg,"x"y', "bad row"),
        ("a.jpg," + "x" * 200_000, "bad row"),
        ("a.jpg," + "x" * (2 << 20), "bad row"),
        ("a.jpg,", "empty caption"),
        ("cats,x", "not a file"),
        (".,x", "not a file"),
        ("large.jpg,x", "too large"),
        (b"a.jpg,\xff", "not UTF-8"),
        (b"a\0.jpg,x", "unsafe name"),
    ],
)
def test_bad_rows_are_rejected_by_number_and_the_others_are_read(folder, row, reason):
    (folder.parent / "secret.jpg").write_bytes(IMAGE)
    (folder / "link.jpg").symlink_to(folder.parent / "secret.jpg")
    (folder / "large.jpg").write_bytes(bytes(2000))
    row = row if isinstance(row, bytes) else row.encode()
    first, rejected, last = read(
        csv_table(folder, b"file,caption\na.jpg,x\n" + row + b"\nb.png,y\n", max_image_bytes=1999)
    )
    assert (first.key, last.key) == ("a", "b")
    assert (rejected.name, rejected.reason) == ("pairs.csv:row 2", reason), rejected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "bad JSON"),
        ("[1]", "bad JSON"),
        ({"file": "a.jpg"}, "no caption"),
        ({"file": 3, "caption": "x"}, "no image"),
        ({"file": "a.jpg", "caption": "\ud800"}, "not UTF-8"),
        ({"file": "\ud800.jpg", "caption": "x"}, "not UTF-8"),
        ({"file": "a.jpg", "caption": "x", "key": None}, "unsafe name"),
    ],
)
def test_bad_json_rows(folder, row, reason):
    rejected, pair = read(json_table(folder, row, {"file": "a.jpg", "caption": "x"}))
    assert (rejected.name, rejected.reason, pair.key) == ("pairs.jsonl:row 1", reason, "a")


def test_parts_begin_at_their_rows_whatever_is_quoted(folder):
    rows = [f'a.jpg,"row\n{number}"' for number in range(5)]
    rows[2] = 'a.jpg,"bad"x'
    text = "file,caption\n" + "\n".join(rows) + "\n"
    whole, parted = read(csv_table(folder, text)), csv_table(folder, text, rows_per_part=2)
    assert parted.parts() == ("rows-000000000001", "rows-000000000003", "rows-000000000005")
    assert read(pickle.loads(pickle.dumps(parted))) == whole
    assert [type(record) for record in whole] == [Pair, Pair, Rejected, Pair, Pair]
    assert read(csv_table(folder, text, rows_per_part=1)) == whole


def test_the_stamp_changes_with_the_rows_and_the_images(folder):
    table = csv_table(folder, "file,caption\na.jpg,x\nb.png,y\n", rows_per_part=1)
    before = [table.stamp(part) for part in table.parts()]
    os.utime(folder / "b.png", ns=(1, 1))
    after = [table.stamp(part) for part in table.parts()]
    assert (after[0] == before[0], after[1] == before[1]) == (True, False)
    longer = csv_table(folder, "file,caption\na.jpg,z\nb.png,y\nb.png,y\n", rows_per_part=1)
    assert longer.stamp(longer.parts()[0]) != before[0]
    assert longer.stamp(longer.parts()[1]) == after[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,text\na.jpg,x\n", "no column 'caption'; it has file, text"),
        ("file,caption,file\na.jpg,x,y\n", "a column twice"),
        ("file,caption\n", "no rows"),
        ("", "no column 'file'"),
    ],
)
def test_tables_that_cannot_be_used(folder, text, message):
    with pytest.raises(DataError, match=message):
        csv_table(folder, text).parts()


def test_other_errors_of_setup(folder):
    with pytest.raises(DataError, match=r"cannot read .*none.csv"):
        Table(str(folder / "none.csv")).parts()
    with pytest.raises(DataError, match=r"must be a .csv or a .jsonl"):
        Table(str(folder / "pairs.txt")).parts()
    with pytest.raises(DataError, match="rows_per_part = 0"):
        csv_table(folder, "file,caption\na.jpg,x\n", rows_per_part=0).parts()
    with pytest.raises(DataError, match="no part 'x'"):
        list(csv_table(folder, "file,caption\na.jpg,x\n").read("x"))
