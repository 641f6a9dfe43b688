"""Tests that a run starts only with the config and code that the launcher checked."""

import re
import sys

import pytest

from ecdit.errors import UserError
from ecdit.experiment import Experiment
from ecdit.runs import checked
from tests.forking import run_forked
from tests.runs import tiny


def encoded(**changes):
    return checked.encode_checked(checked.describe_checked(tiny(**changes)))


def test_what_was_checked_may_run():
    checked.refuse_other(encoded(), tiny())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model__width": 128}, "config.model.width: checked 128, here "),
        ({"phases": [{"after": 4, "changes": {"train.batch_size": 8}}]}, "config.phases: checked [{"),
        ({"train__num_steps": 7}, "config.train.num_steps: checked 7, here "),
    ],
)
def test_another_config_is_refused_with_the_keys_that_differ(changes, says):
    with pytest.raises(UserError, match=re.escape(says)):
        checked.refuse_other(encoded(**changes), tiny())


def test_other_sources_are_refused(monkeypatch):
    given = encoded()
    monkeypatch.setattr(checked, "code_digest", lambda: "0" * 64)
    with pytest.raises(UserError, match=r"ecdit: sources [0-9a-f]{12} were checked, 000000000000 are here"):
        checked.refuse_other(given, tiny())


def test_a_file_of_the_user_that_changed_is_refused(monkeypatch):
    monkeypatch.setattr(Experiment, "user_files", lambda _: {"mine.py": "1"})
    given = encoded()
    monkeypatch.setattr(Experiment, "user_files", lambda _: {"mine.py": "2"})
    with pytest.raises(UserError, match=re.escape("mine.py is another file")):
        checked.refuse_other(given, tiny())


def test_sources_that_changed_or_moved_have_another_digest(tmp_path, monkeypatch):
    monkeypatch.setattr(checked.ecdit, "__file__", str(tmp_path / "__init__.py"))
    for name in ("__init__.py", "training/step.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    before = checked.code_digest()
    assert checked.code_digest() == before
    (tmp_path / "training/step.py").rename(tmp_path / "training/steps.py")
    moved = checked.code_digest()
    (tmp_path / "training/steps.py").write_text("x = 2\n")
    assert len({before, moved, checked.code_digest()}) == 3


@pytest.mark.parametrize("text", ["x", "", "eJw="])
def test_a_damaged_one_is_said_to_be(text):
    with pytest.raises(UserError, match="--checked: is damaged"):
        checked.refuse_other(text, tiny())


def test_the_trainer_refuses_before_it_makes_anything(tmp_path, cpu_env):
    """As in a container that has another config under the same name."""
    # Without the check the mesh, which no device count of this test has, would end it.
    flags = ["--config=configs/emoji.py", f"--workdir={tmp_path}/run", f"--checked={encoded()}", "--config.mesh.data=3"]
    done = run_forked([sys.executable, "-m", "ecdit.train", *flags], cpu_env())
    assert done.returncode == 2
    assert "error: this is not what the launcher checked:\n  config." in done.stderr
    assert not (tmp_path / "run").exists()
