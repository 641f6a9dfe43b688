"""Tests that the quarantine file consists of ASCII lines of JSON that restore the written values."""

import json

import pytest

from ecdit.data import DataError
from ecdit.data.quarantine import Quarantine, merge, read
from ecdit.data.sources.protocol import Rejected

NASTY = 'a\x1b[31m\x07\x7f\x00\n\r\u2028\udcff\ud800‮é😀"\\/../'


def write(path, *rejected):
    with Quarantine(path) as quarantine:
        for one in rejected:
            quarantine.add(one)
    return quarantine


def test_lines_are_printable_ascii_and_read_back(tmp_path):
    rejected = [Rejected(NASTY, "no image", NASTY), Rejected("b", "no column aesthetic", "")]
    write(tmp_path / "q", *rejected)
    data = (tmp_path / "q").read_bytes()
    assert set(data) <= {*range(0x20, 0x7F), 0x0A}
    assert [json.loads(line)["name"] for line in data.splitlines()] == [NASTY, "b"]
    assert list(read(tmp_path / "q")) == rejected


def test_reasons_are_counted(tmp_path):
    quarantine = write(tmp_path / "q", *[Rejected("a", reason, "") for reason in ("animated", "truncated", "animated")])
    assert quarantine.counts == {"animated": 2, "truncated": 1}


def test_files_are_merged_in_order_with_their_counts(tmp_path):
    write(tmp_path / "1", Rejected("one", "animated", ""), Rejected("two", "truncated", ""))
    write(tmp_path / "2")
    write(tmp_path / "3", Rejected("three", "truncated", ""))
    counts = merge([tmp_path / name for name in "321"], tmp_path / "all")
    assert list(counts.items()) == [("truncated", 2), ("animated", 1)]
    assert [rejected.name for rejected in read(tmp_path / "all")] == ["three", "one", "two"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3", "all"]


def test_a_part_that_is_written_again_replaces_what_was_there(tmp_path):
    write(tmp_path / "q", Rejected("one", "animated", ""))
    write(tmp_path / "q", Rejected("two", "animated", ""))
    assert [rejected.name for rejected in read(tmp_path / "q")] == ["two"]


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '"name"', '{"name": "a"}', '{"name": "a", "reason": "ugly", "detail": ""}', '{"name": "é"}']
    + ['{"name": "a", "reason": "animated", "detail": "", "more": 1}'],
)
def test_a_damaged_line_is_an_error_that_names_it(tmp_path, line):
    write(tmp_path / "q", Rejected("one", "animated", ""))
    with (tmp_path / "q").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match="damaged"):
        list(read(tmp_path / "q"))


def test_only_reasons_of_the_table_can_be_given():
    with pytest.raises(ValueError, match="'ugly' is not in"):
        Rejected("a", "ugly", "")
