"""Tests `python -m ecdit.evaluate NAME` for the scorers: from files to files, which are written atomically."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags

from ecdit import evaluate
from ecdit.errors import UserError

ROOT = Path(__file__).parents[2]

METADATA = {
    "tag": "colors",
    "prompt": "a photo of a red car",
    "include": [{"class": "car", "count": 1, "color": "red"}],
}
IMAGES = [
    {
        "filename": f"{colour}.png",
        "metadata": METADATA,
        "detections": {"car": [[0, 0, 9, 9, 0.9]]},
        "colors": {"car": [colour]},
    }
    for colour in ("red", "blue")
]
DSG = [{"item_id": "a", "questions": [{"id": 1, "dependency": "0", "answer": "yes"}]}]
DPG = [{"item_id": "a", "questions": [{"id": 1, "dependency": "0", "tuple": "global (x)", "answers": ["yes", "no"]}]}]
BENCHMARK = [{"prompt": "a cat", "atom_count": 3, "vqa_list": [["Is it a cat?", "Yes"]], "skills": ["object"]}]
ANSWERS = [{"prompt": "a cat", "scores": [0.5]}]


def run(name, *arguments):
    """Runs an evaluation in this process, with flags of its own."""
    module, values = importlib.import_module(evaluate.EVALUATIONS[name]), flags.FlagValues()
    module.define_flags(values)
    values([name, *arguments])
    module.run(values)


@pytest.fixture
def directory(tmp_path):
    files = {"images": IMAGES, "dsg": DSG, "dpg": DPG, "benchmark": BENCHMARK, "answers": ANSWERS}
    for name, values in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    random = np.random.default_rng(0)
    for name, shift in (("features", 0), ("reference", 1)):
        np.save(tmp_path / f"{name}.npy", random.normal(size=(40, 4)).astype(np.float32) + shift)
        rows = random.normal(size=(40, 4)).astype(np.float32)
        np.save(tmp_path / f"unit_{name}.npy", rows / np.linalg.norm(rows, axis=1, keepdims=True))
    return tmp_path


def result(path):
    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(path.read_text(), parse_constant=refuse)


def test_geneval_writes_lines_and_shares(directory, capsys):
    out, summary = directory / "new/results.jsonl", directory / "summary.json"
    run("geneval-score", f"--detections={directory}/images.jsonl", f"--out={out}", f"--json={summary}")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    common = {"tag": "colors", "prompt": "a photo of a red car"}
    reason = "expected red car>=1, found 0 red; and 1 blue"
    assert lines == [
        {"filename": "red.png", **common, "correct": True, "reason": ""},
        {"filename": "blue.png", **common, "correct": False, "reason": reason},
    ]
    assert result(summary) == {"tasks": {"colors": 0.5}, "overall": 0.5}
    assert "there are no images of single_object" in capsys.readouterr().out


FILES = {
    "dsg-score": (("items=dsg.jsonl",), {"items": {"a": 1.0}, "overall": 1.0}),
    "dpg-score": (
        ("items=dpg.jsonl",),
        {"overall": 50.0, "items": {"a": 50.0}, "l1": {"global": 50.0}, "l2": {"global": 50.0}},
    ),
    "geneval2-score": (
        ("benchmark=benchmark.jsonl", "answers=answers.jsonl"),
        {"am": 50.0, "gm": 50.0, "skills": {"object": 50.0}, "atomicity": {"3": 50.0}},
    ),
}


def given(directory, options):
    """--name=FILE with the file in the directory, of name=FILE."""
    return [f"--{name}={directory / file}" for name, _, file in (option.partition("=") for option in options)]


@pytest.mark.parametrize("name", FILES)
def test_answers_become_scores(name, directory):
    options, expected = FILES[name]
    run(name, *given(directory, options), f"--json={directory}/result.json")
    assert result(directory / "result.json") == expected


def test_an_item_that_does_not_count_is_null_and_named(directory, capsys):
    lost = {"item_id": "b", "questions": [{"id": 1, "dependency": "7", "answer": "yes"}]}
    (directory / "dsg.jsonl").write_text(json.dumps(lost))
    run("dsg-score", f"--items={directory}/dsg.jsonl", f"--json={directory}/result.json")
    assert result(directory / "result.json") == {"items": {"b": None}, "overall": None}
    assert "1 items depend on a question that does not exist, and do not count: ['b']" in capsys.readouterr().out


def test_dpg_names_the_line_of_a_malformed_dependency(directory):
    broken = json.loads(json.dumps(DPG[0]))
    broken["questions"][0]["dependency"] = "1, air"
    (directory / "dpg.jsonl").write_text(f"\n{json.dumps(broken)}\n")
    with pytest.raises(UserError, match=r"dpg.jsonl, line 2: item 'a', question 1: dependency must be ids"):
        run("dpg-score", f"--items={directory}/dpg.jsonl")


def test_one_wrong_line_leaves_no_file_and_old_results_as_they_are(directory):
    with (directory / "images.jsonl").open("a") as file:
        file.write('{"filename": "third.png"}\n')
    out, summary = directory / "results.jsonl", directory / "summary.json"
    summary.write_text("old")
    before = sorted(path.name for path in directory.iterdir())
    with pytest.raises(UserError, match=r"images.jsonl, line 3: metadata is missing"):
        run("geneval-score", f"--detections={directory}/images.jsonl", f"--out={out}", f"--json={summary}")
    assert sorted(path.name for path in directory.iterdir()) == before
    assert summary.read_text() == "old"


@pytest.mark.parametrize("name", ["dsg-score", "dpg-score", "geneval2-score", "frechet", "kid", "cmmd"])
def test_a_result_that_could_not_be_written_is_refused_before_the_input_is_read(name, directory):
    options = FILES[name][0] if name in FILES else ("features=none.npy", "reference=none.npy")
    with pytest.raises(UserError, match=r"dsg.jsonl/result.json cannot be written"):
        run(name, *given(directory, options), f"--json={directory}/dsg.jsonl/result.json")


@pytest.fixture
def compare(directory):
    def measure(name, *options, features="features.npy", reference="reference.npy"):
        files = given(directory, [f"features={features}", f"reference={reference}"])
        run(name, *files, *options, f"--json={directory}/result.json")
        return result(directory / "result.json")

    return measure


def test_frechet_names_the_extractor_and_the_numbers_of_samples(compare, directory):
    found = compare("frechet", "--extractor=pytorch-fid 0.3.0")
    assert found.pop("frechet") > 0
    expected = {"extractor": "pytorch-fid 0.3.0", "dimensions": 4, "samples": 40, "reference_samples": 40}
    assert found == expected


def test_frechet_takes_shards_directories_and_saved_moments(compare, directory):
    whole = compare("frechet", f"--save={directory}/a.npz")["frechet"]
    rows = np.load(directory / "features.npy")
    (directory / "shards").mkdir()
    for i, part in enumerate(np.split(rows, [7, 30])):
        np.save(directory / f"shards/{i}.npy", part)
    assert compare("frechet", features="shards")["frechet"] == whole
    assert compare("frechet", features="a.npz") == compare("frechet")
    first = [str(directory / f"shards/{i}.npy") for i in range(3)]
    arguments = [f"--features={','.join(first)}", f"--reference={directory}/reference.npy"]
    run("frechet", *arguments, f"--json={directory}/listed.json")
    assert result(directory / "listed.json")["frechet"] == whole


def test_frechet_refuses_fewer_samples_than_dimensions_unless_told(compare, directory):
    np.save(directory / "few.npy", np.load(directory / "features.npy")[:3])
    with pytest.raises(UserError, match=r"--features: 3 samples, fewer than the 4 dimensions: .*--allow_few_samples"):
        compare("frechet", features="few.npy")
    with pytest.raises(UserError, match="--reference: 3 samples"):
        compare("frechet", reference="few.npy")
    np.save(directory / "enough.npy", np.load(directory / "features.npy")[:4])
    assert compare("frechet", features="enough.npy")["samples"] == 4
    assert compare("frechet", "--allow_few_samples", features="few.npy")["samples"] == 3


def test_the_other_distances(compare):
    kid = compare("kid", "--subsets=5", "--subset_size=10", "--seed=3")
    assert {"subsets": 5, "subset_size": 10, "seed": 3, "samples": 40}.items() <= kid.items()
    assert kid["kid"] > 0 < kid["std"]
    cmmd = compare("cmmd", features="unit_features.npy", reference="unit_reference.npy")
    assert cmmd["cmmd"] > 0
    found = compare("precision-recall")
    assert 0 < found["precision"] < 1
    assert found["neighbours"] == 3


def test_cmmd_refuses_embeddings_that_are_not_of_length_one(compare):
    with pytest.raises(UserError, match=r"--features: row \d+ has length .*; CLIP embeddings must have length 1"):
        compare("cmmd")


@pytest.mark.parametrize("name", ["frechet", "kid", "precision-recall"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (np.array([[0.0, 1, 2, np.nan]] * 5), r"features\[0, 3\] = nan: must be finite"),
        (np.array(["a"]), "shape"),
        (np.zeros((0, 4)), "rows"),
        (np.array([{}]), "is no .npy file of numbers"),
        (None, r"broken.npy is or has no .npy file"),
    ],
)
def test_features_that_are_none_are_refused_with_their_file(name, content, said, compare, directory):
    if content is not None:
        np.save(directory / "broken.npy", content)
    with pytest.raises(UserError, match=rf"broken.npy.*{said}|--features=.*broken.npy: .*{said}"):
        compare(name, features="broken.npy")


def test_a_part_of_the_features_is_not_left_out_in_silence(compare, directory):
    (directory / "none").mkdir()
    np.save(directory / "rowless.npy", np.zeros((0, 4), np.float32))
    for part, said in (("none", "/none is or has no .npy file"), ("rowless.npy", "/rowless.npy has no rows")):
        for name in ("frechet", "kid"):
            with pytest.raises(UserError, match=said):
                compare(name, features=f"features.npy,{directory}/{part}")


@pytest.mark.parametrize("name", ["dsg-score", "dpg-score", "geneval2-score"])
def test_answers_are_not_replaced_by_their_score(name, directory):
    before = {path: path.read_bytes() for path in directory.iterdir()}
    options = given(directory, FILES[name][0])
    for option in options:
        flag, _, file = option.partition("=")
        with pytest.raises(UserError, match=f"is the file of {flag} too"):
            run(name, *options, f"--json={file}")
    assert {path: path.read_bytes() for path in directory.iterdir()} == before


def test_every_evaluation_has_flags_and_a_run():
    for module in map(importlib.import_module, evaluate.EVALUATIONS.values()):
        assert callable(module.define_flags)
        assert callable(module.run)


def test_flags_of_one_evaluation_are_no_other_s(directory):
    with pytest.raises(flags.UnrecognizedFlagError):
        run("dsg-score", f"--items={directory}/dsg.jsonl", "--workdir=runs/emoji")


def command(*arguments):
    child = [sys.executable, "-m", "ecdit.evaluate", *map(str, arguments)]
    return subprocess.run(child, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_the_command_scores_without_jax(directory):
    done = command("dsg-score", f"--items={directory}/dsg.jsonl", f"--json={directory}/result.json")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "overall 1, 1 items" in done.stdout
    assert result(directory / "result.json")["overall"] == 1
    listed = "import sys, ecdit.commands.frechet, ecdit.commands.geneval_score; print('jax' in sys.modules)"
    child = subprocess.run([sys.executable, "-c", listed], cwd=ROOT, capture_output=True, text=True)
    assert child.stdout == "False\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "evaluations: retrieval, loss, shapes, geneval-score, .*; got none"),
        (["fid", "--features=a.npy"], "evaluations: .*; got fid"),
        (["dsg-score"], "--items must have a value"),
        (["dsg-score", "--items=missing.jsonl"], "missing.jsonl"),
        (["--json", "dsg-score", "dpg-score", "--items=missing.jsonl"], "evaluations: .*; the name comes first"),
        (["dsg-score", "dpg-score", "--items=missing.jsonl"], "evaluations: .*; got dsg-score dpg-score"),
    ],
)
def test_mistakes_are_said_in_one_line(arguments, said):
    done = command(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
    assert re.search(said, done.stderr)
