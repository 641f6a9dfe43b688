import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ecdit.exit_codes import PREEMPTED
from launch import local

REPOSITORY = Path(__file__).parents[2]
PROCESS_ID = "import os, signal, sys, time; me = int(os.environ['ECDIT_PROCESS_ID']); "
JOB = "import sys; from launch.local import launch; sys.exit(launch(sys.argv[3:], int(sys.argv[1]), 1, sys.argv[2]))"


def launch(code, log_dir, processes=2, devices=1, **options):
    return local.launch([sys.executable, "-c", PROCESS_ID + code], processes, devices, log_dir, **options)


def read(log_dir, process_id):
    return (log_dir / f"process_{process_id}.log").read_text()


def runs(pid):
    """Whether process `pid` is alive, and no zombie that its parent has yet to reap."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


@pytest.fixture
def start_launcher(tmp_path):
    """Starts a launcher as a process of its own, which signals can be sent to, and waits until its children are ready.

    A child is ready when its log says so.
    """
    launchers = []

    def start(code, processes=2):
        command = [sys.executable, "-c", JOB, str(processes), tmp_path, sys.executable, "-uc", PROCESS_ID + code]
        launcher = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
        launchers.append(launcher)
        logs = [tmp_path / f"process_{i}.log" for i in range(processes)]
        wait_for(lambda: all(log.exists() and "ready" in log.read_text() for log in logs))
        return launcher

    yield start
    for launcher in launchers:
        launcher.terminate()
        launcher.communicate(timeout=120)


def test_processes_know_whom_to_join_and_how_many_devices_they_have(tmp_path):
    names = ["ECDIT_COORDINATOR", "ECDIT_NUM_PROCESSES", "ECDIT_PROCESS_ID", "JAX_PLATFORMS", "XLA_FLAGS"]
    code = f"import json; print(json.dumps([os.environ[name] for name in {names}]))"
    assert launch(code, tmp_path / "logs", processes=3, devices=4) == 0
    rows = [json.loads(read(tmp_path / "logs", i)) for i in range(3)]
    host, port = rows[0][0].split(":")
    assert host == "127.0.0.1"
    assert 1024 <= int(port) < 65536
    assert [row[1:4] for row in rows] == [["3", "0", "cpu"], ["3", "1", "cpu"], ["3", "2", "cpu"]]
    assert {row[0] for row in rows} == {rows[0][0]}
    for row in rows:
        flags = row[4].split()
        assert [f for f in flags if "device_count" in f] == ["--xla_force_host_platform_device_count=4"]


def test_the_device_count_replaces_another_and_leaves_other_flags(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_force_host_platform_device_count=8 --xla_b=2")
    assert local.cpu_environment(2)["XLA_FLAGS"] == "--xla_a=1 --xla_b=2 --xla_force_host_platform_device_count=2"


def test_output_and_errors_go_to_one_log_each_and_replace_an_older_one(tmp_path):
    (tmp_path / "process_1.log").write_text("an older run")
    assert launch("print('out', me); print('err', me, file=sys.stderr)", tmp_path) == 0
    assert [read(tmp_path, i) for i in range(2)] == ["out 0\nerr 0\n", "out 1\nerr 1\n"]


def test_the_first_process_is_heard_while_it_runs_and_the_others_are_not(tmp_path):
    """It waits until its first line is shown, and fails if that takes long."""
    shown = tmp_path / "shown"
    code = f"""
print('one' if me == 0 else 'not shown', flush=True)
shown, begin = open({str(shown)!r}), time.monotonic()
while me == 0 and 'one' not in shown.read():
    time.sleep(0.02)
    time.monotonic() - begin < 20 or sys.exit(7)
print('two')"""
    with shown.open("w") as output, contextlib.redirect_stdout(output):
        assert launch(code, tmp_path / "logs") == 0
    assert shown.read_text() == "one\ntwo\n"


def test_one_failure_ends_the_others_and_gives_its_exit_code(tmp_path, capfd):
    code = "print('lost my data') or sys.exit(7) if me == 1 else time.sleep(60)"
    begin = time.monotonic()
    assert launch(code, tmp_path, processes=3) == 7
    assert time.monotonic() - begin < 20
    shown = capfd.readouterr().err
    assert "process 1 failed with exit code 7" in shown
    assert "lost my data" in shown


def test_one_success_does_not_end_the_others(tmp_path):
    assert launch("me or sys.exit(); time.sleep(0.5); print('done')", tmp_path) == 0
    assert read(tmp_path, 1) == "done\n"


def test_the_first_failure_counts_not_those_that_follow_from_it(tmp_path):
    code = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3)); print('ready', flush=True); "
    code += f"""
