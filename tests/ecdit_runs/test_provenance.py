"""Tests the record in a checkpoint of how it was made, and what a run does if it differs."""

import hashlib
import importlib.metadata
import json
import subprocess

import pytest

from ecdit.checkpoints import arrays
from ecdit.checkpoints.compatibility import check_same_model
from ecdit.checkpoints.restore import CheckpointError, Meta
from ecdit.config import changeable, to_dict
from ecdit.runs import provenance
from ecdit.runs.provenance import code_state, facts_of_a_host, library_versions, source_hash
from ecdit.runs.training_run import Accepted
from tests.runs import tiny


def rewrite(workdir, step, change):
    """Changes the JSON of a checkpoint, with a digest that is right."""
    path = workdir / f"checkpoints/{step}/meta/metadata"
    values = {key: value for key, value in json.loads(path.read_text()).items() if key != "digest"}
    change(values)
    path.write_text(json.dumps(arrays.meta_json(values)))


def read(workdir, step):
    return json.loads((workdir / f"checkpoints/{step}/meta/metadata").read_text())


def test_a_checkpoint_records_code_versions_config_and_data(toy):
    toy.train(num_steps=2, every=2)
    meta = read(toy.workdir, 2)
    assert meta["code"] == code_state()
    assert set(meta["versions"]) >= {"python", "ecdit", "jax", "flax", "optax", "orbax-checkpoint", "grain"}
    assert (meta["dataset"], meta["vocabulary"]) == ("toy", hashlib.sha256(b"toy's words").hexdigest())
    assert meta["config_hash"] == provenance.config_hash(meta["config"])


@pytest.mark.parametrize("installed", ["0.0.9", None])
def test_the_version_of_a_backend_s_compiler_is_recorded_and_compared_if_it_is_installed(monkeypatch, installed):
    """libtpu compiles the step: hosts with different ones may compute differently."""
    version = importlib.metadata.version

    def asked(name):
        if name == "libtpu" and installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed if name == "libtpu" else version(name)

    monkeypatch.setattr(importlib.metadata, "version", asked)
    assert library_versions().get("libtpu") == installed
    assert facts_of_a_host({}, [], "").get("version of libtpu") == installed


def test_another_data_position_than_the_config_gives_is_refused(toy):
    toy.train(num_steps=4, every=2)
    rewrite(toy.workdir, 4, lambda values: values.update(next_row=160))
    toy.accepted = Accepted(data_order=True)  # which is about versions
    with pytest.raises(CheckpointError, match=r"goes on with row 160 of the data, but by this config it is row 64"):
        toy.train(num_steps=6, every=2)
    assert toy.losses()[-1] == (4, 4.0)


def test_other_versions_and_code_are_named_in_one_line(toy, capsys):
    toy.train(num_steps=4, every=2)

    def older(values):
        values["versions"] |= {"jax": "0.1"}
        values["code"] |= {"sources": "0" * 64, "commit": "f" * 40, "dirty": "yes"}

    rewrite(toy.workdir, 4, older)
    capsys.readouterr()
    toy.train(num_steps=6, every=2)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "other code" in line)
    assert f"jax 0.1 -> {library_versions()['jax']}" in line
    assert "ecdit's sources 000000000000 (commit ffffffffffff, changed) -> " in line
    toy.train(num_steps=8, every=2)
    assert "other code" not in capsys.readouterr().out


def test_another_version_of_what_orders_the_data_is_refused_unless_accepted(toy, capsys):
    toy.train(num_steps=4, every=2)
    rewrite(toy.workdir, 4, lambda values: values["versions"].update(grain="0.0.1"))
    with pytest.raises(CheckpointError, match=r"grain 0\.0\.1, now .*--accept_data_order"):
        toy.train(num_steps=6, every=2)
    toy.accepted = Accepted(data_order=True)
    assert toy.train(num_steps=6, every=2) == 0
    assert "grain 0.0.1 -> " in capsys.readouterr().out


