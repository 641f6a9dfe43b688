"""Tests real sweeps: done points are skipped, killed ones continue, and a failed one does not stop the others."""

import csv
import json
import os
import signal
import subprocess
import sys

import pytest
import yaml

from ecdit.config import to_dict
from ecdit.errors import UserError
from ecdit.exit_codes import PREEMPTED
from launch.job import job_name
from launch.sweeps import running
from launch.sweeps.hyper import SweepError
from launch.sweeps.points import SweepPoint
from tests.forking import run_forked
from tests.launch.jobs import wait_for
from tests.runs import ROOT, TINY, run, tiny

STEPS = 2
EXPERIMENT = tiny(train__num_steps=STEPS)
# Stand-ins for training. A checkpoint of the last step is what says that a run is done.
DONE = f"import os, sys; os.makedirs(sys.argv[1] + '/checkpoints/{STEPS}'); print('trained')"
FAILS = "import sys; print('why'); sys.exit(5)"
SAVES = f"""
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: print('saving') or time.sleep(0.3) or print('saved') or sys.exit({PREEMPTED}))
print('ready', os.getpid())
time.sleep(60)
"""
UNTIL_TOLD = """
import os, sys, time
def until_told():
    deadline = time.monotonic() + 60
    while not os.path.exists(sys.argv[1] + '.go') and time.monotonic() < deadline:
        time.sleep(0.02)
"""
# Runs what test_sweep.DONE and so on are, by name, in the directory that it is told.
SWEEP = """
import json, sys
from tests.launch import test_sweep
sys.exit(test_sweep.start(json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
"""


def point(name, experiment=EXPERIMENT):
    return SweepPoint(name, (), {}, experiment, {}, "")


def start(codes, directory, parallel=1):
    """Runs a point for each of `codes`, by name: Python that is told its workdir."""
    commands = {name: [sys.executable, "-c", code, f"{directory}/{name}"] for name, code in codes.items()}
    return running.run_points([point(name) for name in codes], commands, running.Path(directory), parallel)


def log(directory, name):
    path = directory / "logs" / f"{name}.log"
    return path.read_text() if path.exists() else ""


def alive(pid):
    return subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout[:1] not in (
        "",
        "Z",
    )


