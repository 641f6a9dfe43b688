"""Tests the commands `launch.tpu`, `launch.status` and `launch.stop`, with stand-ins for kubectl and gcloud."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from ecdit.exit_codes import PREEMPTED
from launch.job import job_name
from tests.launch.jobs import IMAGE, WORKDIR, install, wait_for
from tests.runs import ROOT, TINY, base_install
from tests.system.test_ec_dit import SMALL

# Notes its command line and its input, and ends with $EXIT_CODE.
STAND_IN = """
import json, os, sys
text = "" if sys.stdin.isatty() else sys.stdin.read()
with open(os.environ["NOTES"], "a") as file: print(json.dumps([sys.argv[1:], text]), file=file)
sys.exit(int(os.environ.get("EXIT_CODE", "0")))
"""
# All that a dry run has to be told, beside its backend.
TRIAL = ["--config.data.placeholder_ok=True", "--config.text.frozen_random_ok=True"]
REQUEST = ["--config=configs/ec_dit.py:M-64E", "--accelerator=v5p-256", f"--workdir={WORKDIR}", *TRIAL]
PLACE = [f"--workdir={WORKDIR}"]


@pytest.fixture
def outside(tmp_path):
    """The environment of a base install with the stand-ins, and where they note what they are asked."""
    for name in ("kubectl", "gcloud", "ssh"):
        install(tmp_path / "bin", name, STAND_IN)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "NOTES": str(tmp_path / "notes"), "PYTHONPATH": str(ROOT)}
    return base_install(env, tmp_path / "base_install")


def launch(module, *flags, env, cwd=ROOT, plan=False, **options):
    """Unless `plan`, without compiling the step, which takes minutes."""
    skip = ["--skip-plan"] if module == "tpu" and not plan else []
    command = [sys.executable, "-m", f"launch.{module}", *flags, *skip]
    return subprocess.run(
        command, env=env, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, **options
    )


def notes(env):
    if not os.path.exists(env["NOTES"]):
        return []
    with open(env["NOTES"]) as file:
        return [json.loads(line) for line in file]


def test_a_dry_run_of_a_jobset_takes_no_other_flag_and_a_real_one_creates_what_it_wrote(outside, tmp_path):
    out = tmp_path / "job.yaml"
    dry = launch("tpu", *REQUEST, "--backend=jobset", "--dry-run", f"--out={out}", env=outside)
    assert dry.returncode == 0, dry.stderr
    found = yaml.safe_load(out.read_text())
    assert found["metadata"]["name"] == job_name(WORKDIR)
    assert found["spec"]["replicatedJobs"][0]["template"]["spec"]["completions"] == 32
    assert "1 x v5p-256 (4x4x8), each: chips 128, hosts 32, chips a host 4" in dry.stdout
    assert "1531.0 GB, 47.8 GB a host" in dry.stdout
    assert dry.stdout.startswith("data: random_latents (PLACEHOLDER, random numbers in place of latents); weights at ")
    assert notes(outside) == []

    flags = ["--backend=jobset", "--context=cluster", f"--image={IMAGE}"]
    real = launch("tpu", *REQUEST, *flags, env={**outside, "EXIT_CODE": "3"})
    assert real.returncode == 3
    ((command, text),) = notes(outside)
    assert command == ["create", "--filename=-", "--context=cluster"]
    assert re.sub("image: .*", "", text) == re.sub("image: .*", "", out.read_text())
    assert f"image: {IMAGE}\n" in text


def test_a_dry_run_on_tpu_vms_writes_the_script(outside, tmp_path):
    out = tmp_path / "job.sh"
    flags = ["--backend=tpu-vm", "--slices=2", "--zone=us-east5-a", "--config.checkpoint.every=500"]
    # Where a TPU's libraries are installed JAX would look for one, and complain.
    environment = {key: value for key, value in outside.items() if key not in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY")}
    done = launch("tpu", *REQUEST, *flags, "--dry-run", f"--out={out}", env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert subprocess.run(["bash", "-n", out]).returncode == 0
    line = next(line for line in done.stdout.splitlines() if "--config.checkpoint.every=500" in line)
    assert {*TRIAL, "--config.mesh.slices=2"} < {*line.split()}
    assert "--zone=us-east5-a" in out.read_text()
    assert notes(outside) == []


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--accelerator=v5p-250"], "the nearest: v5p-128 and v5p-256"),
        (["--workdir=runs/m-64e"], "--workdir=runs/m-64e: must be gs://BUCKET/PATH"),
        ([], "--image is missing: build launch/Dockerfile"),
        (["--image=repository/ecdit:1"], "--image=repository/ecdit:1: must end with @sha256:DIGEST"),
        (["--config.train.wandb_project=x\nEND_OF_LOOP\ntouch hacked\n"], "must have no control characters"),
        (["--env=WANDB_API_KEY=sesame"], "--env=WANDB_API_KEY=...: looks like a secret"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line_before_anything_is_started(outside, flags, says):
    done = launch("tpu", *REQUEST, "--backend=jobset", *flags, env=outside)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert notes(outside) == []


def test_a_config_of_another_directory_is_not_taken_for_the_checkouts(outside, tmp_path):
    """The hosts would get the checkout's file of this name, which is not the one that was checked."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/ec_dit.py").write_text((ROOT / "configs/ec_dit.py").read_text())
    done = launch("tpu", *REQUEST, "--backend=tpu-vm", "--dry-run", env=outside, cwd=tmp_path)
    assert done.returncode == 2
    assert f"--config=configs/ec_dit.py: is {tmp_path}/configs/ec_dit.py here, but the hosts get {ROOT}" in done.stderr


