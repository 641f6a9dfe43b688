"""TPU VMs: the script runs with a stand-in for gcloud, its loop restarts on the right codes, gcloud knows the flags."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess

import pytest

from ecdit.exit_codes import PREEMPTED
from launch.backends import tpu_vm
from launch.job import RESTART_CODES, LaunchError
from tests.launch.jobs import install, job, placed, wait_for
from tests.runs import ROOT

OPTIONS = tpu_vm.Options(
    project="",
    zone="",
    image="",
    runtime_version="",
    service_account="",
    capacity="on-demand",
    max_restarts=3,
    env=(),
)
EVERYTHING = dataclasses.replace(
    OPTIONS,
    project="p",
    zone="us-east5-a",
    service_account="a@p.iam.gserviceaccount.com",
    capacity="spot",
    env=("A=b c",),
)
# Notes its command line; describes a queued resource by the words of `states`, the last one for ever; copies to, and
# runs on, two workers of a TPU VM, each a directory.
GCLOUD = """
import json, os, pathlib, shutil, subprocess, sys
here = pathlib.Path(os.environ["STAND_IN"])
command = sys.argv[3:]
with (here / "commands").open("a") as file: print(json.dumps(command), file=file)
def workers(node): return [here / f"{node}.{i}" for i in range(2)]
if command[1] == "describe":
    state, *later = (here / "states").read_text().split()
    if later: (here / "states").write_text(" ".join(later))
    if state == "NONE": sys.exit("not found")
    print(state)
if command[1] == "scp":
    for worker in workers(command[3].rstrip(":")):
        worker.mkdir(exist_ok=True)
        shutil.copy(command[2], worker)
if command[1] == "ssh":
    text = next(flag for flag in command if flag.startswith("--command=")).removeprefix("--command=")
    codes = [subprocess.run(["bash", "-c", text], cwd=w, env=os.environ | {"HOME": str(w)}).returncode
             for w in workers(command[2])]
    sys.exit(max(codes))
"""
PYTHON3 = """
import pathlib, shutil, sys
if sys.argv[1:4] == ["-m", "uv", "venv"]:
    pathlib.Path("venv/bin").mkdir(parents=True, exist_ok=True)
    shutil.copy(pathlib.Path(__file__).with_name("training"), "venv/bin/python")
"""
# Training: each start notes its command line and ends with the next of `codes`; "wait" waits for SIGTERM and saves.
TRAINING = f"""
import os, pathlib, signal, sys, time
def save(*_):
    time.sleep(0.3)
    print("saved", flush=True)
    sys.exit({PREEMPTED})
signal.signal(signal.SIGTERM, save)
with open("starts", "a") as file: print(*sys.argv[1:], os.environ["JAX_PLATFORMS"], file=file)
code, *later = pathlib.Path("codes").read_text().split() if pathlib.Path("codes").exists() else ["wait"]
pathlib.Path("codes").write_text(" ".join(later))
print("training", flush=True)
deadline = time.monotonic() + 60  # of a test that failed
while code == "wait" and time.monotonic() < deadline: time.sleep(0.01)
sys.exit(int(code) if code != "wait" else 1)
"""


@pytest.fixture
def stand_in(tmp_path):
    """A directory for the stand-ins' state, and the environment in which they are found first."""
    programs = tmp_path / "bin"
    for name, code in {"gcloud": GCLOUD, "python3": PYTHON3, "training": TRAINING, "sleep": ""}.items():
        install(programs, name, code)
    path = f"{programs}:{os.environ['PATH']}"
    return tmp_path, {**os.environ, "PATH": path, "STAND_IN": str(tmp_path)}


def run_script(text, environment):
    return subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True, timeout=60)


def commands(directory):
    return [json.loads(line) for line in (directory / "commands").read_text().splitlines()]