while me == 1 and 'ready' not in open({str(tmp_path / "process_0.log")!r}).read(): time.sleep(0.02)
os.kill(os.getpid(), signal.SIGKILL) if me == 1 else time.sleep(60)"""
    assert launch(code, tmp_path) == 128 + signal.SIGKILL


def test_a_process_that_ignores_its_end_is_killed_after_the_grace(tmp_path):
    code = f"""
if me == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print('ready', flush=True)
    time.sleep(60)
while 'ready' not in open({str(tmp_path / "process_0.log")!r}).read(): time.sleep(0.02)
sys.exit(5)"""
    begin = time.monotonic()
    assert launch(code, tmp_path, grace_seconds=1.0) == 5
    assert 1.0 < time.monotonic() - begin < 20


def test_workers_of_a_dead_process_do_not_outlive_it(tmp_path):
    worker = "import time; time.sleep(60)"
    code = f"import subprocess; print(subprocess.Popen([sys.executable, '-c', {worker!r}]).pid)"
    assert launch(code, tmp_path, processes=1) == 0
    worker_id = int(read(tmp_path, 0))
    wait_for(lambda: not runs(worker_id))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_every_process_once_and_they_may_save(start_launcher, tmp_path, number):
    """The first to end, with PREEMPTED as training does, must not cut short the save of the other."""
    code = f"""
def save(number, _):
    print('saving after', number)
    time.sleep(0.3 + me)
    sys.exit({PREEMPTED})
signal.signal(signal.SIGINT, save); signal.signal(signal.SIGTERM, save)
print('ready')
time.sleep(60)"""
    launcher = start_launcher(code)
    launcher.send_signal(number)
    assert launcher.wait(timeout=120) == PREEMPTED
    assert [read(tmp_path, i) for i in range(2)] == [f"ready\nsaving after {int(number)}\n"] * 2


def test_a_signal_that_all_take_as_success_is_success(start_launcher):
    launcher = start_launcher("signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); print('ready'); time.sleep(60)")
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=120) == 0


def test_a_peer_killed_from_outside_ends_the_run(start_launcher, tmp_path):
    launcher = start_launcher("print('ready', os.getpid()); time.sleep(60)")
    survivor, victim = (int(read(tmp_path, i).split()[1]) for i in range(2))
    os.kill(victim, signal.SIGKILL)
    assert launcher.wait(timeout=120) == 128 + signal.SIGKILL
    assert not runs(survivor)


def test_a_command_that_cannot_start_leaves_nothing_behind(tmp_path):
    before = signal.getsignal(signal.SIGINT)  # Python's own handler, or none where the shell has SIGINT ignored
    with pytest.raises(FileNotFoundError):
        local.launch(["/no/such/command"], 2, 1, tmp_path)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_flags_after_the_dashes_go_to_train(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(local, "launch", lambda *arguments: seen.append(arguments) or 9)
    flags = ["--config=configs/emoji.py", "--workdir=w", "--config.train.num_steps=3"]
    assert local.main(["--processes=4", "--devices=2", f"--log_dir={tmp_path}", "--", *flags]) == 9
    assert seen == [([sys.executable, "-m", "ecdit.train", *flags], 4, 2, str(tmp_path))]


@pytest.mark.parametrize("flag", ["--processes=0", "--devices=-1", "--processes=two"])
def test_impossible_sizes_are_refused(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        local.main([flag])
    assert "at least 1" in capsys.readouterr().err


def test_two_real_jax_processes_sum_over_all_their_devices(tmp_path):
    script = f"""
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ecdit import runtime
from ecdit.tuned.compiler_options import NO_TPU_OPTIONS

config = runtime.RuntimeConfig(
    xla_flags=(),
    tpu_options=runtime.TpuOptions(**NO_TPU_OPTIONS),
    keep_host_memory=False,
    compilation_cache="",
    distributed=False,
    heartbeat_seconds=100,
)
runtime.configure(config)
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
rows = jax.make_array_from_callback(
    (4,), NamedSharding(mesh, PartitionSpec("data")), lambda index: jnp.arange(1.0, 5.0)[index]
)
total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(rows)
local = sum(float(shard.data.sum()) for shard in rows.addressable_shards)
with open({str(tmp_path)!r} + f"/result_{{jax.process_index()}}", "w") as result:
    result.write(f"{{jax.process_count()}} {{jax.device_count()}} {{local}} {{float(total)}}")
"""
    assert local.launch([sys.executable, "-c", script], processes=2, devices=2, log_dir=tmp_path / "logs") == 0
    assert [(tmp_path / f"result_{i}").read_text() for i in range(2)] == ["2 4 3.0 10.0", "2 4 7.0 10.0"]
