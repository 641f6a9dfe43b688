"""The table of the paper's numbers beside ours: what is read, and what is said of what is missing."""

import json
import os
import time

import pytest

from ecdit.commands import paper
from ecdit.commands.paper import Row, coco, read_results, table
from ecdit.errors import UserError
from tests.evaluation.test_scorer_commands import run

TASKS = {"two_object": 0.25, "color_attr": 0.125, "position": 0.75, "single_object": 1, "counting": 0.5, "colors": 0.5}
GENEVAL = {"overall": 0.5, "tasks": TASKS}


def test_results_stand_beside_the_paper_s_numbers(tmp_path):
    (tmp_path / "geneval.json").write_text(json.dumps(GENEVAL))
    (tmp_path / "dsg.json").write_text('{"overall": 0.7, "items": {}}')
    (tmp_path / "fid.json").write_text('{"frechet": 12.5, "samples": 5000, "extractor": "Inception, clean-fid"}')
    rows = {row.name: row for row in read_results(tmp_path)}
    os.utime(tmp_path / "geneval.json", (86_400 * 20_000,) * 2)
    rows = {row.name: row for row in read_results(tmp_path)}
    of = f"{tmp_path}/geneval.json of {time.strftime('%Y-%m-%d', time.localtime(86_400 * 20_000))}"
    assert rows["GenEval, overall, %"] == Row("GenEval, overall, %", "71.68 (abstract)", 50.0, of)
    ours = [rows[f"GenEval, {name}, %"].ours for name in ("two objects", "colour attribution", "position")]
    assert ours == [25.0, 12.5, 75.0]
    assert rows["DSG, %"].ours == pytest.approx(70)
    assert "judge is not public" in rows["DSG, %"].missing
    assert (rows["FID, COCO-30K"].paper, rows["FID, COCO-30K"].ours) == ("not known", 12.5)
    assert rows["FID, COCO-30K"].missing.startswith("5000 samples, Inception, clean-fid;")
    assert (rows["DPG-Bench"].paper, rows["DPG-Bench"].ours) == ("none", None)
    assert "dpg-score --json=dpg.json" in rows["DPG-Bench"].missing


def test_what_a_result_lacks_is_said_and_the_rest_of_it_read(tmp_path):
    (tmp_path / "geneval.json").write_text('{"overall": 0.5, "tasks": {"two_object": 0.5}}')
    (tmp_path / "dsg.json").write_text('{"overall": null, "items": {"a": null}}')
    rows = {row.name: row for row in read_results(tmp_path)}
    assert (rows["GenEval, two objects, %"].ours, rows["GenEval, position, %"].ours) == (50.0, None)
    assert rows["GenEval, position, %"].missing == f"{tmp_path / 'geneval.json'} has none"
    missing = "single_object, counting, colors, position, color_attr"
    assert rows["GenEval, overall, %"].missing.startswith(f"does not compare: there are no images of {missing}; ")
    assert (rows["DSG, %"].ours, rows["DSG, %"].missing) == (None, f"{tmp_path / 'dsg.json'} has none")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dimensions": 64}, "is no FID: 64 dimensions, of Inception"),
        ({"reference_extractor": "other"}, "is no FID: 2048 dimensions, of Inception and other"),
        ({"extractor": None, "samples": None}, "unknown samples, None; is no FID"),
        ({}, "9 samples, Inception; the paper's number"),
    ],
)
def test_a_distance_of_other_features_is_said_to_be_no_fid(tmp_path, changes, said):
    found = {"frechet": 3.5, "samples": 9, "dimensions": 2048, "extractor": "Inception"} | changes
    (tmp_path / "fid.json").write_text(json.dumps(found))
    assert said in next(row for row in read_results(tmp_path) if row.name == "FID, COCO-30K").missing


@pytest.mark.parametrize(
    ("text", "said"),
    [('{"am": 3}', "KeyError"), ("[]", "TypeError"), ('{"overall": NaN, "tasks": {}}', "must be finite")],
)
def test_a_file_that_is_another_result_is_refused(tmp_path, text, said):
    (tmp_path / "geneval.json").write_text(text)
    with pytest.raises(UserError, match=rf"geneval\.json: is no result for GenEval, overall, %: .*{said}"):
        read_results(tmp_path)


def test_what_is_missing_for_clip_score_is_named(tmp_path):
    assert "give --coco=captions_val2014.json and --clip=FOLDER;" in coco(tmp_path, tmp_path, None, None, 1).missing
    assert "give --clip=FOLDER;" in coco(tmp_path, tmp_path, "captions.json", None, 1).missing


def test_the_run_s_own_scores_are_computed_or_said_to_be_missing(monkeypatch, tmp_path):
    from tests.runs import tiny

    def no_loss(*_):
        raise UserError("the data has no record in the split held_out")

    monkeypatch.setattr(paper, "saved_experiment", lambda workdir: tiny())
    monkeypatch.setattr(paper, "loss", no_loss)
    monkeypatch.setattr(paper, "retrieval", lambda workdir, step, n: {"r_at_1": n / 100, "num_captions": n})
    loss, retrieval = paper.own(tmp_path, 20)
    assert (loss.ours, loss.missing) == (None, "the data has no record in the split held_out")
    assert retrieval == Row("retrieval, R@1, %", "none", 20.0, "fit to the training captions, 20 of them")


def test_shapes_that_cannot_be_drawn_are_a_row_and_not_the_end_of_the_table(monkeypatch, tmp_path):
    from tests.runs import tiny

    def refused(*_):
        raise UserError("no such checkpoint")

    monkeypatch.setattr(paper, "saved_experiment", lambda workdir: tiny(data__task="shapes"))
    monkeypatch.setattr(paper, "loss", refused)
    monkeypatch.setattr(paper, "shapes", refused)
    assert [(row.ours, row.missing) for row in paper.own(tmp_path, 20)] == [(None, "no such checkpoint")] * 2


def test_the_command_reads_computes_prints_and_writes(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(paper, "own", lambda workdir, captions: [Row(f"{workdir.name} {captions}", "none", 1.5, "")])
    (tmp_path / "W/paper").mkdir(parents=True)
    (tmp_path / "W/paper/geneval.json").write_text(json.dumps(GENEVAL))
    run("paper", f"--workdir={tmp_path}/W", "--captions=7", f"--json={tmp_path}/table.json")
    rows = {row["name"]: row for row in json.loads((tmp_path / "table.json").read_text())["rows"]}
    assert (rows["GenEval, overall, %"]["ours"], rows["W 7"]["ours"]) == (50.0, 1.5)
    assert "give --coco=captions_val2014.json and --clip=FOLDER;" in str(rows)
    assert "| W 7 | none | 1.5 |" in capsys.readouterr().out


def test_the_table_has_a_row_for_each():
    text = table([Row("a", "1", 2.0, "x"), Row("b", "none", None, "y")])
    assert text.splitlines()[2:] == ["| a | 1 | 2 | x |", "| b | none | - | y |"]
