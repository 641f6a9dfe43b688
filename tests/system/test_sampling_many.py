"""Many images by few programs, by several processes, and in several calls: the same files as in one go."""

import dataclasses
import functools
import json
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ecdit import multihost, progress
from ecdit.config import to_dict
from ecdit.data.prepared import prompt_tokens
from ecdit.data.tokens import hash_files, tokenizer_files
from ecdit.errors import UserError
from ecdit.partitioning import make_mesh
from ecdit.runs import sample_folder
from ecdit.runs.sample_folder import draw_folder, whole_batches
from ecdit.sampling.image_folder import is_finished
from ecdit.sampling.layouts import Planned
from ecdit.sampling.many import Drawn, draw_images, make_programs
from ecdit.sampling.sampler import make_sampler, sample_images
from ecdit.system import make_system
from launch.local import launch
from tests.forking import run_forked
from tests.runs import command, random_params, save_ema, tiny

PROMPTS = ["red heart"] * 3 + ["tiger"] * 3 + ["owl"] * 3 + ["fire"]
REPEATS = [0, 1, 2] * 3 + [0]
COMPILED = "/jax/core/compile/backend_compile_duration"


class Drawing:
    """Draws lists of prompts by the same two programs, and counts their calls."""

    def __init__(self, data, **changes):
        self.experiment = tiny(data__directory=str(data), mesh__data=1, sampling__batch_size=4)
        self.sampling = dataclasses.replace(self.experiment.sampling, num_steps=2, **changes)
        system, mesh = make_system(self.experiment.system), make_mesh(self.experiment.mesh, jax.devices()[:1])
        self.calls, programs = [], make_programs(system, self.sampling, mesh)
        counted = {name: functools.partial(self.call, name, getattr(programs, name)) for name in ("encode", "draw")}
        self.programs, self.params = programs._replace(**counted), random_params(system)
        self.one_program = make_sampler(system, self.sampling, mesh)
        self.tokenize = prompt_tokens(self.experiment.data)

    def call(self, name, program, *arguments):
        self.calls.append(name)
        return program(*arguments)

    def __call__(self, prompts, repeats):
        self.calls.clear()
        batches = list(draw_images(self.programs, self.params, self.tokenize, prompts, repeats))
        assert sum(batch.done for batch in batches) == len(prompts)
        places, images = zip(*(pair for batch in batches for pair in batch.images), strict=True)
        assert list(places) == list(range(len(prompts)))
        return np.stack(images)


@pytest.fixture(scope="module")
def drawing(emoji_data):
    return Drawing(emoji_data)


@pytest.fixture(scope="module")
def images(drawing):
    return drawing(PROMPTS, REPEATS)


def test_the_images_are_those_of_the_one_program(drawing, images):
    expected = sample_images(drawing.one_program, drawing.params, drawing.tokenize, PROMPTS, REPEATS, drawing.sampling)
    difference = np.abs(images.astype(int) - expected.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.005


def test_each_prompt_is_encoded_once_and_the_null_caption_once(drawing):
    drawing(PROMPTS, REPEATS)
    assert drawing.calls == ["encode", "encode", "draw", "draw", "draw"]  # four prompts are one batch
    drawing(["red heart", "tiger", "owl", "fire", "moon cake", "trousers"], [0] * 6)
    assert drawing.calls == ["encode", "encode", "draw", "encode", "draw"]


def test_a_run_compiles_once_whatever_its_prompts(drawing, images):
    compiled = []
    listener = lambda name, *_, **__: compiled.append(name) if name == COMPILED else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        jax.jit(lambda x: x + 1)(np.ones(17))
        assert len(compiled) == 1, "the control: a compilation is seen"
        compiled.clear()
        drawing([f"{prompt} again" for prompt in PROMPTS], REPEATS)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert compiled == []


def test_an_image_is_bitwise_the_same_in_any_list(drawing, images):
    order = [8, 3, 1, 9, 0]
    np.testing.assert_array_equal(drawing([PROMPTS[i] for i in order], [REPEATS[i] for i in order]), images[order])
    assert len({image.tobytes() for image in images}) == len(PROMPTS)


def test_an_image_that_is_not_finite_is_named_and_not_drawn_black(drawing):
    """The state of one caption is NaN, as an encoder whose numbers overflow makes it."""

    def overflowing(params, tokens):
        states = drawing.programs.encode(params, tokens)
        return jax.tree.map(lambda x: x.at[1].set(np.nan) if x.dtype.kind == "f" else x, states)

    programs = drawing.programs._replace(encode=overflowing)
    prompts, repeats = [*["red heart"] * 5, "tiger", "owl"], [*range(5), 7, 0]
    batches = draw_images(programs, drawing.params, drawing.tokenize, prompts, repeats)
    assert [place for place, _ in next(batches).images] == [0, 1, 2, 3]
    with pytest.raises(UserError, match="the image of 'tiger', repeat 7, is not finite"):
        next(batches)


def test_weights_that_are_not_finite_are_no_black_images(drawing):
    broken = jax.tree.map(lambda x: x * np.float32(np.nan), drawing.params)
    with pytest.raises(UserError, match="4 of 4 images are not finite"):
        sample_images(drawing.one_program, broken, drawing.tokenize, ["owl"], [0], drawing.sampling)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, emoji_data):
    """A run of random weights."""
    workdir = tmp_path_factory.mktemp("many") / "run"
    workdir.mkdir()
    experiment = tiny(data__directory=str(emoji_data))
    (workdir / "config.json").write_text(json.dumps(to_dict(experiment)))
    vocabulary = hash_files(tokenizer_files(experiment.data))
    save_ema(workdir, random_params(make_system(experiment.system)), config=to_dict(experiment), vocabulary=vocabulary)
    return workdir


