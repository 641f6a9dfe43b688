"""Tests strict reading of input: misleading values are refused with their line."""

from types import SimpleNamespace

import pytest

from ecdit.errors import UserError
from ecdit.json_lines import is_number, json_text, read_lines, result_paths, shown, take, write_results


@pytest.fixture
def read(tmp_path):
    def lines(content):
        (tmp_path / "in.jsonl").write_bytes(content)
        return list(read_lines(tmp_path / "in.jsonl"))

    return lines


def test_a_line_has_its_number_and_empty_ones_are_skipped(read):
    assert read(b'{"a": 1}\r\n\n{"a": "caf\xc3\xa9"}') == [(1, {"a": 1}), (3, {"a": "caf\u00e9"})]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"a": 1', "is not JSON: "),
        (b'{"a": "\xff"}', "is not JSON: .*utf-8"),
        (b"[1]", r"\[1\]: must be a JSON object"),
        (b'{"a": 1} {"a": 2}', "is not JSON: Extra data"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": [-Infinity]}', "-Infinity is no number"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "the key 'b' stands twice"),
        (b"[" * 100000, "is not JSON: "),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not JSON: "),
    ],
)
def test_a_line_that_is_no_object_is_refused_with_its_number(read, line, said):
    with pytest.raises(UserError, match=rf"in.jsonl, line 2: {said}"):
        read(b'{"a": 0}\n' + line + b"\n")


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_file_without_lines_is_refused(read, content):
    with pytest.raises(UserError, match=r"in.jsonl: has no lines"):
        read(content)


def test_a_value_has_its_kind():
    values = {"text": "a", "number": 1, "truth": True}
    assert take(values, "text", str) == "a"
    with pytest.raises(UserError, match=r"^x.truth = True: must be an integer$"):
        take(values, "truth", int, "x.")
    with pytest.raises(UserError, match=r"^y is missing: must be a list; there is text, number, truth$"):
        take(values, "y", list)


@pytest.mark.parametrize("value", [True, "1", None, float("nan"), float("inf"), 10**400, []])
def test_no_numbers(value):
    assert not is_number(value)
    assert is_number(1)
    assert is_number(-1e300)


def test_long_values_are_cut_in_messages():
    assert shown("a" * 1000) == "'" + "a" * 76 + "..."
    assert shown([1]) == "[1]"


def test_a_result_that_is_no_number_is_not_written():
    with pytest.raises(UserError, match=r"a number that is not finite: .*not JSON compliant"):
        json_text({"overall": float("nan")})


def test_the_directory_of_a_result_is_made(tmp_path):
    write_results(tmp_path / "a/b/result.json", json_text({"a": None}))
    assert (tmp_path / "a/b/result.json").read_text() == '{\n  "a": null\n}\n'
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["result.json"]


def paths_of(*names, inputs=(), local=(), **values):
    return result_paths(SimpleNamespace(**values), *names, inputs=inputs, local=local)


def test_results_are_files_of_this_machine_or_objects_of_a_bucket(tmp_path):
    pytest.importorskip("gcsfs", reason="the extra gcs is not installed")
    found = paths_of("json", "save", "grid", json="gs://bucket/a/b.json", save=str(tmp_path / "new/b.npz"), grid=None)
    assert [None if path is None else str(path) for path in found] == [
        "gs://bucket/a/b.json",
        str(tmp_path / "new/b.npz"),
        None,
    ]
    with pytest.raises(UserError, match="--save=gs://bucket/b: must be a file of this machine"):
        paths_of("json", "save", json=None, save="gs://bucket/b", local=["save"])


def test_a_result_that_would_replace_a_file_of_the_command_is_refused(tmp_path, monkeypatch):
    """Under any name of it: answers of hours would be gone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "items.jsonl").write_text("{}")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "items.jsonl")
    for items, json_file in (("items.jsonl", f"{tmp_path}/items.jsonl"), ("a,link.jsonl", "./items.jsonl")):
        with pytest.raises(UserError, match=rf"--json={json_file}: is the file of --items too"):
            paths_of("json", json=json_file, items=items, inputs=["items"])
    with pytest.raises(UserError, match="--json=a: is the file of --out too, and would replace it"):
        paths_of("out", "json", out="a", json="a")
    with pytest.raises(UserError, match=r"cannot be written: it is a directory, and must be a file"):
        paths_of("json", json=str(tmp_path))
