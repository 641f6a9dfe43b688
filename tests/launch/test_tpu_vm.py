"""Tests the script for TPU VMs with a stand-in for gcloud, its restarts, and that gcloud knows its flags."""

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
from launch import queued_resources, worker
from launch.backends import tpu_vm
from launch.errors import LaunchError
from launch.job import RESTART_CODES
from tests.launch.jobs import HOSTILE, IMAGE, install, job, placed, wait_for
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
command = sys.argv[3:] if sys.argv[1] != "alpha" else sys.argv[4:]
if sys.argv[1] == "alpha" and not (here / "alpha").exists(): sys.exit("no permission for the alpha API")
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
    if not workers(command[2])[0].exists(): sys.exit(f"no node {command[2]}")
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
# Runs units as systemd does: `boot` starts those that are enabled, and a stop waits for SIGTERM to be heard.
SYSTEMCTL = """
import configparser, os, pathlib, signal, subprocess, sys, time
home = pathlib.Path(os.environ["HOME"])
verb, *rest = [word for word in sys.argv[1:] if not word.startswith("-")]
installed, enabled, pid = home / "installed", home / "enabled", home / "pid"
def alive():
    try: state = pathlib.Path("/proc", pid.read_text(), "stat").read_text().rpartition(")")[2].split()[0]
    except OSError: return False
    return state != "Z"
def start():
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str
    unit.read(installed)
    marker = unit["Unit"]["ConditionPathExists"].removeprefix("!")
    service = unit["Service"]
    if os.path.exists(marker): return
    log = open(service["StandardOutput"].removeprefix("append:"), "a")
    child = subprocess.Popen(service["ExecStart"].split(), cwd=service["WorkingDirectory"], stdin=subprocess.DEVNULL,
                             stdout=log, stderr=log, start_new_session=True)
    pid.write_text(str(child.pid))
if verb == "is-active": sys.exit(0 if alive() else 3)
if verb == "enable":
    enabled.touch()
    if not alive(): start()
if verb == "boot" and enabled.exists(): start()
if verb == "disable":
    enabled.unlink()
    if alive(): os.kill(int(pid.read_text()), signal.SIGTERM)
    while alive(): time.sleep(0.02)
"""
# `install -m 644 FILE /etc/systemd/system/UNIT`
INSTALL = """
import os, pathlib, shutil, sys
assert sys.argv[1:3] == ["-m", "644"] and sys.argv[4].startswith("/etc/systemd/system/")
shutil.copy(sys.argv[3], pathlib.Path(os.environ["HOME"], "installed"))
"""
SUDO = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"
STAND_INS = {"gcloud": GCLOUD, "python3": PYTHON3, "systemctl": SYSTEMCTL, "install": INSTALL, "sudo": SUDO}
# Training: each start notes its command line and ends with the next of `codes`; "wait" waits for SIGTERM and saves.
TRAINING = f"""
import json, os, pathlib, signal, sys, time
def save(*_):
    time.sleep(0.3)
    print("saved", flush=True)
    sys.exit({PREEMPTED})
signal.signal(signal.SIGTERM, save)
with open("starts", "a") as file: print(*sys.argv[1:], os.environ["JAX_PLATFORMS"], file=file)
with open("seen", "w") as file: json.dump([sys.argv[1:], dict(os.environ)], file)
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
    for name, code in {**STAND_INS, "training": TRAINING, "sleep": ""}.items():
        install(programs, name, code)
    path = f"{programs}:{os.environ['PATH']}"
    return tmp_path, {**os.environ, "PATH": path, "STAND_IN": str(tmp_path)}


def run_script(text, environment, cwd=None):
    return subprocess.run(["bash", "-c", text], env=environment, cwd=cwd, capture_output=True, text=True, timeout=60)


def commands(directory):
    return [json.loads(line) for line in (directory / "commands").read_text().splitlines()]


def start_loop(directory, environment, codes, options=OPTIONS, made=None):
    """The restart loop in `directory`, with training that ends with these codes."""
    (directory / "venv/bin").mkdir(parents=True)
    shutil.copy(directory / "bin/training", directory / "venv/bin/python")
    (directory / "codes").write_text(codes)
    command = tpu_vm._train_command(made or placed("v5p-16"), options)
    text = worker.restart_loop(command, options.max_restarts, bool(options.secret_env))
    return subprocess.Popen(["bash", "-c", text], cwd=directory, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("code", [0, 1, 2, 41, 42, 43, 44, 126, 127, 130, 134, 137, 143, 255])
def test_the_loop_restarts_on_the_same_codes_as_the_other_backend(stand_in, code):
    directory, environment = stand_in
    loop = start_loop(directory, environment, f"{code} 0")
    output, _ = loop.communicate(timeout=120)
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
    output, _ = loop.communicate(timeout=120)
    assert loop.returncode == 137
    assert len((directory / "starts").read_text().splitlines()) == 1 + OPTIONS.max_restarts
    assert "restart 3 of at most 3" in output


def test_sigterm_lets_training_save_and_ends_the_loop(stand_in):
    directory, environment = stand_in
    loop = start_loop(directory, environment, "wait 0")
    wait_for(lambda: (directory / "starts").exists())
    loop.send_signal(signal.SIGTERM)
    output, _ = loop.communicate(timeout=120)
    assert "saved" in output
    assert len((directory / "starts").read_text().splitlines()) == 1
    assert loop.returncode == PREEMPTED


def test_the_loop_runs_the_command_of_the_job_with_its_environment(stand_in):
    directory, environment = stand_in
    start_loop(directory, environment, "0", EVERYTHING).communicate(timeout=120)
    flags = [*job("v5p-256").train_flags, job("v5p-256").checked_flag()]
    assert (directory / "starts").read_text().split() == ["-m", "ecdit.train", *flags, "tpu,cpu"]


@pytest.mark.parametrize("image", ["", IMAGE])
def test_no_value_is_read_as_code_on_a_worker(stand_in, image):
    """Each hostile value arrives as it was given: in a flag, in the workdir, in the environment."""
    directory, environment = stand_in
    install(directory / "bin", "docker", "import sys; sys.argv[0] = 'docker'\n" + TRAINING)
    flags = tuple(f"--config.key{i}={value}" for i, value in enumerate(HOSTILE))
    made = dataclasses.replace(placed("v5p-16"), train_flags=(*flags, *HOSTILE))
    names = [f"V{i}" for i in range(len(HOSTILE))]
    env = tuple(f"{name}={value}" for name, value in zip(names, HOSTILE, strict=True))
    options = dataclasses.replace(OPTIONS, env=env, image=image, unpinned_image=True)
    environment["LC_ALL"] = "C.UTF-8"
    loop = start_loop(directory, {**environment, "JAX_PLATFORMS": "tpu,cpu"}, "0", options, made)
    output, _ = loop.communicate(timeout=120)
    assert loop.returncode == 0, output
    arguments, seen = json.loads((directory / "seen").read_text())
    assert arguments[arguments.index("ecdit.train") + 1 : -1] == [*flags, *HOSTILE]
    if image:
        assert [arguments[i + 1] for i, word in enumerate(arguments) if word == "--env"][2:] == list(env)
    else:
        assert [seen[name] for name in names] == HOSTILE
    assert not list(directory.rglob("hacked"))


def test_no_value_is_read_as_code_where_the_script_runs(stand_in, monkeypatch):
    """Names of files, of secrets and of the checkout stand in the script itself."""
    directory, environment = stand_in
    checkout = directory / "check out's $(touch hacked)"
    mine = [f"mine/{name}.py" for name in HOSTILE if "\\" not in name] + ["-rf.py"]
    for file in (*tpu_vm.CODE, tpu_vm.LOCK, tpu_vm.BUILD_LOCK, *mine):
        (checkout / file).parent.mkdir(parents=True, exist_ok=True)
        (checkout / file).touch() if "." in file else (checkout / file).mkdir(exist_ok=True)
    monkeypatch.setattr(tpu_vm, "ROOT", checkout)
    secrets = directory / "'; touch hacked; '"
    secrets.write_text("A_TOKEN=sesame $(touch hacked)' \"\nOTHER=`touch hacked`\n")
    secrets.chmod(0o600)
    (directory / "states").write_text("ACTIVE")
    made = dataclasses.replace(placed("v5p-16"), files=tuple(mine), train_flags=tuple(HOSTILE))
    options = dataclasses.replace(OPTIONS, secret_env=("A_TOKEN",), secret_file=str(secrets))
    text = tpu_vm.script(made, options)
    assert "sesame" not in text
    done = run_script(text, {**environment, "LC_ALL": "C.UTF-8"}, directory)
    assert done.returncode == 0, done.stderr
    home = directory / f"{made.name}.0" / worker.DIRECTORY
    wait_for((home / "seen").exists)
    wait_for(lambda: (home / "seen").read_text().endswith("]"))
    arguments, seen = json.loads((home / "seen").read_text())
    assert arguments[2:-1] == HOSTILE
    assert seen["A_TOKEN"] == "sesame $(touch hacked)' \""
    assert "OTHER" not in seen
    assert all((home / file).exists() for file in mine)
    assert (home / worker.SECRETS).stat().st_mode & 0o777 == 0o600
    assert not list(directory.rglob("hacked"))
    for command in queued_resources.stop_commands(made.name, 1, "", ""):
        subprocess.run(command, env=environment, check=True, timeout=120)


@pytest.mark.parametrize("path", ["mine/a\\nb.py", "@archive.py"])
def test_files_that_tar_would_not_take_by_their_names_are_refused(path):
    with pytest.raises(LaunchError, match="must have no backslash"):
        tpu_vm.script(dataclasses.replace(placed("v5p-16"), files=(path,)), OPTIONS)


@pytest.mark.parametrize("at", range(4))
def test_control_characters_are_refused_wherever_they_could_end_a_line(at):
    """The end word of a heredoc, on a line of its own, once ended it, and the next line ran as a command."""
    word = "x\nEND_OF_LOOP\ntouch hacked\n"
    made, options = placed("v5p-16"), OPTIONS
    if at == 0:
        made = dataclasses.replace(made, train_flags=(f"--config.train.wandb_project={word}",))
    elif at == 1:
        options = dataclasses.replace(options, env=(f"NAME={word}",))
    else:
        options = dataclasses.replace(options, **{("project", "runtime_version")[at - 2]: word})
    with pytest.raises(LaunchError):
        tpu_vm.script(made, options)


@pytest.mark.parametrize("key", ["project", "zone", "runtime_version", "service_account", "image"])
@pytest.mark.parametrize("value", ["--flag", "a b", "$(x)", "a;b", "a'b", "a\nb"])
def test_values_for_the_cloud_are_of_the_clouds_own_form(key, value):
    with pytest.raises(LaunchError, match=f"--{key.replace('_', '-')}="):
        tpu_vm.check_options(dataclasses.replace(OPTIONS, **{key: value}))


def test_an_image_without_a_digest_is_refused_unless_told():
    tagged = dataclasses.replace(OPTIONS, image="repository/ecdit:1")
    with pytest.raises(LaunchError, match="must end with @sha256:DIGEST"):
        tpu_vm.check_options(tagged)
    tpu_vm.check_options(dataclasses.replace(tagged, unpinned_image=True))
    tpu_vm.check_options(dataclasses.replace(tagged, image=IMAGE))


@pytest.mark.parametrize(
    ("text", "mode", "says"),
    [
        ("A_TOKEN=x\n", 0o640, "has mode 0640, others could read it: must be 0600"),
        ("A_TOKEN=x\n", 0o644, "has mode 0644, others could read it: must be 0600"),
        ("B=x\n", 0o600, "must have one line A_TOKEN=VALUE"),
        (None, 0, "No such file"),
    ],
)
def test_a_file_of_secrets_that_others_can_read_or_that_lacks_one_is_refused(tmp_path, text, mode, says):
    path = tmp_path / "secrets"
    if text is not None:
        path.write_text(text)
        path.chmod(mode)
    with pytest.raises(LaunchError, match=says):
        tpu_vm.check_options(dataclasses.replace(OPTIONS, secret_env=("A_TOKEN",), secret_file=str(path)))


@pytest.mark.parametrize(("mode", "code"), [(0o600, 0), (0o644, 1)])
def test_the_script_too_looks_at_the_file_of_secrets_itself_and_not_at_a_link_to_it(tmp_path, mode, code):
    path, link = tmp_path / "secrets", tmp_path / "link"
    path.write_text("A_TOKEN=x\n")
    path.chmod(mode)
    link.symlink_to(path)
    options = dataclasses.replace(OPTIONS, secret_env=("A_TOKEN",), secret_file=str(link))
    assert run_script("\n".join(tpu_vm._secret_check(options)), os.environ).returncode == code


@pytest.mark.parametrize("text", [*tpu_vm._setup(placed("v5p-16"), OPTIONS), (ROOT / "launch/Dockerfile").read_text()])
def test_whatever_a_host_installs_has_a_version(text):
    """By hashes, by a version, or from the checkout by a build that installs nothing."""
    for line in re.findall(r"pip install (.*?)(?:&&|\n|$)", text):
        assert "--require-hashes " in line or re.search(r" \w+==[0-9.]+ ", line) or "--no-build-isolation -" in line, (
            line
        )
        assert ("--editable ." in line or "-e ." in line) == ("--no-deps --no-build-isolation" in line)
    locked = re.findall(r"^(?:[a-z].*|    --hash=sha256:[0-9a-f]{64}.*)$", (ROOT / tpu_vm.BUILD_LOCK).read_text(), re.M)
    assert [line.partition("==")[0] for line in locked if "==" in line] == ["setuptools"]
    assert len(locked) > 1


def test_sigterm_that_comes_before_the_loop_knows_its_process_reaches_it(stand_in):
    directory, environment = stand_in
    command = ["bash", "-c", "sleep 100"]
    text = worker.restart_loop(command, 1).replace("  child=$!\n", "  kill -TERM $$\n  child=$!\n")
    assert run_script(text, {**environment, "PATH": os.environ["PATH"]}, directory).returncode == 128 + 15


def test_an_installed_package_is_no_checkout_and_is_refused_before_tpus_are_asked_for(tmp_path, monkeypatch):
    for name in ("ecdit", "launch"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tpu_vm, "ROOT", tmp_path)
    missing = "configs, setup.py, pyproject.toml, launch/requirements.lock, launch/build.lock"
    says = f"{tmp_path} is no checkout: it has no {missing}"
    with pytest.raises(LaunchError, match=re.escape(says)):
        tpu_vm.check_options(OPTIONS)
    tpu_vm.check_options(dataclasses.replace(OPTIONS, image=IMAGE))


def test_autocheckpoint_is_asked_for_and_done_without_where_the_api_refuses(stand_in):
    directory, environment = stand_in
    (directory / "states").write_text("NONE SUSPENDED")
    made = placed("v5p-16")
    refused = run_script(tpu_vm.script(made, OPTIONS), environment)
    assert "so without" in refused.stderr
    (asked,) = [command for command in commands(directory) if command[1] == "create"]
    assert "--autocheckpoint-enabled" not in asked
    (directory / "states").write_text("NONE SUSPENDED")
    (directory / "commands").unlink()
    (directory / "alpha").touch()
    run_script(tpu_vm.script(made, OPTIONS), environment)
    (asked,) = [command for command in commands(directory) if command[1] == "create"]
    assert "--autocheckpoint-enabled" in asked


def test_training_goes_on_after_a_reboot_and_an_ended_run_does_not(stand_in):
    directory, environment = stand_in
    (directory / "states").write_text("ACTIVE")
    made = placed("v5p-16")
    done = run_script(tpu_vm.script(made, OPTIONS), environment)
    assert done.returncode == 0, done.stderr
    at = directory / f"{made.name}.0"
    home, place = at / worker.DIRECTORY, {**environment, "HOME": str(at)}
    starts = home / "starts"
    wait_for(starts.exists)
    boot = [directory / "bin/systemctl", "boot"]
    pid = int((at / "pid").read_text())
    os.killpg(pid, signal.SIGKILL)  # as a reset does: nothing hears SIGTERM
    (home / "codes").write_text("2")  # the next start ends with an error
    subprocess.run(boot, env=place, check=True, timeout=120)
    wait_for((home / worker.ENDED).exists)
    assert len(starts.read_text().splitlines()) == 2
    subprocess.run(boot, env=place, check=True, timeout=120)
    assert len(starts.read_text().splitlines()) == 2
    assert "ended, exit code 2" in (home / "log").read_text()
    for command in queued_resources.stop_commands(made.name, 1, "", ""):
        subprocess.run(command, env=environment, check=True, timeout=120)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_can_read_the_unit(tmp_path):
    path = tmp_path / worker.UNIT
    path.write_text(worker.UNIT_TEXT.replace("@USER@", "root").replace("@DIRECTORY@", str(tmp_path)))
    done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, timeout=60)
    assert (done.returncode, worker.UNIT in done.stderr) == (0, False), done.stderr
    path.write_text(path.read_text().replace("KillMode=mixed", "KillMod=mixed"))
    assert (
        worker.UNIT
        in subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, timeout=60).stderr
    )


def test_the_script_creates_waits_copies_and_starts_every_worker_and_stop_saves_and_deletes(stand_in):
    directory, environment = stand_in
    (directory / "states").write_text("NONE WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    made = placed("v5p-16", 2)
    done = run_script(tpu_vm.script(made, OPTIONS), environment)
    assert done.returncode == 0, done.stderr
    assert "is WAITING_FOR_RESOURCES" in done.stdout
    workers = [directory / f"{made.name}-{slice_}.{i}" for slice_ in range(2) for i in range(2)]
    run = [each / worker.DIRECTORY for each in workers]
    wait_for(lambda: all((home / "starts").exists() for home in run))
    for home in run:
        assert (home / "configs/ec_dit.py").exists()
        assert (home / "ecdit/train.py").exists()
    kinds = [command[:2] for command in commands(directory)]
    assert kinds.count(["queued-resources", "create"]) == 1
    first_start = next(i for i, command in enumerate(commands(directory)) if "enable --now" in str(command))
    assert ["tpu-vm", "scp"] not in kinds[first_start:]  # no slice waits for one that is not ready

    again = run_script(tpu_vm.script(made, OPTIONS), environment)
    assert again.returncode != 0
    assert "training runs already" in again.stdout
    assert sum(command[1] == "create" for command in commands(directory)) == 1

    for command in queued_resources.stop_commands(made.name, 2, "", ""):
        subprocess.run(command, env=environment, check=True, timeout=120)
    assert ["saved" in (home / "log").read_text() for home in run] == [True] * 4
    assert commands(directory)[-1][:3] == ["queued-resources", "delete", made.name]


def test_a_queued_resource_that_has_ended_is_said_to_have(stand_in):
    directory, environment = stand_in
    (directory / "states").write_text("SUSPENDED")
    done = run_script(tpu_vm.script(placed("v5p-16"), OPTIONS), environment)
    assert done.returncode == 1
    assert "is SUSPENDED: stop it first" in done.stderr
    assert [command[1] for command in commands(directory)] == ["describe", "describe"]


def test_a_queued_resource_that_cannot_be_described_is_not_waited_for_for_ever(stand_in):
    directory, environment = stand_in
    failed = ["NONE"] * (tpu_vm.MAX_FAILURES - 1)
    (directory / "states").write_text(" ".join(["NONE", *failed, "PROVISIONING", "NONE"]))
    made = placed("v5p-16")
    done = run_script(tpu_vm.script(made, OPTIONS), environment)
    assert done.returncode == 1
    assert f"{made.name}: gcloud could not describe it 10 times in a row" in done.stderr
    described = [command[1] for command in commands(directory) if command[1] == "describe"]
    assert len(described) == 1 + len(failed) + 1 + tpu_vm.MAX_FAILURES


@pytest.fixture
def stop_here(stand_in, monkeypatch):
    """The stand-ins' directory, where this process finds them too, with the workers of two nodes."""
    directory, environment = stand_in
    install(directory / "bin", "systemctl", "open('saved', 'w')")
    for name in ("PATH", "STAND_IN"):
        monkeypatch.setenv(name, environment[name])
    for worker_ in ("job-0.0", "job-0.1", "job-1.0", "job-1.1"):
        (directory / worker_).mkdir()
    return directory


