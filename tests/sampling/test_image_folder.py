"""A folder of images is of one call; what is whole in it is kept, and nothing else."""

import dataclasses
import json

import numpy as np
import pytest

from ecdit.errors import UserError
from ecdit.sampling.grids import save_png
from ecdit.sampling.image_folder import (
    MANIFEST,
    alone_in,
    alone_in_empty,
    begin_folder,
    check_folder,
    finish_folder,
    is_finished,
)
from ecdit.sampling.layouts import Planned

SOURCE, MACHINE = {"step": 3, "sampling": {"seed": 1}}, {"device": "cpu"}


def planned(*prompts):
    return [Planned(f"{i:05d}.png", prompt, 0, "") for i, prompt in enumerate(prompts)]


def test_an_unfinished_folder_is_gone_on_with_by_the_same_call_alone(tmp_path):
    out = tmp_path / "out"
    begin_folder(out, planned("a"), SOURCE, MACHINE)
    begin_folder(out, planned("a"), SOURCE, MACHINE)
    other = {"step": 3, "sampling": {"seed": 2}}
    cases = [
        (planned("b"), SOURCE, r"images \(00000\.png: 'a' there, 'b' here\);"),
        (planned("a"), other, r"sampling\.seed \(1 there, 2 here\);"),
    ]
    for images, source, differs in cases:
        with pytest.raises(UserError, match=f"the unfinished images of another call, which differs in {differs}"):
            begin_folder(out, images, source, MACHINE)
    save_png(np.zeros((8, 8, 3), np.uint8), out / "00000.png")
    finish_folder(out, planned("a"))
    for images, source, differs in cases:
        with pytest.raises(UserError, match=f"the finished images of another call, which differs in {differs}"):
            begin_folder(out, images, source, MACHINE)


def test_a_finished_folder_stays_as_it_is_until_an_image_is_damaged(tmp_path):
    """What drew nothing is no machine of it either."""
    out = tmp_path / "out"
    begin_folder(out, planned("a"), SOURCE, MACHINE)
    save_png(np.zeros((8, 8, 3), np.uint8), out / "00000.png")
    finish_folder(out, planned("a"))
    manifest = (out / "manifest.json").read_bytes()
    begin_folder(out, planned("a"), SOURCE, {"device": "other"})
    assert (out / "manifest.json").read_bytes() == manifest
    (out / "00000.png").write_bytes((out / "00000.png").read_bytes()[:-1])
    begin_folder(out, planned("a"), SOURCE, {"device": "other"})
    again = json.loads((out / "manifest.json").read_text())
    assert (again["finished"], again["machines"]) == (False, [MACHINE, {"device": "other"}])


def test_a_refusal_says_how_the_images_differ(tmp_path):
    """By --repeats or --num_prompts, by an edited file of prompts, by a prompt before it, by a long prompt."""
    begin_folder(tmp_path / "out", planned("owl", "owl 2", "owl 3"), SOURCE, MACHINE)
    again = dataclasses.replace(planned("owl")[0], repeat=1)
    cases = {
        r"images \(3 there, 6 here\)": planned(*"abcdef"),
        r"images \(00001\.png: 'owl 2' there, 'owl' here\)": planned("owl", "owl", "owl 3"),
        r"images \(00000\.png: 'owl', repeat 0 there, 'owl', repeat 1 here\)": [
            again,
            *planned("owl", "owl 2", "owl 3")[1:],
        ],
        r"images \(00002\.png: 'owl 3' there, 'o{80}'\.\.\. \(10000 characters\) here\)": planned(
            "owl", "owl 2", 10**4 * "o"
        ),
    }
    for said, images in cases.items():
        with pytest.raises(UserError, match=said):
            begin_folder(tmp_path / "out", images, SOURCE, MACHINE)


def test_a_call_that_was_killed_while_it_wrote_its_first_file_is_begun_again(tmp_path):
    (tmp_path / f".{MANIFEST}.123.ab.tmp").write_text('{"images": [')
    assert check_folder(tmp_path) is None
    begin_folder(tmp_path, planned("a"), SOURCE, MACHINE)
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]


