"""Tests that files are written atomically."""

import os
import threading

import pytest

from ecdit import files
from ecdit.errors import UserError
from ecdit.files import replace_bytes, replace_text

LONG = 300_000  # characters: more than one write of the kernel's


def test_two_writers_of_a_file_tear_nothing(tmp_path):
    """Each text is of one letter; a shared temporary file mixed them."""
    path, found, stop = tmp_path / "file", set(), threading.Event()
    replace_text(path, "a" * LONG)

    def write(letter):
        while not stop.is_set():
            replace_text(path, letter * LONG)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "ab"]
    for thread in threads:
        thread.start()
    try:
        for _ in range(300):
            text = path.read_text()
            found.add((len(text), "".join(sorted(set(text)))))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert found <= {(LONG, "a"), (LONG, "b")}
    assert os.listdir(tmp_path) == ["file"]


def test_contents_are_on_the_disk_before_the_name_and_the_name_before_it_returns(tmp_path, monkeypatch):
    """Else a power failure could leave the name with an empty file, or the old one after the new was relied on."""
    done = []
    monkeypatch.setattr(files.os, "fsync", lambda n: done.append(("sync", os.readlink(f"/proc/self/fd/{n}"))))
    replace = os.replace
    monkeypatch.setattr(files.os, "replace", lambda old, new: (done.append(("replace", str(old))), replace(old, new)))
    replace_bytes(tmp_path / "file", b"new")
    scratch = done[0][1]
    assert done == [("sync", scratch), ("replace", scratch), ("sync", str(tmp_path))]


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("old")

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match=rf"writing {tmp_path}/file failed: No space left"):
        replace_text(tmp_path / "file", "new")
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"
