"""Tests that each backend implements the whole protocol, and that commands need nothing else."""

import ast
import inspect
import os
import subprocess
import sys

import pytest

from launch.backends import BACKENDS
from launch.backends.protocol import Backend
from launch.job import job_name
from tests.forking import run_forked
from tests.runs import ROOT
from tests.test_structure import MODULES, imported

WORKDIR = "gs://bucket/runs/emoji"
REQUEST = ["--config=configs/emoji.py", f"--workdir={WORKDIR}", "--config.runtime.distributed=True", "--skip-plan"]


def launch(command, *arguments):
    """Runs a command of launch with the backend of `tests.launch.noting` in the table."""
    flags = ["--backend=noting", *arguments]
    return run_forked([sys.executable, "-m", "tests.launch.noting", command, *flags], dict(os.environ))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_has_all_that_the_protocol_asks_for(name):
    backend = BACKENDS[name]
    assert backend.name == name
    for member, kind in Backend.__annotations__.items():
        assert isinstance(getattr(backend, member), kind), member
    methods = [member for member in vars(Backend) if inspect.isfunction(getattr(Backend, member)) and member[0] != "_"]
    assert {"check", "text", "start", "status", "stop"} <= set(methods)
    for method in methods:
        assert inspect.signature(getattr(type(backend), method)) == inspect.signature(getattr(Backend, method)), method


def test_only_the_table_imports_a_backend():
    for module, path in MODULES.items():
        found = {
            name for _, name in imported(ast.parse((ROOT / path).read_text()), module, path.endswith("__init__.py"))
        }
        backends = {name for name in found if name.startswith("launch.backends.")} - {"launch.backends.protocol"}
        assert not backends or module == "launch.backends", f"{module} imports {backends}"


def test_looking_at_a_job_takes_no_jax():
    code = "import launch.status, sys; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_a_new_backend_brings_its_flags_and_starts_jobs(tmp_path):
    request = [*REQUEST, "--accelerator=v6e-8", "--ink=blue", "--desk=oak"]
    dry = launch("tpu", *request, "--dry-run", f"--out={tmp_path}/job")
    assert dry.returncode == 0, dry.stderr
    assert "\nbackend     noting: a note in blue\n" in dry.stdout
    text = f"{job_name(WORKDIR)} on 1 hosts: blue, oak\n"  # its hosts are large: eight chips of v6e are in one
    assert (tmp_path / "job").read_text() == text
    real = launch("tpu", *request)
    assert real.returncode == 5
    assert real.stdout.endswith(f"started {text}")


@pytest.mark.parametrize("plan", ["--skip-plan", "--noskip-plan"])
def test_a_backend_refuses_a_job_before_its_step_is_compiled(plan):
    done = launch("tpu", *REQUEST, plan, "--accelerator=v6e-8", "--slices=2")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: noting takes one slice\n")


@pytest.mark.parametrize(("command", "code"), [("status", 6), ("stop", 7)])
def test_a_new_backend_shows_and_stops_jobs(command, code):
    done = launch(command, f"--workdir={WORKDIR}", "--slices=2", "--desk=oak")
    assert (done.returncode, done.stdout) == (code, f"{command} {job_name(WORKDIR)} 2 oak\n")


def test_a_sweep_takes_a_new_backend(tmp_path):
    (tmp_path / "sweep.py").write_text("""
CONFIG = "configs/emoji.py"
def get_hyper(hyper):
    return hyper.sweep("config.model.ffn", ["dense", "expert_choice"])
""")
    flags = ["--accelerator=v6e-8", "--skip-plan", f"--sweep={tmp_path}/sweep.py", f"--workdir={WORKDIR}"]
    done = launch("sweep", *flags, "--dry-run", f"--out={tmp_path}/jobs")
    assert done.returncode == 0, done.stderr
    written = {path.name: path.read_text() for path in (tmp_path / "jobs").iterdir()}
    names = {name: job_name(f"{WORKDIR}/{name}") for name in ("ffn-dense", "ffn-expert-choice")}
    assert written == {f"{name}.note": f"{job} on 1 hosts: black, plain\n" for name, job in names.items()}
