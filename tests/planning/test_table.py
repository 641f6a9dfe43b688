"""The table of plans in a markdown file."""

import pytest

from ecdit.errors import UserError
from ecdit.planning.table import BEGIN, END, row, write_rows
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
    with pytest.raises(UserError, match="needs the lines"):
        write_rows(tmp_path / "README.md", {})
    with pytest.raises(UserError, match="No such file"):
        write_rows(tmp_path / "nothing.md", {})


def test_the_family_s_plans_are_configs_and_their_table_has_a_place():
    assert {name for name, *_ in config_file("ec_dit_plans").PLANS} <= set(config_file("ec_dit").names())
    text = (ROOT / "configs" / "README.md").read_text()
    assert BEGIN in text
    assert END in text