def test_stop_keeps_the_tpus_of_workers_that_it_does_not_reach_and_says_how_to_reach_or_release_them(stop_here):
    (stop_here / "states").write_text("ACTIVE")
    with pytest.raises(LaunchError) as caught:
        queued_resources.stop("job", 1, "p", "z")
    place = "--project=p --zone=z"
    assert f"python -m launch.stop --backend=tpu-vm --name=job {place} --slices=N" in str(caught.value)
    assert f"gcloud compute tpus queued-resources delete job --force {place} --quiet" in str(caught.value)
    assert [command[1] for command in commands(stop_here)] == ["describe", "ssh"]
    assert queued_resources.stop("job", 2, "p", "z") == 0
    assert len(list(stop_here.glob("job-*/saved"))) == 4
    assert [command[1] for command in commands(stop_here)[2:]] == ["describe", "ssh", "ssh", "delete"]


@pytest.mark.parametrize(
    ("state", "done", "code"), [("SUSPENDED", ["describe", "delete"], 0), ("NONE", ["describe"], 1)]
)
def test_stop_deletes_a_queued_resource_without_workers_directly(stop_here, state, done, code):
    (stop_here / "states").write_text(state)
    assert queued_resources.stop("job", 2, "", "") == code
    assert [command[1] for command in commands(stop_here)] == done


