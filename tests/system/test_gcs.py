"""Workdirs in a bucket: real processes, whose gcsfs, tensorstore and Orbax speak to a server of the tests."""

import io
import json
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from ecdit import storage
from ecdit.config import UserError
from ecdit.storage import as_path
from launch.local import cpu_environment
from tests import events
from tests.gcs_server import serving
from tests.runs import ROOT, command, run, train_command

pytest.importorskip("gcsfs", reason="needs the extra gcs")
STEPS = 12
RUN = {
    "train__num_steps": STEPS,
    "checkpoint__every": 4,
    "checkpoint__keep": 3,
    "optimizer__warmup_steps": 4,
    "train__pictures_every": 4,
}
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


def rows(lines):
    return [{k: v for k, v in json.loads(line).items() if k not in VOLATILE} for line in lines]


def names(store, directory):
    return sorted(n.removeprefix(directory) for n in store.objects if n.startswith(directory))


def lines(store):
    return "".join(store.objects["runs/a/metrics/" + n][0].decode() for n in names(store, "runs/a/metrics/")).split(
        "\n"
    )[:-1]


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
    after_kill = set(store.objects)
    first = compiled(store)
    process = train(emoji_data, env)
    # Written by the thread that trains: the signal is seen in the next step.
    on_write(store, "runs/a/metrics/00000005.jsonl", lambda: process.send_signal(signal.SIGTERM))
    printed += [ended(process, 42), ended(train(emoji_data, env), 0)]
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
    parts = storage.Parts(lambda data: tmp_path / data[:1].decode())
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
    found = rows(lines(store))
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert found == rows((on_disk / "metrics.jsonl").read_text().splitlines())

    place = f"checkpoints/{STEPS}/meta/metadata"
    meta, other = json.loads(store.objects[f"runs/a/{place}"][0]), json.loads((on_disk / place).read_text())
    assert meta["arrays"] == other["arrays"]
    weights = []
    for i, workdir in enumerate(("gs://bucket/runs/a", on_disk)):
        out = tmp_path / f"{i}.safetensors"
        result = run(command("checkpoint", "export", f"--workdir={workdir}", f"--out={out}"), env)
        assert result.returncode == 0, result.stderr
        weights.append(load_file(out))
    assert weights[0].keys() == weights[1].keys()
    for name, array in weights[0].items():
        np.testing.assert_array_equal(array, weights[1][name], err_msg=name)


def test_a_restart_does_not_compile_again(bucket, starts):
    store, (_, _, first) = bucket[0], starts
    (step,) = (name for name in first if "jit_train_step" in name)
    assert step.startswith("runs/a/compilation_cache/")
    assert compiled(store)[step] == 1
    assert all(compiled(store)[name] == 1 for name in first)
    assert store.requests["GET", step] >= 2


def test_pictures_and_events_are_those_of_a_run_on_a_disk(bucket, starts, on_disk, tmp_path):
    store = bucket[0]
    pictures = sorted(path.name for path in (on_disk / "samples").iterdir())
    assert names(store, "runs/a/samples/") == pictures
    assert len(pictures) == 2 * STEPS // 4
    for name in pictures:
        data = store.objects[f"runs/a/samples/{name}"][0]
        assert np.array_equal(Image.open(io.BytesIO(data)), Image.open(on_disk / "samples" / name)), name
    (tmp_path / "tensorboard").mkdir()
    for name in names(store, "runs/a/tensorboard/"):
        (tmp_path / "tensorboard" / name).write_bytes(store.objects[f"runs/a/tensorboard/{name}"][0])
    assert events.scalars(tmp_path)["loss"] == events.scalars(on_disk)["loss"]
    assert sorted(events.pictures(tmp_path)) == sorted(events.pictures(on_disk))
    assert [start["step"] for start in json.loads(store.objects["runs/a/overrides.json"][0])] == [0, 4, STOPPED]


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
    assert [row["step"] for row in rows(lines(store))] == list(range(1, STEPS + 2))
    assert {n: store.objects[aside + n][0] for n in names(store, aside)} == {**before, "meta/metadata": damaged}
    listed = run(command("checkpoint", "list", "--workdir=gs://bucket/runs/a"), env)
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["8", "12", "13", "12", "9"], listed.stderr
    assert "set aside: it was found damaged" in listed.stdout.splitlines()[-1]


def test_other_commands_read_a_run_in_a_bucket(bucket, starts, env, tmp_path):
    result = run(command("sample", "--workdir=gs://bucket/runs/a", "--prompt=red heart", f"--out={tmp_path}"), env)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"00000.png", "grid.png", "manifest.json"}


def test_verify_finds_a_flipped_bit(bucket, env):
    workdir, python = "gs://bucket/runs/small", command("checkpoint")[0]
    assert run([python, "-c", SAVE, workdir], env).returncode == 0
    verify = command("checkpoint", "verify", f"--workdir={workdir}")
    result = run(verify, env)
    assert (result.returncode, result.stdout) == (0, "3: sound, 2 arrays\n"), result.stderr
    flip = f"from tests.training.damage import flip_array; flip_array('{workdir}/checkpoints/3', 'ema.b')"
    assert run([python, "-c", flip], env).returncode == 0
    result = run(verify, env)
    assert (result.returncode, result.stdout) == (1, "3: DAMAGED: ema/b\n"), result.stderr


@pytest.mark.parametrize("name", ["meta/metadata", "state/manifest.ocdbt"])
def test_what_may_not_be_read_is_not_called_damaged(name, bucket, env):
    """Else a run whose rights have changed would move its checkpoints away."""
    store, workdir = bucket[0], "gs://bucket/runs/secret"
    if not names(store, "runs/secret/"):
        assert run([command("checkpoint")[0], "-c", SAVE, workdir], env).returncode == 0
    store.hook = lambda method, read: method == "GET" and read == f"runs/secret/checkpoints/3/{name}"
    try:
        result = run(command("checkpoint", "verify", f"--workdir={workdir}"), env)
    finally:
        store.hook = lambda *_: False
    assert result.returncode == 2, result.stdout + result.stderr
    assert "error: gs://bucket/runs/secret/checkpoints/3 cannot be read: " in result.stderr


@pytest.mark.parametrize(
    ("workdir", "said"),
    [
        ("gs://missing/run", "cannot be written: "),
        ("gs://bucket/forbidden", "cannot be written: "),
    ],
)
def test_what_cannot_be_written_is_refused_before_any_work(workdir, said, bucket, emoji_data, env):
    store = bucket[0]
    store.hook = lambda method, name: name.startswith("forbidden/")
    try:
        _, err = ended(train(emoji_data, env, workdir), 2)
    finally:
        store.hook = lambda *_: False
    assert f"error: --workdir={workdir}: {said}" in err
    assert "Traceback" not in err


def test_failed_saves_end_the_run_and_leave_its_metrics(bucket, emoji_data, env):
    store, changes = bucket[0], {"checkpoint__max_failed_saves": 0, "runtime__compilation_cache": ""}
    store.hook = lambda method, name: method == "PUT" and name.startswith("runs/refused/checkpoints/")
    try:
        _, err = ended(train(emoji_data, env, "gs://bucket/runs/refused", **changes), 2)
    finally:
        store.hook = lambda *_: False
    assert "saving to gs://bucket/runs/refused/checkpoints/4 failed: " in err
    assert names(store, "runs/refused/metrics/")[0] == "00000001.jsonl"