def test_a_run_that_has_moved_is_the_same_run(tmp_path):
    for place in ({"workdir": "runs/a"}, {"workdir": "/home/me/runs/a"}, {"folder": "a"}):
        begin_folder(tmp_path / "out", planned("a"), SOURCE | place, MACHINE)


def test_two_calls_do_not_draw_into_one_folder_at_once(tmp_path):
    """Each would remove what the other is writing."""
    busy = pytest.raises(UserError, match="another process is drawing into it")
    with alone_in(tmp_path), busy, alone_in(tmp_path):
        pass
    with alone_in(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_one_call_is_empty_and_nobody_else_s(tmp_path):
    """Two calls may both have found it empty, and drawn for an hour."""
    out = tmp_path / "new/out"
    with alone_in_empty(out):
        assert out.is_dir()
        with pytest.raises(UserError, match="another process is drawing into it"), alone_in_empty(out):
            pass
        (out / "00000.png").touch()
    with pytest.raises(UserError, match="holds other files; take an empty directory"), alone_in_empty(out):
        pass


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "00000.png").write_bytes(b"\x89PNG\r\n\x1a\nnone")
    with pytest.raises(UserError, match=r"00000\.png: cannot be read as an image"):
        finish_folder(tmp_path, planned("a"))


def test_the_machines_of_all_calls_are_kept(tmp_path):
    for device in ("cpu", "tpu", "cpu"):
        begin_folder(tmp_path / "out", planned("a"), SOURCE, {"device": device})
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["machines"] == [{"device": "cpu"}, {"device": "tpu"}]
    assert manifest["finished"] is False


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"images": []}'])
def test_a_manifest_of_another_kind_is_other_files(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="holds other files"):
        check_folder(tmp_path)


def test_an_image_is_finished_if_it_is_whole(tmp_path):
    whole = tmp_path / "a.png"
    save_png(np.zeros((8, 8, 3), np.uint8), whole)
    assert is_finished(whole)
    data = whole.read_bytes()
    parts = {"cut": data[:-1], "start": data[:4], "empty": b"", "no png": b"x" + data[1:], "longer": data + b"x"}
    parts["without its middle"] = data[:50] + data[54:]
    parts["with another byte"] = data[:50] + bytes([data[50] ^ 1]) + data[51:]
    for name, part in parts.items():
        (tmp_path / name).write_bytes(part)
        assert not is_finished(tmp_path / name), name
    assert not is_finished(tmp_path / "missing")


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    begin_folder(tmp_path / "out", planned("a"), SOURCE, MACHINE)
    scratch = tmp_path / "out" / "00000" / ".0000.png.12.abcd.tmp"
    scratch.parent.mkdir()
    scratch.write_bytes(b"half")
    begin_folder(tmp_path / "out", planned("a"), SOURCE, MACHINE)
    assert not scratch.exists()


def test_an_image_of_another_size_is_named_with_both_sizes(tmp_path):
    begin_folder(tmp_path / "out", planned("a", "b"), SOURCE, MACHINE)
    save_png(np.zeros((8, 8, 3), np.uint8), tmp_path / "out" / "00000.png")
    save_png(np.zeros((4, 5, 3), np.uint8), tmp_path / "out" / "00001.png")
    with pytest.raises(UserError, match=r"00001\.png: is 5 x 4, .*00000\.png is 8 x 8 px: delete the one"):
        finish_folder(tmp_path / "out", planned("a", "b"))


def test_a_folder_that_lacks_an_image_is_not_finished(tmp_path):
    begin_folder(tmp_path / "out", planned("a", "b"), SOURCE, MACHINE)
    save_png(np.zeros((8, 8, 3), np.uint8), tmp_path / "out" / "00000.png")
    with pytest.raises(UserError, match=r"00001\.png is missing: all processes must see"):
        finish_folder(tmp_path / "out", planned("a", "b"))
    assert check_folder(tmp_path / "out")["finished"] is False