def test_a_program_that_is_not_there_is_named(outside):
    nowhere = {**outside, "PATH": str(ROOT)}
    done = launch("stop", *PLACE, "--backend=jobset", env=nowhere)
    assert (done.returncode, done.stderr) == (2, "error: kubectl is not installed, or not on PATH\n")


def test_status_and_stop_ask_for_the_job_that_the_workdir_names(outside):
    name = job_name(WORKDIR)
    assert launch("status", *PLACE, "--backend=jobset", "--namespace=team", env=outside).returncode == 0
    assert launch("stop", "--name=other", "--backend=jobset", env={**outside, "EXIT_CODE": "1"}).returncode == 1
    assert launch("status", *PLACE, "--backend=tpu-vm", "--slices=2", env=outside).returncode == 0
    # What cannot be looked at is not given back: its workers may not have saved.
    assert launch("stop", *PLACE, "--backend=tpu-vm", env={**outside, "EXIT_CODE": "1"}).returncode == 1
    asked = [command for command, _ in notes(outside)]
    assert asked[0] == ["get", "jobsets.jobset.x-k8s.io", name, "--namespace=team"]
    assert all("--namespace=team" in command and name in " ".join(command) for command in asked[:3])
    assert asked[3][:3] == ["delete", "jobsets.jobset.x-k8s.io", "other"]
    assert [command[2:5] for command in asked[4:7]] == [
        ["queued-resources", "describe", name],
        ["tpu-vm", "ssh", f"{name}-0"],
        ["tpu-vm", "ssh", f"{name}-1"],
    ]
    assert [command[2:5] for command in asked[7:]] == [["queued-resources", "describe", name]]


def test_a_job_that_nobody_launched_is_said_not_to_be_there(outside, tmp_path):
    done = launch("status", "--workdir=runs/none", "--backend=local", env=outside, cwd=tmp_path)
    assert done.returncode == 2
    assert "no such job was launched from this directory" in done.stderr
    assert launch("stop", "--backend=local", env=outside).stderr.startswith("error: --workdir is missing")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("images", "code", "told"),
    [(64, 0, r"fits: \d+\.\d GB of 32 GB a device"), (2**16, 2, r"the step does not fit v4:2x2x1: .*HBM")],
)
def test_a_step_that_does_not_fit_is_refused(outside, tmp_path, images, code, told):
    out = tmp_path / "job.yaml"
    changes = SMALL | {"train.batch_size": images, "model.group": "image", "model.width": 256, "model.heads": 4}
    changes |= {"runtime.distributed": True, "model.remat": "none", "sampling.batch_size": 16}
    flags = ["--config=configs/ec_dit.py:XL-dense", "--workdir=gs://bucket/run", "--accelerator=v4-8"]
    flags += [f"--config.{key}={value}" for key, value in changes.items()]
    done = launch("tpu", *flags, "--dry-run", f"--out={out}", "--backend=jobset", env=outside, plan=True)
    assert done.returncode == code, done.stderr
    assert re.search(told, done.stdout + done.stderr)
    assert out.exists() == (code == 0)


@pytest.mark.slow
def test_two_real_processes_train_here_until_they_are_stopped(outside, tmp_path, emoji_data, cpu_env):
    """v4-16 is two hosts of four chips: two processes of four devices, which end together after a save."""
    environment = {**outside, "JAX_COMPILATION_CACHE_DIR": cpu_env()["JAX_COMPILATION_CACHE_DIR"]}
    workdir, changes = tmp_path / "run", {**TINY, "data.directory": emoji_data, "train.num_steps": 100_000}
    place = ["--backend=local", f"--workdir={workdir}"]
    command = [sys.executable, "-m", "launch.tpu", f"--config={ROOT}/configs/emoji.py", *place, "--accelerator=v4-16"]
    command += [f"--config.{key}={value}" for key, value in changes.items()]
    launcher = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: (workdir / "metrics.jsonl").exists() and len((workdir / "metrics.jsonl").read_text()) > 0, 120)
        shown = launch("status", *place, env=environment, cwd=tmp_path).stdout.splitlines()
        assert [line.split(" (")[0] for line in shown] == ["process 0", "process 1"]
        assert all(" runs: " in line for line in shown)
        assert "has stopped" in launch("stop", *place, env=environment, cwd=tmp_path).stdout
        assert launcher.wait(timeout=120) == PREEMPTED
    finally:
        launcher.terminate()
        printed, _ = launcher.communicate(timeout=60)
    assert "2 processes here" in printed
    assert list((workdir / "checkpoints").iterdir())
    shown = launch("status", *place, env=environment, cwd=tmp_path).stdout
    assert shown.count("has ended") == 2
    assert "had ended already" in launch("stop", *place, env=environment, cwd=tmp_path).stdout