def test_the_hash_of_the_sources_is_of_names_and_contents(tmp_path):
    hashes = set()
    for name, text in (("a.py", "1"), ("a.py", "2"), ("b.py", "1")):
        package = tmp_path / f"{name}{text}"
        (package / "part").mkdir(parents=True)
        (package / "part" / name).write_text(text)
        (package / "notes.txt").write_text(name + text)
        hashes.add(source_hash(package))
        hashes.add(source_hash(package))
    assert len(hashes) == 3


def test_commit_and_dirtiness_are_those_of_the_package_s_own_checkout(tmp_path, monkeypatch):
    def git(*arguments):
        options = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
        done = subprocess.run(["git", "-C", tmp_path, *options, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (tmp_path / "other.py").write_text("")
    monkeypatch.setattr(provenance, "_PACKAGE", package)
    state = lambda: {key: code_state.__wrapped__()[key] for key in ("commit", "dirty")}  # noqa: E731
    assert state() == {"commit": "", "dirty": ""}
    git("init")
    git("add", "other.py")
    git("commit", "-m", "another project's")
    assert state() == {"commit": "", "dirty": ""}  # as in a virtual environment inside of a checkout
    git("add", "package")
    git("commit", "-m", "the package")
    assert state() == {"commit": git("rev-parse", "HEAD"), "dirty": "no"}
    (package / "__init__.py").write_text("changed")
    assert state()["dirty"] == "yes"
    git("checkout", "package")
    (package / "new.py").write_text("")
    assert state()["dirty"] == "yes"


def meta_of(experiment, vocabulary="words"):
    return Meta(arrays.FORMAT, to_dict(experiment) | {"files": {}}, 0, "data", {}, {}, vocabulary, {}, "")


def compared(source, now, vocabulary="words", allow=False):
    may_differ = changeable(now, "resume") | changeable(now, "phase") | {"text.frozen"}
    return check_same_model(meta_of(source), to_dict(now) | {"files": {}}, may_differ, vocabulary, allow)


def test_weights_of_the_same_model_may_be_taken():
    """Other data, optimizer, precision of the phases and layout do not change what weights mean."""
    now = tiny(
        model__mask_ratio=0.0, text__frozen=True, optimizer__name="adamw", model__remat="full", train__ema_decay=0.5
    )
    assert compared(tiny(), now) == ""


@pytest.mark.parametrize(
    ("key", "value"),
    [("model.rope_theta", 50.0), ("model.router_input", "decoupled"), ("text.activation", "quick_gelu")],
)
def test_weights_whose_names_and_shapes_fit_and_that_mean_something_else_are_refused(key, value):
    now = tiny(**{key.replace(".", "__"): value})
    with pytest.raises(
        CheckpointError, match=rf"config\.{key}: there .*, here {value!r}.*\n.*--accept_init_differences"
    ):
        compared(tiny(), now)
    assert compared(tiny(), now, allow=True).startswith(f"config.{key}: there ")


def test_weights_of_another_vocabulary_are_refused():
    with pytest.raises(CheckpointError, match="vocabulary: there words, here others"):
        compared(tiny(), tiny(), vocabulary="others")


def test_of_the_user_s_files_only_the_denoiser_s_decides_what_weights_mean():
    """A run on other data may start from the weights, whatever file registered the data of the first run."""
    base = to_dict(tiny()) | {"denoiser": "mine.py:Mine"}

    def compare(there, here):
        saved = Meta(arrays.FORMAT, base | {"files": there}, 0, "data", {}, {}, "words", {}, "")
        return check_same_model(saved, base | {"files": here}, set(), "words", True)

    assert compare({"mine.py": "1", "my_tasks.py": "2"}, {"mine.py": "1", "other_tasks.py": "3"}) == ""
    assert compare({"mine.py": "1"}, {"mine.py": "2"}) == "config.files.mine.py: there '1', here '2'"
