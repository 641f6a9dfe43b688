"""Tests the table of plans in a markdown file."""

import re

import pytest

from ecdit.errors import UserError
from ecdit.planning.table import BEGIN, END, known_better, row, write_rows
from ecdit.topology import find_slice
from tests.launch.jobs import experiment
from tests.runs import ROOT, config_file

VALUES = {
    "topology": "v5p:4x4x8",
    "hbm_bytes_per_device": 41.26e9,
    "hbm_limit": 95e9,
    "estimated_step_seconds": 0.8855,
    "seconds_all_hidden": 0.8,
    "seconds_none_hidden": 1.0361,
    "estimated_mfu": 0.4099,
    "images_per_second": 4628.4,
    "days": 8.23,
}
ROW = "| M-64E | v5p:4x4x8 | 0.0.52 | 41.3 of 95 | 0.885 | 0.800, 1.036 | 41.0% | 4,628 | 8.2 |"


def test_a_row_by_hand():
    assert row("M-64E", VALUES, "0.0.52") in (ROW, ROW.replace("0.885", "0.886"))
    missing = row("M-64E", {"fits": False, "topology": "v4:2x2x1"}, "0.0.52")
    assert missing == "| M-64E | v4:2x2x1 | 0.0.52 | does not fit | | | | | |"


def test_rows_are_replaced_and_the_rest_of_the_file_stays(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n\n{BEGIN}\n{END}\n\nafter | all\n")
    write_rows(path, {("A", "x", "1"): "| A | x | 1 | 10 |", ("B", "x", "1"): "| B | x | 1 | 20 |"})
    write_rows(path, {("A", "x", "1"): "| A | x | 1 | 30 |", ("A", "x", "2"): "| A | x | 2 | 40 |"})
    lines = path.read_text().splitlines()
    assert lines[:3] == ["before", "", BEGIN]
    assert [line for line in lines if line.startswith(("| A", "| B"))] == [
        "| A | x | 1 | 30 |",
        "| B | x | 1 | 20 |",
        "| A | x | 2 | 40 |",
    ]
    assert lines.count("|---|---|---|---|---|---|---|---|---|") == 1
    assert lines[-3:] == [END, "", "after | all"]


@pytest.mark.parametrize("text", ["", BEGIN, END])
def test_a_file_without_marks_is_refused(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(UserError, match="must have the lines"):
        write_rows(tmp_path / "README.md", {})
    with pytest.raises(UserError, match="No such file"):
        write_rows(tmp_path / "nothing.md", {})


def test_the_family_s_plans_are_configs_and_their_table_has_a_place():
    assert {name for name, *_ in config_file("ec_dit_plans").PLANS} <= set(config_file("ec_dit").names())
    text = (ROOT / "configs" / "README.md").read_text()
    assert BEGIN in text
    assert END in text


TABLE = f"""{BEGIN}
| config | slice | libtpu | GB a device | s a step | if all, no communication hidden | MFU | images/s | days |
|---|---|---|---|---|---|---|---|---|
| XL-32E, mesh.expert=16 | v5p:4x4x4 | 0.0.9 | 1 of 95 | 0.900 | | | | |
| XL-32E | v5p:4x4x4 | 0.0.9 | 1 of 95 | 0.100 | | | | |
| XL-32E | v5p:4x4x4 | 0.0.10 | 1 of 95 | 0.300 | | | | |
| XL-32E, mesh.expert=16 | v5p:4x4x4 | 0.0.10 | 1 of 95 | 0.250 | | | | |
| XL-32E, mesh.expert=2 | v5p:4x4x4 | 0.0.10 | does not fit | | | | | |
| XL-16E, mesh.expert=8 | v5p:4x4x4 | 0.0.10 | 1 of 95 | 0.200 | | | | |
| XL-32E, mesh.expert=2 | v4:4x4x4 | 0.0.10 | 1 of 95 | 0.100 | | | | |
{END}
"""


@pytest.mark.parametrize(
    ("slice_", "overrides", "told"),
    [
        ("v5p:4x4x4", {}, True),
        ("v5p:4x4x8", {}, True),  # the table has no row of this slice, but of its chips
        ("v5p:4x4x4", {"mesh.expert": 16}, False),  # it is the best known
        ("v5p:4x4x4", {"mesh.expert": 8}, False),  # how long this takes is not known
        ("v5p:2x2x2", {}, False),  # eight devices have no axis of 16
        ("v5p:8x8x8", {}, False),  # a width of 1152 does not divide over 32 x 16
        ("v6e:4x4", {}, False),
    ],
)
def test_a_layout_that_the_table_knows_to_be_faster_is_told(tmp_path, slice_, overrides, told):
    """Of the newest compiler's rows (0.0.10 is newer than 0.0.9), of the same config and chips."""
    (tmp_path / "README.md").write_text(TABLE)
    origin = {"config": f"{tmp_path}/ec_dit.py:XL-32E", "overrides": overrides}
    found = known_better(
        origin,
        experiment("XL-32E", **{key.replace(".", "__"): value for key, value in overrides.items()}),
        find_slice(slice_),
    )
    expected = f"--config.mesh.expert=16: {tmp_path}/README.md has 0.250 s a step on v5p:4x4x4, and 0.300 s as asked"
    assert found == (expected if told else "")


def test_nothing_is_known_without_a_table(tmp_path):
    origin = {"config": f"{tmp_path}/ec_dit.py:XL-32E", "overrides": {}}
    assert known_better(origin, experiment("XL-32E"), find_slice("v5p:4x4x4")) == ""


def test_the_readmes_own_launch_is_the_fastest_that_its_table_knows():
    text = (ROOT / "README.md").read_text()
    (line,) = re.findall(r"python -m launch.tpu --config=configs/ec_dit.py:XL-32E (.*)", text)
    overrides = {key: int(value) for key, value in re.findall(r"--config\.(mesh\.\w+)=(\d+)", line)}
    origin = {"config": "configs/ec_dit.py:XL-32E", "overrides": overrides}
    where = find_slice(re.search(r"--accelerator=(\S+)", line).group(1))
    asked = experiment("XL-32E", **{key.replace(".", "__"): value for key, value in overrides.items()})
    assert known_better(origin, asked, where) == ""
    assert "mesh.expert=16" in known_better(origin | {"overrides": {}}, experiment("XL-32E"), where)