def start_loop(directory, environment, codes, options=OPTIONS):
    """The restart loop in `directory`, with training that ends with these codes."""
    (directory / "venv/bin").mkdir(parents=True)
    shutil.copy(directory / "bin/training", directory / "venv/bin/python")
    (directory / "codes").write_text(codes)
    text = tpu_vm.restart_loop(placed("v5p-16"), options)
    return subprocess.Popen(["bash", "-c", text], cwd=directory, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("code", [0, 1, 2, 41, 42, 43, 44, 126, 127, 134, 137, 143, 255])
def test_the_loop_restarts_on_the_same_codes_as_the_other_backend(stand_in, code):
    directory, environment = stand_in
    loop = start_loop(directory, environment, f"{code} 0")
    output, _ = loop.communicate(timeout=20)
    starts = (directory / "starts").read_text().splitlines()
    assert len(starts) == (2 if code in RESTART_CODES else 1), output
    assert loop.returncode == (0 if code in RESTART_CODES else code)


def test_workers_get_the_user_s_own_files():
    made = dataclasses.replace(placed("v5p-16"), files=("configs/ec_dit.py", "mine/config.py", "mine/patch_mlp.py"))
    copied = next(line for line in tpu_vm.script(made, OPTIONS).splitlines() if line.startswith("tar -cf"))
    assert {"ecdit", "launch", "configs", "mine/config.py", "mine/patch_mlp.py"} <= set(copied.split())
    assert "configs/ec_dit.py" not in copied.split()


def test_the_loop_gives_up_after_so_many_restarts(stand_in):
    directory, environment = stand_in
    loop = start_loop(directory, environment, "137 137 137 137 0")
    output, _ = loop.communicate(timeout=20)
    assert loop.returncode == 137
    assert len((directory / "starts").read_text().splitlines()) == 1 + OPTIONS.max_restarts
    assert "restart 3 of at most 3" in output


def test_sigterm_lets_training_save_and_ends_the_loop(stand_in):
    directory, environment = stand_in
    loop = start_loop(directory, environment, "wait 0")
    wait_for(lambda: (directory / "starts").exists())
    loop.send_signal(signal.SIGTERM)
    output, _ = loop.communicate(timeout=20)
    assert "saved" in output
    assert len((directory / "starts").read_text().splitlines()) == 1
    assert loop.returncode == PREEMPTED


def test_the_loop_runs_the_command_of_the_job_with_its_environment(stand_in):
    directory, environment = stand_in
    start_loop(directory, environment, "0", EVERYTHING).communicate(timeout=20)
    assert (directory / "starts").read_text().split() == ["-m", "ecdit.train", *job("v5p-256").train_flags, "tpu,cpu"]


def test_the_script_creates_waits_copies_and_starts_every_worker_and_stop_saves_and_deletes(stand_in):
    directory, environment = stand_in
    (directory / "states").write_text("NONE WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    made = placed("v5p-16", 2)
    done = run_script(tpu_vm.script(made, OPTIONS), environment)
    assert done.returncode == 0, done.stderr
    assert "is WAITING_FOR_RESOURCES" in done.stdout
    workers = [directory / f"{made.name}-{slice_}.{worker}" for slice_ in range(2) for worker in range(2)]
    run = [worker / tpu_vm.HOME for worker in workers]
    wait_for(lambda: all((home / "starts").exists() for home in run))
    for home in run:
        assert (home / "configs/ec_dit.py").exists()
        assert (home / "ecdit/train.py").exists()
    kinds = [command[:2] for command in commands(directory)]
    assert kinds.count(["queued-resources", "create"]) == 1
    first_start = next(i for i, command in enumerate(commands(directory)) if "run.sh" in str(command))
    assert ["tpu-vm", "scp"] not in kinds[first_start:]  # no slice waits for one that is not ready

    again = run_script(tpu_vm.script(made, OPTIONS), environment)
    assert again.returncode != 0
    assert "training runs already" in again.stdout
    assert sum(command[1] == "create" for command in commands(directory)) == 1

    for command in tpu_vm.stop_commands(made.name, 2, "", ""):
        subprocess.run(command, env=environment, check=True, timeout=20)
    assert ["saved" in (home / "log").read_text() for home in run] == [True] * 4
    assert commands(directory)[-1][:3] == ["queued-resources", "delete", made.name]


def test_a_queued_resource_that_has_ended_is_said_to_have(stand_in):
    directory, environment = stand_in
    (directory / "states").write_text("SUSPENDED")
    done = run_script(tpu_vm.script(placed("v5p-16"), OPTIONS), environment)
    assert done.returncode == 1
    assert "is SUSPENDED: stop it first" in done.stderr
    assert [command[1] for command in commands(directory)] == ["describe", "describe"]


def test_one_slice_is_a_node_and_several_have_a_prefix():
    one, two = (tpu_vm.create_command(placed("v5p-16", slices), OPTIONS) for slices in (1, 2))
    name = placed("v5p-16").name
    assert f"--node-id={name}" in one
    assert {"--node-count=2", f"--node-prefix={name}"} <= set(two)
    assert tpu_vm.nodes(name, 1) == [name]
    assert tpu_vm.nodes(name, 2) == [f"{name}-0", f"{name}-1"]


@pytest.mark.parametrize(
    ("capacity", "flags"), [("on-demand", set()), ("spot", {"--spot"}), ("reserved", {"--reserved"})]
)
def test_the_tpus_are_of_the_capacity_that_was_asked_for(capacity, flags):
    command = tpu_vm.create_command(placed("v5p-16"), dataclasses.replace(OPTIONS, capacity=capacity))
    assert {"--spot", "--reserved"} & set(command) == flags


def test_a_container_brings_its_code():
    text = tpu_vm.script(placed("v5p-16"), dataclasses.replace(EVERYTHING, image="repository/ecdit:1"))
    assert "docker pull repository/ecdit:1" in text
    assert "--env 'A=b c' repository/ecdit:1 python -m ecdit.train" in text
    assert "tar -cf" not in text


def test_workers_install_the_extras_that_the_image_has_and_setup_knows():
    extras = set(tpu_vm.EXTRAS.split(","))
    (line,) = re.findall(r"^RUN pip install .*--editable '\.\[(.+)\]'$", (ROOT / "launch/Dockerfile").read_text(), re.M)
    known = re.search(r"extras_require={(.*)}", (ROOT / "setup.py").read_text(), re.DOTALL).group(1)
    assert set(line.split(",")) == extras <= set(re.findall(r'^ *"(\w+)": \[', known, re.MULTILINE))
    assert "tpu" in extras
    assert f".[{tpu_vm.EXTRAS}]" in tpu_vm.script(placed("v5p-16"), OPTIONS)


def test_the_image_has_the_python_and_the_code_that_workers_get():
    lines = (ROOT / "launch/Dockerfile").read_text().splitlines()
    assert f"FROM python:{tpu_vm.PYTHON}-slim" in lines
    copied = {file for line in lines if line.startswith("COPY") for file in line.split()[1:-1]}
    assert copied == set(tpu_vm.CODE)
    kept = (ROOT / "launch/Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in kept if line.startswith("!")} == copied
    assert all((ROOT / file).exists() for file in copied)
    minimum = re.search(r'python_requires=">=([\d.]+)"', (ROOT / "setup.py").read_text()).group(1)
    assert [int(n) for n in tpu_vm.PYTHON.split(".")] >= [int(n) for n in minimum.split(".")]


@pytest.mark.parametrize("options", [OPTIONS, EVERYTHING, dataclasses.replace(EVERYTHING, image="i")])
def test_it_is_a_script_that_bash_can_read(options):
    for slices in (1, 3):
        checked = subprocess.run(["bash", "-n"], input=tpu_vm.script(placed("v5p-16", slices), options), text=True)
        assert checked.returncode == 0


def test_a_layout_without_a_name_is_refused():
    with pytest.raises(LaunchError, match=re.escape("accelerator v5p:4x4x16: tpu-vm takes accelerators by name")):
        tpu_vm.check(placed("v5p:4x4x16"))
    tpu_vm.check(placed("v5p:4x8x8"))


def test_a_tpu7x_is_refused_for_it_has_no_queued_resources():
    with pytest.raises(LaunchError, match=re.escape("accelerator tpu7x-128: tpu-vm takes v4, v5p, v5e, v6e")):
        tpu_vm.check(placed("tpu7x-128"))


@pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed: its linter knows the flags")
def test_gcloud_knows_every_flag(tmp_path):
    made, place = placed("v5p-16", 2), ("p", "us-east5-a")
    linted = [
        *(tpu_vm.create_command(placed("v5p-16", slices), o) for slices in (1, 2) for o in (OPTIONS, EVERYTHING)),
        tpu_vm.create_command(made, dataclasses.replace(OPTIONS, capacity="reserved")),
        tpu_vm.copy_command("n", ["file"], *place),
        *tpu_vm.status_commands(made.name, 2, *place),
        *tpu_vm.stop_commands(made.name, 2, *place),
    ]
    wrong = [*linted[0], "--no-such-flag"]
    file = tmp_path / "commands.json"
    file.write_text(json.dumps([{"command_string": shlex.join(command)} for command in [*linted, wrong]]))
    done = subprocess.run(
        ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={file}"],
        env={**os.environ, "CLOUDSDK_CONFIG": str(tmp_path / "config")},
        capture_output=True,
        text=True,
    )
    results = json.loads(done.stdout)
    assert [result["error_type"] for result in results] == [None] * len(linted) + ["UnrecognizedArgumentsError"]