@pytest.fixture
def start_sweep(tmp_path):
    """Starts `start` as a process of its own, and waits until the named points are ready."""
    started = []

    def begin(codes, ready=(), parallel=1):
        command = [sys.executable, "-c", SWEEP, json.dumps(codes), str(tmp_path), str(parallel)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        sweep = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        started.append(sweep)
        wait_for(lambda: all("\nready" in log(tmp_path, name) for name in ready))
        return sweep

    yield begin
    for sweep in started:
        sweep.terminate()
        sweep.communicate(timeout=120)


def test_one_failed_point_does_not_stop_the_rest_and_is_the_only_one_tried_again(tmp_path, capfd):
    codes = {"a": FAILS, "b": DONE, "c": DONE}
    assert start(codes, tmp_path) == 1
    assert capfd.readouterr().out.splitlines()[-2:] == ["2 of 3 points are done", "failed: a: exit code 5: why"]
    assert start(codes | {"a": DONE}, tmp_path) == 0
    shown = capfd.readouterr().out
    assert "done already: b, c" in shown
    assert "3 of 3 points are done" in shown
    assert [log(tmp_path, name).count("\n$ ") + 1 for name in codes] == [2, 1, 1]  # starts


def test_so_many_points_run_at_a_time(tmp_path):
    """Each waits until as many as may run have begun, and notes how many were there at most."""
    code = f"""
import os, sys, time
own, directory = sys.argv[1] + '.runs', os.path.dirname(sys.argv[1])
open(own, 'w').close()
deadline, most = time.monotonic() + 2, 0
while time.monotonic() < deadline and most < 3:
    most = max(most, sum(name.endswith('.runs') for name in os.listdir(directory)))
    time.sleep(0.02)
time.sleep(0.2)
os.remove(own)
open(os.path.join(directory, 'most'), 'a').write(str(most))
{DONE}"""
    assert start({name: code for name in "abcd"}, tmp_path, parallel=2) == 0
    counted = (tmp_path / "most").read_text()
    assert set(counted) == {"2"}
    assert len(counted) == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_points_save_and_starts_no_other(start_sweep, tmp_path, number):
    slow = SAVES.replace("sleep(0.3)", "sleep(1.5)")  # so that there is room for another meanwhile
    sweep = start_sweep({"a": slow, "b": SAVES, "c": DONE}, ready=["a", "b"], parallel=2)
    sweep.send_signal(number)
    assert sweep.wait(timeout=120) == PREEMPTED
    assert all(log(tmp_path, name).endswith("saving\nsaved\n") for name in "ab")
    assert log(tmp_path, "c") == ""
    assert "left: a, b, c; the same command continues" in sweep.stdout.read()


def test_after_a_kill_points_are_told_to_save_and_none_is_started_twice(start_sweep, tmp_path):
    slow = UNTIL_TOLD + SAVES.replace("time.sleep(0.3)", "until_told()")
    sweep = start_sweep({"a": slow, "b": DONE}, ready=["a"])
    child = int(log(tmp_path, "a").split()[-1])
    sweep.kill()
    again = start_sweep({"a": DONE, "b": DONE})
    assert any("waiting for points of an earlier start" in line for line in again.stdout)
    (tmp_path / "a.go").touch()
    assert again.wait(timeout=60) == 0
    # The second start of the point came after the first had saved.
    assert log(tmp_path, "a").index("saved") < log(tmp_path, "a").index("trained")
    assert not alive(child)


def test_a_second_sweep_in_the_same_directory_is_refused(start_sweep, tmp_path):
    start_sweep({"a": SAVES}, ready=["a"])
    with pytest.raises(UserError, match="another sweep runs in it"):
        start({"a": DONE}, tmp_path)


def test_a_workdir_of_another_run_is_refused_before_anything_starts(tmp_path):
    (tmp_path / "b/checkpoints/1").mkdir(parents=True)
    config = to_dict(EXPERIMENT)
    (tmp_path / "b/config.json").write_text(json.dumps(config | {"seed": 7}))
    with pytest.raises(SweepError, match=r"point b: .*holds another run:\n  config.seed: saved 7, now 0"):
        start({"a": DONE, "b": DONE}, tmp_path)
    assert log(tmp_path, "a") == ""
    # What may change on resume may, more steps among it.
    config["train"]["num_steps"] = 1
    (tmp_path / "b/config.json").write_text(json.dumps(config))
    assert not running.is_done(point("b"), tmp_path / "b")
    assert running.is_done(point("b", tiny(train__num_steps=1)), tmp_path / "b")


def test_a_point_that_was_stopped_before_it_listened_has_not_failed(tmp_path):
    """SIGTERM ended it, as it does a process that has no handler yet; unless nobody asked it to stop."""
    for stopping, stopped, failed in ((True, ["a"], []), (False, [], ["a"])):
        progress = running.Progress()
        (tmp_path / running.LOGS).mkdir(exist_ok=True)
        (tmp_path / running.LOGS / "a.log").write_text("why\n")
        running._settle("a", -signal.SIGTERM, 1.0, tmp_path, stopping, progress)
        assert (progress.stopped, list(progress.failed)) == (stopped, failed)
        assert progress.exit_code() == (1 if failed else PREEMPTED)


def sweep_command(path, workdir, *flags):
    return [sys.executable, "-m", "launch.sweep", f"--sweep={path}", f"--workdir={workdir}", *flags]


MODEL_SIZES = "configs/sweeps/model_sizes.py"


def test_a_dry_run_for_pods_writes_a_manifest_for_each_point(tmp_path):
    flags = ["--backend=jobset", "--accelerator=v5p-8", "--config.runtime.distributed=True", "--skip-plan", "--dry-run"]
    done = run(sweep_command(MODEL_SIZES, "gs://bucket/sizes", *flags, f"--out={tmp_path}/jobs"), dict(os.environ))
    assert done.returncode == 0, done.stderr
    written = {path.stem: yaml.safe_load(path.read_text()) for path in (tmp_path / "jobs").iterdir()}
    assert len(written) == 9
    found = written["width-64-ffn-token-choice"]
    assert found["metadata"]["name"] == job_name("gs://bucket/sizes/width-64-ffn-token-choice")
    (job,) = found["spec"]["replicatedJobs"]
    command = job["template"]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert command[:4] == ["python", "-m", "ecdit.train", "--config=configs/emoji.py"]
    changes = {"--config.model.width=64", "--config.model.ffn=token_choice", "--config.runtime.distributed=True"}
    assert changes <= set(command)
    assert "--workdir=gs://bucket/sizes/width-64-ffn-token-choice" in command
    assert "width-64-ffn-token-choice: 1.253 M parameters, 0.663 M activated" in done.stdout


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--paralel=2"], "--paralel=2: no flag of this command"),
        (["--backend=jobset"], "--accelerator is missing"),
        (["--config.model.group=8192"], "point width-32-ffn-dense: config.model.group = '8192'"),
        (["--workdir=gs://bucket/sizes"], "--workdir=gs://bucket/sizes: must be a directory for --backend=local"),
        (["--collect"], "no point of this sweep has been run there"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(tmp_path, flags, says):
    done = run_forked(sweep_command(MODEL_SIZES, tmp_path / "none", *flags), dict(os.environ))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert says in done.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_a_real_sweep_is_killed_goes_on_and_is_collected(tmp_path, emoji_data, cpu_env):
    (tmp_path / "sweep.py").write_text(f"""
CONFIG, SERIES = {str(ROOT / "configs/emoji.py")!r}, ("config.model.ffn",)
def get_hyper(hyper):
    good = hyper.sweep("config.model.ffn", ["dense", "expert_choice"])
    return hyper.chainit([hyper.sweep("config.checkpoint.init_from", ["/none"]), good])
""")
    changes = {**TINY, "data.directory": emoji_data, "train.num_steps": 80, "checkpoint.every": 20}
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    command = sweep_command(tmp_path / "sweep.py", tmp_path / "runs", "--parallel=2", *flags)
    workdir = tmp_path / "runs" / "ffn-dense"
    sweep = subprocess.Popen(command, env=cpu_env(), cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: running.newest_step(workdir) > 0 or sweep.poll() is not None, 300)
    finally:
        sweep.kill()
        sweep.wait()
    again = run(command, cpu_env())
    assert again.returncode == 1, again.stdout + again.stderr
    assert "2 of 3 points are done" in again.stdout
    assert "failed: init-from-none: exit code 2: error: /none: no run's workdir" in again.stdout
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 81))
    assert "resumed from step" in log(tmp_path / "runs", "ffn-dense")

    collected = run([*command, "--collect"], cpu_env())
    assert collected.returncode == 0, collected.stderr
    rows = list(csv.DictReader((tmp_path / "runs/sweep.csv").read_text().splitlines()))
    assert [(row["name"], row["series"], row["step"], bool(row["loss"])) for row in rows] == [
        ("init-from-none", "expert_choice", "0", False),
        ("ffn-dense", "dense", "80", True),
        ("ffn-expert-choice", "expert_choice", "80", True),
    ]
