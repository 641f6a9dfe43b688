"""Weights exported to a folder, and read from it alone."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ecdit.config import to_dict
from ecdit.errors import UserError
from ecdit.interop import weights
from ecdit.interop.weights import flat_names, load_folder, read_metadata, save_folder
from ecdit.partitioning import make_mesh
from ecdit.pretrained.safetensors_folder import SafetensorsFolder
from ecdit.runs.exported import export_run, open_exported
from ecdit.runs.trained_run import open_run
from ecdit.system import make_system
from tests.runs import ROOT, keep_small_tokenizer, save_ema, tiny

ARRAYS = {
    "a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "c": np.float32([7])},
    "d": np.arange(40, dtype=np.float32),  # 160 bytes: more than a shard
    "e": np.float32([8, 9]),
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """An open run of random EMA weights."""
    workdir, experiment = tmp_path_factory.mktemp("exported") / "run", tiny(data__directory="nowhere")
    rng, shapes = np.random.default_rng(0), jax.eval_shape(make_system(experiment.system).init, jax.random.key(0))
    ema = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes)
    save_ema(workdir, ema, step=7, config=to_dict(experiment), vocabulary=keep_small_tokenizer(workdir))
    (workdir / "config.json").write_text(json.dumps(to_dict(experiment)))
    return open_run(workdir)


@pytest.fixture
def folder(opened, tmp_path):
    export_run(opened, tmp_path / "weights", shard_bytes=10**9)
    return tmp_path / "weights"


def test_what_is_exported_opens_to_the_same_run(opened, folder):
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "config.json",
        "model.safetensors",
        "tokenizer/spiece.model",
    ]
    again = open_exported(folder)
    jax.tree.map(np.testing.assert_array_equal, again.params, opened.params)
    assert jax.tree.map(lambda x: x.sharding, again.params) == jax.tree.map(lambda x: x.sharding, opened.params)
    for name in ("experiment", "step", "checkpoint", "dataset", "vocabulary", "tokenizer"):
        assert getattr(again, name) == getattr(opened, name), name
    changed = open_exported(folder, ["sampling.num_steps=3"])
    assert changed.experiment.sampling.num_steps == 3


def test_shards_hold_what_fits_and_an_index_says_where(tmp_path):
    """Of 24, 4, 160 and 8 bytes, at most 40 in a file."""
    names = save_folder(ARRAYS, tmp_path / "out", {"step": "3"}, {"notes/a.txt": b"text"}, shard_bytes=40)
    assert names == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    places = {"a.b": names[0], "a.c": names[0], "d": names[1], "e": names[2]}
    assert index == {"metadata": {"total_size": 196}, "weight_map": places}
    for name in names:
        with safe_open(tmp_path / "out" / name, "numpy") as file:
            assert file.metadata() == {"step": "3"}
    found = SafetensorsFolder(tmp_path / "out")
    for name, array in flat_names(ARRAYS).items():
        np.testing.assert_array_equal(found.read(name, (slice(None),) * array.ndim), array)
    assert (tmp_path / "out/notes/a.txt").read_bytes() == b"text"
    assert (tmp_path / "out").stat().st_mode & 0o777 == (tmp_path / "out/notes").stat().st_mode & 0o777
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert save_folder(ARRAYS, tmp_path / "one", {}, {}, shard_bytes=196) == ["model.safetensors"]
    assert not list((tmp_path / "one").glob("*.json"))


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (1, 2, 2, 2)])
def test_each_device_gets_its_part(opened, folder, sizes):
    axes = ("mesh__data", "mesh__fsdp", "mesh__expert", "mesh__tensor")
    mesh = make_mesh(tiny(**dict(zip(axes, sizes, strict=True))).mesh)
    shardings = opened.system.shardings(mesh)
    like = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    loaded = load_folder(folder, jax.tree.map(like, opened.system.shapes(), shardings))
    jax.tree.map(np.testing.assert_array_equal, loaded, opened.params)
    assert jax.tree.map(lambda x: x.sharding, loaded) == shardings


KILLED = """
import os, sys
from pathlib import Path
import numpy as np
import safetensors.numpy
from ecdit.interop import weights

save = safetensors.numpy.save_file

