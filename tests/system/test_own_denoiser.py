"""Tests the user's own denoiser in docs/model.md: the real commands train, resume and sample it."""

import hashlib
import json
import re
import runpy
from pathlib import Path

import pytest

from ecdit.config import ConfigError
from ecdit.experiment import make_experiment
from ecdit.planning.counts import count
from ecdit.system import denoiser_class, user_files
from tests.forking import run_forked
from tests.runs import ROOT, command, tiny_values

MODEL = {"latent_size": 32, "latent_channels": 3, "dtype": "float32", "patch_size": 8, "hidden": 64}


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory):
    """FILE.py:Class of the page's code."""
    blocks = re.findall(r"`(\w+\.py)`:\n\n```python\n(.*?)```", (ROOT / "docs/model.md").read_text(), re.DOTALL)
    directory = tmp_path_factory.mktemp("own")
    for name, code in blocks:
        (directory / name).write_text(code)
    assert {name for name, _ in blocks} == {"patch_mlp.py", "my_config.py"}
    return f"{directory}/patch_mlp.py:PatchMlp"


def values(denoiser, data, **changes):
    config = tiny_values(data__directory=str(data), **changes)
    config.denoiser = denoiser
    config.model = MODEL
    return config


@pytest.fixture
def config_file(denoiser, emoji_data, tmp_path):
    """The page's config file, made tiny."""
    page = (ROOT / "docs/model.md").read_text()
    assert 'config.denoiser = "patch_mlp.py:PatchMlp"' in page
    path = tmp_path / "my_config.py"
    path.write_text(
        "from tests.system.test_own_denoiser import values\n\n\n"
        f"def get_config():\n    return values({denoiser!r}, {str(emoji_data)!r}, train__num_steps=6, "
        "optimizer__warmup_steps=1, optimizer__learning_rate=3e-3)\n"
    )
    return path


def test_the_page_s_denoiser_trains_resumes_and_draws(config_file, cpu_env, tmp_path):
    train = command("train", f"--config={config_file}", f"--workdir={tmp_path}/run", "--config.checkpoint.every=2")
    first = run_forked([*train, "--config.train.num_steps=4"], cpu_env())
    assert first.returncode == 0, first.stderr
    again = run_forked(train, cpu_env())
    assert "resumed from step 4" in again.stdout, again.stdout + again.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 6
    assert sum(losses[3:]) < sum(losses[:3]), losses
    sample = command("sample", f"--workdir={tmp_path}/run", "--prompt=red heart", f"--out={tmp_path}/out")
    drawn = run_forked(sample, cpu_env())
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "out/00000.png").exists()
    other = [*sample[:-1], f"--out={tmp_path}/other", "--experts"]
    assert "has no experts to count" in run_forked(other, cpu_env()).stderr


def test_a_changed_file_neither_resumes_nor_samples(denoiser, emoji_data, cpu_env, tmp_path):
    path, _, name = denoiser.rpartition(":")
    own = tmp_path / "own.py"
    own.write_text(Path(path).read_text())
    config = tmp_path / "config.py"
    config.write_text(
        "from tests.system.test_own_denoiser import values\n\n\n"
        f"def get_config():\n    return values({f'{own}:{name}'!r}, {str(emoji_data)!r}, train__num_steps=2)\n"
    )
    train = command("train", f"--config={config}", f"--workdir={tmp_path}/run")
    assert run_forked(train, cpu_env()).returncode == 0
    own.write_text(own.read_text().replace("1000 * time", "999 * time"))
    again = run_forked(train, cpu_env())
    assert again.returncode == 2
    assert f"config.files.{own}: saved " in again.stderr
    sample = command("sample", f"--workdir={tmp_path}/run", "--prompt=a", f"--out={tmp_path}/out")
    drawn = run_forked(sample, cpu_env())
    assert f"error: {own} is not what {tmp_path}/run was trained with" in drawn.stderr


def test_the_page_s_config_is_one(denoiser, monkeypatch):
    directory = Path(denoiser.rpartition(":")[0]).parent
    monkeypatch.chdir(directory)
    experiment = make_experiment(runpy.run_path(str(directory / "my_config.py"))["get_config"]())
    assert experiment.denoiser == "patch_mlp.py:PatchMlp"
    assert experiment.model.hidden == 256


def test_the_hash_is_of_the_code_that_runs_and_not_of_a_later_file(denoiser, tmp_path):
    """A run that saves after its file was edited would otherwise be resumed by other code."""
    path, _, name = denoiser.rpartition(":")
    own, source = tmp_path / "own.py", "from __future__ import annotations\n" + Path(path).read_text()
    own.write_text(source)
    assert denoiser_class(f"{own}:{name}").Config.__name__ == "MlpConfig"
    own.write_text("another = 1")
    assert user_files(f"{own}:{name}") == {str(own): hashlib.sha256(source.encode()).hexdigest()}


def test_its_parameters_and_flops_are_counted(denoiser, emoji_data):
    """Two matrices with biases: (192 + 32 + 64) x 64 and 64 x 192; 16 patches."""
    counts = count(make_experiment(values(denoiser, emoji_data)))
    assert counts.denoiser_params == counts.activated_params == (192 + 32 + 64) * 64 + 64 + 64 * 192 + 192
    assert counts.flops_per_image["mlp"] == {"flops": 2.0 * 16 * (2 * 192 + 32 + 64) * 64, "tokens": 16.0}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mlp", 'must be "ec_dit" or FILE.py:Class'),
        ("missing.py:Mlp", "there is no file missing.py"),
        ("ecdit/errors.py:Mlp", "has no class Mlp"),
        ("ecdit/errors.py:UserError", "UserError needs a dataclass as its `Config`"),
    ],
)
def test_a_name_that_is_no_denoiser_is_refused(name, said, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=r"config\.denoiser") as error:
        denoiser_class(name)
    assert said in str(error.value)