LINES = ["two clocks", "a red heart", "tiger", "owl", "fire"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """GenEval's kind of prompts."""
    path = tmp_path_factory.mktemp("prompts") / "metadata.jsonl"
    path.write_text("".join(json.dumps({"tag": "x", "include": [], "prompt": line}) + "\n" for line in LINES))
    return path


def flags(workdir, prompts, out, batch):
    return [f"--workdir={workdir}", f"--prompts={prompts}", f"--out={out}", "--repeats=2", f"--set={batch}"]


def files(out):
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(workdir, prompts, tmp_path_factory, compilation_cache):
    """The folder of one process with one device, two images at a time."""
    from launch.local import cpu_environment

    out = tmp_path_factory.mktemp("whole") / "out"
    env = {**cpu_environment(1), "JAX_COMPILATION_CACHE_DIR": str(compilation_cache)}
    result = run_forked(command("sample", *flags(workdir, prompts, out, "sampling.batch_size=2")), env)
    assert result.returncode == 0, result.stderr
    assert f"10 images of step 1 in {out}" in result.stdout
    found = files(out)
    wanted = [
        f"{i:05d}/{name}" for i in range(5) for name in ("metadata.jsonl", "samples/0000.png", "samples/0001.png")
    ]
    assert sorted(found) == sorted([*wanted, "grid.png", "manifest.json"])
    assert len({data for name, data in found.items() if "samples" in name}) == 10
    return out


def test_the_manifest_says_all_that_an_image_follows_from(whole, workdir):
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["finished"] is True
    assert manifest["images"][3] == {"file": "00001/samples/0001.png", "prompt": "a red heart", "repeat": 1}
    assert {"checkpoint", "model", "files", "seed", "sampling", "group", "vocabulary", "format", "set"} <= set(manifest)
    (machine,) = manifest["machines"]
    assert (machine["platform"], machine["devices"], machine["images_a_device"]) == ("cpu", 1, 2)
    assert "jax" in machine["versions"]


def test_a_folder_that_was_left_is_finished_and_what_is_whole_in_it_kept(whole, workdir, prompts, tmp_path, cpu_env):
    out = tmp_path / "out"
    for name, data in files(whole).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"finished": False}))
    (out / "grid.png").unlink()
    (out / "00001/samples/0001.png").unlink()
    cut = out / "00003/samples/0000.png"
    cut.write_bytes(cut.read_bytes()[:-20])
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("samples/*.png") if path != cut}
    result = run_forked(command("sample", *flags(workdir, prompts, out, "sampling.batch_size=2")), cpu_env())
    assert result.returncode == 0, result.stderr
    assert "10 images of step 1" in result.stdout
    assert "8 of them from before" in result.stdout
    assert files(out) == files(whole)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(whole, workdir, prompts, tmp_path, compilation_cache, monkeypatch):
    """Each with one device and two images at a time, as the one has."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(compilation_cache))
    out = tmp_path / "out"
    arguments = flags(workdir, prompts, out, "sampling.batch_size=4")
    code = launch([sys.executable, "-m", "ecdit.sample", *arguments], 2, devices=1, log_dir=tmp_path / "logs")
    logs = [(tmp_path / "logs" / f"process_{i}.log").read_text() for i in range(2)]
    assert code == 0, logs
    found, expected = files(out), files(whole)
    assert found.keys() == expected.keys()
    for name in expected.keys() - {"manifest.json"}:
        assert found[name] == expected[name], name
    manifest = json.loads(found["manifest.json"])
    assert manifest["images"] == json.loads(expected["manifest.json"])["images"]
    assert (manifest["machines"][0]["processes"], manifest["machines"][0]["images_a_device"]) == (2, 2)
    assert "images of step 1" not in logs[1]


def test_a_batch_whose_images_compete_is_drawn_again_as_it_was():
    left = np.array([0, 1, 0, 0, 0, 0, 0, 1, 0, 1], bool)
    assert np.flatnonzero(whole_batches(left, 4)).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert np.flatnonzero(whole_batches(left, 3)).tolist() == [0, 1, 2, 6, 7, 8, 9]
    assert np.flatnonzero(whole_batches(left, 1)).tolist() == [1, 7, 9]


@pytest.fixture
def pretended(monkeypatch):
    """A run whose images are black; batches have one."""
    pixels = np.zeros((4, 4, 3), np.uint8)
    monkeypatch.setattr(sample_folder, "machine", lambda run: {})
    monkeypatch.setattr(sample_folder, "make_programs", lambda *_: None)
    monkeypatch.setattr(
        sample_folder, "draw_images", lambda *given: (Drawn([(i, pixels)], 1) for i in range(len(given[3])))
    )
    parts = SimpleNamespace(denoiser=SimpleNamespace(images_together=lambda mode: 1))
    experiment = SimpleNamespace(sampling=SimpleNamespace(batch_size=1))
    return SimpleNamespace(
        system=SimpleNamespace(parts=parts), experiment=experiment, mesh=None, params=None, tokenize=None
    )


def test_a_folder_counts_as_finished_only_after_all_that_is_made_of_its_images(tmp_path, pretended):
    """Else what a kill leaves out, such as a benchmark's grids, would never be written."""
    one = Planned(file="00000.png", prompt="owl", repeat=0, name="")

    def killed():
        assert is_finished(tmp_path / "out/00000.png")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_folder(pretended, tmp_path / "out", [one], {}, draw_after=killed)
    assert not json.loads((tmp_path / "out/manifest.json").read_text())["finished"]
    called = []
    draw_folder(pretended, tmp_path / "out", [one], {}, draw_after=lambda: called.append(1))
    assert called == [1]
    assert json.loads((tmp_path / "out/manifest.json").read_text())["finished"]