def test_one_slice_is_a_node_and_several_have_a_prefix():
    one, two = (tpu_vm.create_command(placed("v5p-16", slices), OPTIONS) for slices in (1, 2))
    name = placed("v5p-16").name
    assert f"--node-id={name}" in one
    assert {"--node-count=2", f"--node-prefix={name}"} <= set(two)
    assert queued_resources.nodes(name, 1) == [name]
    assert queued_resources.nodes(name, 2) == [f"{name}-0", f"{name}-1"]


@pytest.mark.parametrize(
    ("capacity", "flags"), [("on-demand", set()), ("spot", {"--spot"}), ("reserved", {"--reserved"})]
)
def test_the_tpus_are_of_the_capacity_that_was_asked_for(capacity, flags):
    command = tpu_vm.create_command(placed("v5p-16"), dataclasses.replace(OPTIONS, capacity=capacity))
    assert {"--spot", "--reserved"} & set(command) == flags


def test_a_container_brings_its_code():
    options = dataclasses.replace(EVERYTHING, image=IMAGE)
    text, command = tpu_vm.script(placed("v5p-16"), options), tpu_vm._train_command(placed("v5p-16"), options)
    assert f"docker pull {IMAGE}" in text
    at = command.index(IMAGE)
    assert command[at - 2 : at + 4] == ["--env", "A=b c", IMAGE, "python", "-m", "ecdit.train"]
    assert "tar -cf" not in text


