"""Tests emoji in several styles: drawings, captions, the held-out rule, and fetching the sets."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecdit.data import DataError, emoji_packages
from ecdit.data.emoji_packages import STYLES, fetch
from ecdit.data.emoji_styles import DIRECTORY, EmojiStyles, _icons, always_trained, hyphenated, style_and_name
from ecdit.data.prepared import prepare, stored_records
from ecdit.data.sources.protocol import Rejected
from ecdit.data.splits import place_of
from tests.data.example import make_config

RED = '<path fill="#f00" d="M0 0h16v16H0z"/>'
ICONS = {
    "noto": {"hot-dog": {"body": RED}, "owl": {"body": '<path fill="currentColor" d="M0 0h16v16H0z"/>'}},
    "twemoji": {
        "hot-dog": {"body": RED.replace("v16", "v8"), "height": 8},
        "owl": {"body": "<path"},
        "no-such-emoji": {"body": RED},
    },
}


@pytest.fixture
def sets(tmp_path):
    """Two sets of a few squares, as `fetch` leaves them."""
    for style, icons in ICONS.items():
        place = tmp_path / "sets" / style
        place.mkdir(parents=True)
        (place / "icons.json").write_text(json.dumps({"icons": icons, "width": 16, "height": 16}))
        info = {"name": style.title(), "author": {"name": "A"}, "license": {"title": f"L-{style}", "spdx": "L"}}
        (place / "info.json").write_text(json.dumps(info))
        (place / "package.json").write_text(json.dumps({"version": STYLES[style].version}))
    return tmp_path / "sets"


def pixels(pair):
    return np.asarray(Image.open(io.BytesIO(pair.image)).convert("RGBA"))


def test_icons_are_drawn_and_named(sets):
    source = EmojiStyles(str(sets), ("noto", "twemoji"))
    dog, owl = source.read("noto")
    assert (dog.key, dog.captions) == ("noto/hot-dog", {"caption": "hot dog, in the style of Noto"})
    assert (dog.columns, pixels(dog).shape) == ({"style": "noto", "name": "hot dog"}, (128, 128, 4))
    assert pixels(dog)[64, 64].tolist() == [255, 0, 0, 255]
    assert pixels(owl)[64, 64].tolist() == [0, 0, 0, 255]  # without a colour of its own
    flat, broken = source.read("twemoji")
    assert pixels(flat)[[16, 64, 112], 64, 3].tolist() == [0, 255, 0]  # 16 x 8, centred in a square
    assert isinstance(broken, Rejected)
    assert (broken.name, broken.reason) == ("twemoji/owl", "undecodable")
    assert "L-noto" in source.attribution
    assert "L-twemoji" in source.attribution


def test_a_missing_set_names_the_command(sets):
    (sets / "noto" / "package.json").write_text('{"version": "0.0.1"}')
    with pytest.raises(DataError, match=r"lacks the emoji sets noto .*python -m ecdit\.fetch_emoji_styles --out="):
        EmojiStyles(str(sets), ("noto", "twemoji")).parts()


def test_every_name_and_style_keeps_a_pair_whatever_share_is_held_out():
    found = {style: {f"n{i}" for i in range(40) if (i + place) % 3} for place, style in enumerate(("a", "b", "c"))}
    found |= {"d": {"n0"}, "a": found["a"] | {"alone"}}
    keys = {f"{style}/{name}" for style in found for name in found[style]}
    kept = always_trained(found)
    assert "a/alone" in kept
    for share in (0.1, 0.5, 0.9, 0.999):
        trained = {key for key in keys if key in kept or place_of(key) >= share}
        for part in range(2):
            assert {key.split("/")[part] for key in trained} == {key.split("/")[part] for key in keys}
    spared = {key for key in keys if place_of(key) < 0.5} & kept
    assert spared, "a case of the rule"
    for key in spared:  # no other pair of its name, or of its style, is trained on
        alike = [{one for one in keys if one.split("/")[part] == key.split("/")[part]} for part in range(2)]
        assert any(all(place_of(one) < 0.5 for one in group) for group in alike)


def test_prepared_records_follow_the_rule(sets, tmp_path):
    """With nearly all held out, exactly the pairs that are always trained on are left to train on."""
    (sets / "twemoji" / "icons.json").write_text(
        json.dumps({"icons": {**ICONS["twemoji"], "owl": {"body": RED}}, "width": 16, "height": 16})
    )
    file = tmp_path / "own.py"
    source = f"EmojiStyles({str(sets)!r}, ('noto', 'twemoji'))"
    file.write_text(
        "from ecdit.data.emoji_styles import EmojiStyles\nfrom ecdit.data.tasks import add_task\n"
        f"add_task('own_styles', {source})\nadd_task('own_mapped', {source}, [lambda dataset: dataset])\n"
    )
    found = {style: {"hot-dog", "owl"} for style in ("noto", "twemoji")}
    for task in ("own_styles", "own_mapped"):  # the second one by TensorFlow
        config = make_config(
            tmp_path / "data",
            module=str(file),
            task=task,
            vocab_size=300,
            caption_length=40,
            prepare={"held_out": 0.999},
        )
        done = prepare(config, say=lambda _: None)
        assert {record.key for record in stored_records(done, "train")} == always_trained(found)
        everything = [one.key for split in ("train", "held_out") for one in stored_records(done, split)]
        assert sorted(everything) == sorted(f"{style}/{name}" for style in found for name in found[style])


def test_the_real_sets_hold_out_a_tenth_of_known_names():
    if not Path(DIRECTORY).is_dir():
        pytest.skip("the emoji sets are not fetched")
    found = {style: set(_icons(DIRECTORY, style)["icons"]) for style in EmojiStyles().parts()}
    kept = always_trained(found)
    keys = [f"{style}/{name}" for style in found for name in found[style]]
    held_out = {key for key in keys if place_of(key) < 0.1} - kept
    assert 0.09 < len(held_out) / len(keys) < 0.11
    trained = {key.split("/")[1] for key in set(keys) - held_out}
    assert {key.split("/")[1] for key in held_out} <= trained


def test_names_are_hyphenated_as_the_sets_do():

    assert hyphenated("woman\N{RIGHT SINGLE QUOTATION MARK}s sandal") == "womans-sandal"
    assert hyphenated("keycap: *") == "keycap-asterisk"
    assert hyphenated("piñata") == "pinata"
    assert hyphenated("AB button (blood type)") == "ab-button-blood-type"


def test_keys_of_other_data_have_no_style():
    assert style_and_name("noto-v1/hot-dog") == ("noto-v1", "hot-dog")
    assert [style_and_name(key) for key in ("1f600", "noto", "00012/000120034")] == [None] * 3


def test_fetching_without_npm_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="needs npm"):
        fetch(tmp_path / "out", lambda _: None)


def fake_npm(tmp_path, monkeypatch, script):
    program = tmp_path / "bin" / "npm"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def test_another_tarball_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    fake_npm(tmp_path, monkeypatch, 'for one; do case "$one" in --pack-d*) echo hi > "${one#*=}/a.tgz";; esac; done')
    with pytest.raises(DataError, match=r"has the sha512 .*, not DQiuXENb"):
        fetch(tmp_path / "out", lambda _: None)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_failing_npm_is_quoted(tmp_path, monkeypatch):
    fake_npm(tmp_path, monkeypatch, "echo no route to the registry >&2; exit 7")
    with pytest.raises(DataError, match="exit code 7: no route to the registry"):
        fetch(tmp_path / "out", lambda _: None)


def test_versions_are_pinned():
    assert len(STYLES) == 9
    assert emoji_packages.is_fetched(Path("nowhere"), STYLES["noto"]) is False