def planned_owls(count):
    return [Planned(file=f"{i:05d}.png", prompt="owl", repeat=i, name="") for i in range(count)]


def test_hosts_that_would_draw_other_images_write_nothing(tmp_path, pretended, monkeypatch):
    """Else one of them would draw its images of other prompts, or with weights of another step, under these names."""
    seen = []
    monkeypatch.setattr(sample_folder, "host_differences", lambda facts: seen.append(facts) or [])
    source = {"step": 1, "sampling": {"seed": 0, "solver": "a long value " * 9}, "workdir": "runs/a"}
    others = [
        (planned_owls(2), source),
        (planned_owls(3), source),
        (planned_owls(2)[::-1], source),
        (planned_owls(2), source | {"step": 2}),
        (planned_owls(2), source | {"sampling": source["sampling"] | {"seed": 1}}),
        (planned_owls(2), source | {"workdir": "/mnt/runs/a"}),
    ]
    for number, (planned, values) in enumerate(others):
        draw_folder(pretended, tmp_path / str(number), planned, values)
    keys = [[key for key in seen[0] if seen[0][key] != facts[key]] for facts in seen]
    assert keys == [[], ["prompts and repeats", "images"], ["prompts and repeats"], ["step"], ["sampling"], []]

    monkeypatch.setattr(sample_folder, "host_differences", lambda facts: ["step: process 1 (host b) has 2"])
    with pytest.raises(UserError, match="the hosts would not draw the same images:\n  step: process 1"):
        draw_folder(pretended, tmp_path / "out", planned_owls(1), source)
    assert not (tmp_path / "out").exists()


def test_a_log_shows_how_far_a_folder_is_with_what_was_there_before(tmp_path, pretended, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 1e-9)

    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_folder(pretended, tmp_path / "out", planned_owls(4), {}, draw_after=killed)
    for name in ("00001.png", "00003.png"):
        (tmp_path / "out" / name).unlink()
    draw_folder(pretended, tmp_path / "out", planned_owls(4), {})
    shares = [(1, 25), (2, 50), (3, 75), (3, 75)]
    lines = [line.partition(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == [f"sampling: {done} of 4 images ({share}%)" for done, share in shares]


def test_where_another_process_cannot_write_its_images_this_one_ends_too(tmp_path, pretended, monkeypatch):
    """It would wait for the other one in the next batch until it is aborted."""
    out = tmp_path / "out"
    full = lambda error: UserError("process 1 cannot") if (out / "00000.png").exists() else error  # noqa: E731
    monkeypatch.setattr(multihost, "anywhere", full)
    planned = [Planned(file=f"{i:05d}.png", prompt="owl", repeat=i, name="") for i in range(2)]
    with pytest.raises(UserError, match="process 1 cannot"):
        draw_folder(pretended, out, planned, {})
    assert is_finished(out / "00000.png")
    assert not (out / "00001.png").exists()