@pytest.mark.parametrize(
    ("host", "known"),
    [
        *(("us-east5-docker.pkg.dev", True), ("gcr.io", True), ("eu.gcr.io", True)),
        *(("docker.io", False), ("localhost:5000", False), ("evil-gcr.io", False), ("gcr.io.example.com", False)),
    ],
)
def test_docker_gets_the_account_of_the_vm_for_registries_of_google_alone(stand_in, host, known):
    directory, environment = stand_in
    for name in ("gcloud", "docker"):
        install(directory / "bin", name, f"import sys; print({name!r}, *sys.argv[1:], file=open('seen', 'a'))")
    image = f"{host}/project/ecdit{IMAGE[IMAGE.index('@') :]}"
    pull = tpu_vm._setup(placed("v5p-16"), dataclasses.replace(OPTIONS, image=image))[-1]
    assert run_script(pull, environment, directory).returncode == 0
    login = [f"gcloud auth configure-docker {host} --quiet"] if known else []
    assert (directory / "seen").read_text().splitlines() == [*login, f"docker pull {image}"]


def test_workers_and_the_image_install_the_locked_packages_which_are_all_that_setup_asks_for():
    packaging = pytest.importorskip("packaging.requirements")
    text = (ROOT / tpu_vm.LOCK).read_text()
    locked = dict(re.findall(r"^([a-z0-9._-]+)==(\S+) \\$", text, re.MULTILINE))
    assert len(locked) == len(re.findall(r"^[a-z]", text, re.MULTILINE)) > 50
    assert all("--hash=sha256:" in entry for entry in re.split(r"^(?=[a-z])", text, flags=re.MULTILINE)[1:])
    asked = []
    with pytest.MonkeyPatch.context() as patched:
        import setuptools

        patched.setattr(setuptools, "setup", lambda **values: asked.append(values))
        exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), {"__file__": str(ROOT / "setup.py")})
    (values,) = asked
    extras = [line for extra in ("tpu", "gcs", "wandb") for line in values["extras_require"][extra]]
    for line in [*values["install_requires"], *extras]:
        needed = packaging.Requirement(line)
        name = needed.name.lower().replace("_", "-")
        assert needed.specifier.contains(locked[name]), f"{line}: locked {locked[name]}"
    assert "libtpu" in locked
    script, dockerfile = tpu_vm.script(placed("v5p-16"), OPTIONS), (ROOT / "launch/Dockerfile").read_text()
    assert f"--require-hashes -r {tpu_vm.LOCK}" in script
    assert f"--require-hashes --requirement {tpu_vm.LOCK}" in dockerfile
    assert "--no-deps --no-build-isolation -e ." in script
    assert "--no-deps --no-build-isolation --editable ." in dockerfile