def killed(arrays, path, metadata):
    save(arrays, path, metadata)
    if "00002" in str(path):
        os.kill(os.getpid(), 9)

safetensors.numpy.save_file = killed
weights.save_folder({"a": np.zeros(9), "b": np.zeros(9)}, Path(sys.argv[1]), {}, {"config.json": b"{}"}, 9)
"""


def test_a_kill_or_an_error_in_the_middle_leaves_no_folder(tmp_path, monkeypatch, cpu_env):
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, out], cwd=ROOT, env=cpu_env())
    assert done.returncode == -9
    assert [path.name.startswith(".out.") for path in tmp_path.iterdir()] == [True]
    shutil.rmtree(next(tmp_path.iterdir()))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(UserError, match=rf"writing {out} failed: .*No space left"):
        save_folder(ARRAYS, out, {}, {"config.json": b"{}"}, 100)
    assert list(tmp_path.iterdir()) == []


def test_the_contents_are_on_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    events, replace = [], os.replace
    monkeypatch.setattr(weights, "sync_tree", lambda path: events.append(f"sync {path.name.endswith('.tmp')}"))
    monkeypatch.setattr(weights, "sync_directory", lambda path: events.append(f"sync {path.name}"))
    monkeypatch.setattr(weights.os, "replace", lambda *paths: (events.append("rename"), replace(*paths)))
    save_folder(ARRAYS, tmp_path / "out", {}, {}, 100)
    assert events == ["sync True", "rename", f"sync {tmp_path.name}"]


def test_a_folder_that_holds_something_is_refused_and_an_empty_one_is_filled(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    save_folder(ARRAYS, out, {}, {}, 1000)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=f"{out} holds other files; name a folder that is missing or empty"):
        save_folder({"a": np.zeros(3)}, out, {}, {}, 1000)
    assert (out / "model.safetensors").read_bytes() == before
    with pytest.raises(UserError, match=f"{tmp_path}/no/out: its directory does not exist"):
        save_folder(ARRAYS, tmp_path / "no/out", {}, {}, 1000)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"{tmp_path}/file is a file"):
        save_folder(ARRAYS, tmp_path / "file", {}, {}, 1000)


def flip_a_weight(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def swap_tokenizer(folder):
    shutil.rmtree(folder / "tokenizer")
    keep_small_tokenizer(folder, ["letters of other words"])


def another_model(folder):
    values = json.loads((folder / "config.json").read_text())
    values["model"]["num_experts"] = 8
    (folder / "config.json").write_text(json.dumps(values))


def another_model_s_weights(folder):
    another_model(folder)
    path = folder / "model.safetensors"
    config = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    save_file(load_file(path), path, read_metadata(folder) | {"config": config})


def another_version(folder):
    values = json.loads((folder / "config.json").read_text())
    values["train"]["wandb"] = True
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (flip_a_weight, r"weights is damaged: \S+: not what was exported"),
        (cut_weights, "model.safetensors is no complete safetensors file"),
        (swap_tokenizer, "the tokenizer in .*/weights/tokenizer is not the one of the training"),
        (another_model, r"weights/config\.json is not what was exported: the weights belong to another config"),
        (another_model_s_weights, r"weights does not hold this model: denoiser\.\S+ is float32\[.*\], not float32\["),
        (another_version, r"weights/config.json, which ecdit [\d.]+\S* wrote, is no config of ecdit .*train\.wandb"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "is no exported folder, it has no tokenizer"),
        (lambda folder: (folder / "tokenizer/spiece.model").unlink(), "weights/tokenizer is empty"),
        (lambda folder: (folder / "config.json").unlink(), "is no exported folder, it has no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"there are no \*\.safetensors files"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_damaged_or_changed_folder_is_refused_by_name(folder, change, said):
    change(folder)
    with pytest.raises(UserError, match=said) as error:
        open_exported(folder)
    assert str(folder) in str(error.value)


def test_weights_of_other_programs_are_refused(folder):
    os.unlink(folder / "model.safetensors")
    save_file({"a": np.zeros(3, np.float32)}, folder / "model.safetensors")
    assert read_metadata(folder) == {}
    says = f"{folder}: its weights were not written by the export of this version of ecdit"
    with pytest.raises(UserError, match=re.escape(says)):
        open_exported(folder)
