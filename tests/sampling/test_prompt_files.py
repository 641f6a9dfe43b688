"""Prompt files as benchmarks publish them, and where their images go."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ecdit.errors import UserError
from ecdit.sampling.grids import save_png
from ecdit.sampling.layouts import plan_images, write_after, write_before
from ecdit.sampling.prompt_files import Prompt, choose, read_prompt_file

PUBLISHED = Path(__file__).parents[2] / "shared/eval"
GENEVAL = {"tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": [], "prompt": "two clocks"}
GENEVAL2 = {"prompt": "a pig", "atom_count": 3, "vqa_list": [["Is it?", "Yes"]], "skills": ["object"]}
COCO = {
    "annotations": [
        {"image_id": i, "id": n, "caption": c} for n, (i, c) in enumerate([(7, " A cat.\n"), (3, "B"), (7, "C")])
    ]
}


def texts(folder, name, content, kind="auto"):
    (folder / name).write_text(content)
    found, prompts = read_prompt_file(folder / name, kind)
    return found, [(prompt.text, prompt.name) for prompt in prompts]


def test_each_kind_is_told_by_its_file(tmp_path):
    assert texts(tmp_path, "a.txt", "red heart\ntiger\n") == ("lines", [("red heart", ""), ("tiger", "")])
    parti = 'Prompt\tCategory\nthe word "START"\tA\n"G I G G L E" painted\tB\n'
    assert texts(tmp_path, "b.tsv", parti) == ("parti", [('the word "START"', ""), ('"G I G G L E" painted', "")])
    assert texts(tmp_path, "c.json", json.dumps(COCO)) == ("coco", [("A cat.", "7"), ("B", "3")])
    assert texts(tmp_path, "c.json", "\ufeff" + json.dumps(COCO)) == ("coco", [("A cat.", "7"), ("B", "3")])
    assert texts(tmp_path, "d.jsonl", json.dumps(GENEVAL) + "\n") == ("geneval", [("two clocks", "")])
    assert texts(tmp_path, "e.jsonl", json.dumps(GENEVAL2)) == ("geneval2", [("a pig", "")])
    line = json.dumps({"item_id": "12", "prompt": "a cow"})
    assert texts(tmp_path, "f.jsonl", line) == ("dpg", [("a cow", "12")])
    assert texts(tmp_path, "g.txt", line, "dpg") == ("dpg", [("a cow", "12")])


def test_a_row_of_parti_s_columns_is_a_line_to_every_editor(tmp_path):
    prompts = "Prompt\tNote\r\na\u2028b\t\x0c\r\nc\x85d\t\n"
    assert texts(tmp_path, "b.tsv", prompts) == ("parti", [("a\u2028b", ""), ("c\x85d", "")])


def test_dpg_s_folder_of_texts_is_read_by_name(tmp_path):
    for name, text in {"b": "second\n", "a": "first,\nlong"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    kind, prompts = read_prompt_file(tmp_path)
    assert (kind, prompts) == ("dpg", [Prompt("first, long", "a"), Prompt("second", "b")])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.tsv", "prompt\tCategory\na\tb\n", "header with the column Prompt"),
        ("a.tsv", "Prompt\tCategory\na\n", "line 2: has 1 columns, the header 2"),
        ("a.json", "{}", "annotations"),
        ("a.json", '{"annotations": [{"image_id": 1}]}', "KeyError: 'caption'"),
        ("a.json", '{"annotations": [{"image_id": 1, "caption": null}]}', "image 1 = None: must be a string"),
        ("a.jsonl", '{"item_id": "1", "prompt": "a \\ud83d"}', r"prompt 1 = 'a \\ud83d': is no Unicode text"),
        ("a.jsonl", '{"text": "a"}', "its first line has text; known are"),
        ("a.jsonl", "[]", r"line 1: \[\]: must be a JSON object"),
        ("a.jsonl", json.dumps(GENEVAL) + '\n{"prompt": "a"}', "line 2: tag is missing"),
        ("a.jsonl", '{"item_id": "a/b", "prompt": "a"}', "item_id = 'a/b': must be letters"),
        ("a.jsonl", '{"item_id": "1", "prompt": "a"}\n{"item_id": "1", "prompt": "b"}', "'1' stands there twice"),
        ("a.jsonl", '{"item_id": "1", "prompt": " "}', "prompt 1 is empty"),
        ("a.jsonl", '{"item_id": "1", "prompt": 3}', "prompt = 3: must be a string"),
        ("a.jsonl", '{"item_id": null, "prompt": "a"}', "line 1: item_id = None: must be a string or an integer"),
        ("a.json", '{"annotations": [{"image_id": [1], "caption": "a"}]}', r"image_id = \[1\]: must be a number"),
        ("a.json", "[" * 100_000, "annotations.*RecursionError"),
    ],
)
def test_files_of_other_kinds_are_refused(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said):
        read_prompt_file(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("PartiPrompts.tsv", "parti", 1632),
        ("geneval/evaluation_metadata.jsonl", "geneval", 553),
        ("geneval2/geneval2_data.jsonl", "geneval2", 800),
        ("dpg/prompts.jsonl", "dpg", 1065),
    ],
)
def test_the_published_files(name, kind, count):
    if not PUBLISHED.exists():
        pytest.skip("no shared/")
    found, prompts = read_prompt_file(PUBLISHED / name)
    assert (found, len(prompts)) == (kind, count)
    planned = plan_images(found, prompts, 1)
    assert len({one.file for one in planned}) == count


def test_a_chosen_number_is_always_the_same_spread_over_all():
    prompts = [Prompt(str(i)) for i in range(1000)]
    chosen = [int(prompt.text) for prompt in choose(prompts, 100)]
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 100
    assert abs(np.mean(chosen) - 500) < 100
    assert choose(prompts, 0) == prompts
    with pytest.raises(UserError, match=r"must be 0 \.\. 1000"):
        choose(prompts, 1001)


def test_a_prompt_that_stands_there_twice_goes_on_with_its_repeats():
    planned = plan_images("coco", [Prompt("a", "1"), Prompt("b", "2"), Prompt("a", "3")], 2)
    assert [(one.prompt, one.repeat) for one in planned] == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("a", 2), ("a", 3)]
    assert [one.file for one in planned] == [f"images/{i:05d}.png" for i in range(6)]


def test_geneval_s_folders(tmp_path):
    prompts = [Prompt("two clocks", "", GENEVAL), Prompt("a cow", "", {**GENEVAL, "prompt": "a cow"})]
    files = [one.file for one in plan_images("geneval", prompts, 2)]
    assert files == [f"0000{i}/samples/000{j}.png" for i in range(2) for j in range(2)]
    write_before(tmp_path, "geneval", prompts)
    assert json.loads((tmp_path / "00000/metadata.jsonl").read_text()) == GENEVAL
    assert json.loads((tmp_path / "00001/metadata.jsonl").read_text())["prompt"] == "a cow"


def test_dpg_s_grids_have_the_images_in_rows(tmp_path):
    planned = plan_images("dpg", [Prompt("a cow", "x_1"), Prompt("a pig", "y")], 4)
    assert planned[5].file == "images/y_1.png"
    (tmp_path / "images").mkdir()
    for i, one in enumerate(planned):
        save_png(np.full((8, 8, 3), i, np.uint8), tmp_path / one.file)
    write_after(tmp_path, "dpg", planned)
    assert sorted(path.name for path in (tmp_path / "grids").iterdir()) == ["x_1.png", "y.png"]
    with Image.open(tmp_path / "grids" / "y.png") as grid:
        assert grid.size == (16, 16)
        crops = [grid.crop((x, y, x + 8, y + 8)) for y in (0, 8) for x in (0, 8)]
        assert [np.unique(np.asarray(crop)).tolist() for crop in crops] == [[4], [5], [6], [7]]
    with pytest.raises(UserError, match="takes 4 images of a prompt, or 1"):
        plan_images("dpg", [Prompt("a", "1")], 2)


def test_geneval2_s_map_of_prompts_to_images(tmp_path):
    planned = plan_images("geneval2", [Prompt("a cow"), Prompt("a pig")], 1)
    write_after(tmp_path, "geneval2", planned)
    paths = json.loads((tmp_path / "image_paths.json").read_text())
    assert paths == {"a cow": f"{tmp_path}/images/00000.png", "a pig": f"{tmp_path}/images/00001.png"}