def test_the_image_has_the_python_and_the_code_that_workers_get():
    lines = (ROOT / "launch/Dockerfile").read_text().splitlines()
    assert lines[lines.index("FROM ${BASE}") - 1] == f"ARG BASE=python:{tpu_vm.PYTHON}-slim"
    copied = {file for line in lines if line.startswith("COPY") for file in line.split()[1:-1]}
    copied -= {tpu_vm.LOCK, tpu_vm.BUILD_LOCK}
    assert copied == set(tpu_vm.CODE)
    kept = (ROOT / "launch/Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in kept if line.startswith("!")} == copied
    assert all((ROOT / file).exists() for file in copied)
    minimum = re.search(r'python_requires=">=([\d.]+)"', (ROOT / "setup.py").read_text()).group(1)
    assert [int(n) for n in tpu_vm.PYTHON.split(".")] >= [int(n) for n in minimum.split(".")]


@pytest.mark.parametrize("options", [OPTIONS, EVERYTHING, dataclasses.replace(EVERYTHING, image=IMAGE)])
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
        *(
            tpu_vm.create_command(placed("v5p-16", slices), options, autocheckpoint)
            for slices in (1, 2)
            for options in (OPTIONS, EVERYTHING)
            for autocheckpoint in (False, True)
        ),
        tpu_vm.create_command(made, dataclasses.replace(OPTIONS, capacity="reserved")),
        queued_resources.copy_command("n", ["file"], *place),
        *queued_resources.status_commands(made.name, 2, *place),
        *queued_resources.stop_commands(made.name, 2, *place),
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
