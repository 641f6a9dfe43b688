"""Tests that only one trainer runs at a time in a workdir."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from contextlib import closing

import pytest

from ecdit import storage
from ecdit.errors import UserError
from ecdit.runs import lock
from ecdit.runs.lock import LockedError, locked
from ecdit.storage import as_path, is_temporary
from tests.gcs_server import serving
from tests.launch.jobs import wait_for
from tests.runs import ROOT

HOLD = """
import sys, time
from pathlib import Path
from ecdit.runs.lock import locked
from ecdit.storage import as_path
with locked(as_path(sys.argv[1]), print):
    print("locked", flush=True)
    time.sleep(100)
"""


TRY = """
import sys
from ecdit.runs import lock
from ecdit.storage import as_path
lock.LEASE_SECONDS, lock.RENEW_SECONDS = 0.8, 0.1
try:
    with lock.locked(as_path(sys.argv[1]), print):
        print("got it")
except lock.LockedError as error:
    print("refused:", error)
"""


def holding(workdir, env=os.environ):
    """A process that holds the lock of a workdir."""
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(workdir)], cwd=ROOT, env=env, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"locked\n"
    return child


def ended(child):
    child.kill()
    child.communicate()


def test_a_second_trainer_is_refused_and_harms_nothing(toy):
    """It comes while the first one saves step 4."""
    found = []

    def second():
        before = {path: path.stat().st_mtime_ns for path in toy.workdir.rglob("*")}
        with pytest.raises(LockedError, match=rf"in use by another trainer \(process {os.getpid()} on "):
            toy.train(num_steps=9, every=2)
        found.append({path: path.stat().st_mtime_ns for path in before if path.exists()} == before)

    toy.at[6] = second
    assert toy.train(num_steps=9, every=4) == 0
    assert len(found) == 1
    assert toy.losses() == [(step, float(step)) for step in range(1, 10)]
    assert sorted(toy.saved()) == [4, 8, 9]


def test_a_run_can_be_read_beside_its_trainer(toy):
    """Sampling and evaluation take no lock; here they read while step 8 waits for its batch."""
    found = []
    toy.at[8] = lambda: found.append(sorted(toy.saved()))
    assert toy.train(num_steps=9, every=2) == 0
    assert len(found) == 1
    assert 4 in found[0]


def test_a_lock_ends_with_the_process_that_held_it(tmp_path):
    child = holding(tmp_path / "run")
    with pytest.raises(LockedError, match=f"process {child.pid} on "), locked(tmp_path / "run", print):
        pass
    ended(child)
    with locked(tmp_path / "run", print) as held:
        held.check()


def test_a_garbled_lock_file_is_no_hindrance(tmp_path):
    (tmp_path / "trainer.lock").write_bytes(b"\xff{")
    with locked(tmp_path, print):
        assert json.loads((tmp_path / "trainer.lock").read_text())["pid"] == os.getpid()


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    said = []
    with locked(tmp_path, said.append):
        assert [line.endswith("nothing keeps a second trainer out of it") for line in said] == [True]


@pytest.fixture
def bucket(monkeypatch):
    """The store, the environment of other processes, and a workdir; leases of 0.8 s."""
    pytest.importorskip("gcsfs", reason="needs the extra gcs")
    with serving() as (store, env):
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(lock, "LEASE_SECONDS", 0.8)
        monkeypatch.setattr(lock, "RENEW_SECONDS", 0.1)
        yield store, {**os.environ, **env}, as_path("gs://bucket/run")


NAME = "run/trainer.lock"


def another():
    """The lease of a trainer on another machine."""
    return lock._text(dataclasses.replace(lock._own(), host="host-7", machine="another boot", token="other")).encode()


def test_in_a_bucket_a_lease_is_renewed_and_keeps_others_out(bucket):
    store, env, workdir = bucket
    with locked(workdir, print) as held:
        taken = store.objects[NAME][1]
        done = subprocess.run(
            [sys.executable, "-c", TRY, str(workdir)], cwd=ROOT, env=env, capture_output=True, text=True
        )
        assert "waiting 1 s, unless the lease is renewed" in done.stdout, done.stderr
        assert f"refused: gs://bucket/run is in use by another trainer (process {os.getpid()} on " in done.stdout
        assert store.objects[NAME][1] > taken
        held.check_write()
    assert NAME not in store.objects


def test_in_a_bucket_a_lease_that_is_not_renewed_ends(bucket):
    """Its holder is on another machine and was killed: the bucket's clock decides."""
    store, _, workdir = bucket
    with locked(workdir, print):
        pass  # the first connection may take longer than a lease does here
    other = dataclasses.replace(lock._own(), host="host-7", pid=7, machine="another boot", token="other")
    store.put(NAME, lock._text(other).encode())
    said, begin = [], time.monotonic()
    with locked(workdir, said.append):
        assert 0.5 < time.monotonic() - begin < 5
        assert json.loads(store.objects[NAME][0])["pid"] == os.getpid()
    assert "is leased by process 7 on host-7" in said[0]


def test_in_a_bucket_the_lease_of_a_process_that_has_ended_here_is_taken_at_once(bucket, monkeypatch):
    store, env, workdir = bucket
    monkeypatch.setattr(lock, "LEASE_SECONDS", 300.0)
    ended(holding(workdir, env))
    assert NAME in store.objects
    begin = time.monotonic()
    with locked(workdir, print):
        assert time.monotonic() - begin < 5


def raised(check):
    """What a check raises, or None."""
    try:
        check()
    except (LockedError, ConnectionError) as error:
        return error
    return None


def was_lost(check, said="gs://bucket/run was taken over by process "):
    return isinstance(error := raised(check), LockedError) and str(error).startswith(said)


def test_in_a_bucket_a_trainer_that_lost_its_lease_stops(bucket):
    """It was cut off for five minutes, and another one has taken over."""
    store, _, workdir = bucket
    with locked(workdir, print) as held:
        store.put(NAME, another())
        wait_for(lambda: was_lost(held.check), seconds=20)
        assert " on host-7" in str(raised(held.check_write))
    assert json.loads(store.objects[NAME][0])["token"] == "other"


@pytest.mark.parametrize(("data", "said"), [(None, "is gone"), (b"\xff{", "is garbled")])
def test_in_a_bucket_a_lease_that_is_gone_is_not_taken_back(bucket, data, said):
    """Between two renewals another trainer took it over, trained, and ended."""
    store, _, workdir = bucket
    with locked(workdir, print) as held:
        store.put(NAME, another())
        if data is None:
            del store.objects[NAME]
        else:
            store.put(NAME, data)
        wait_for(lambda: was_lost(held.check, "gs://bucket/run may have been taken over: "), seconds=20)
        assert str(raised(held.check)).endswith(said)
    assert store.objects.get(NAME, (None,))[0] == data


def test_in_a_bucket_nothing_may_be_written_before_a_lease_is_renewed_that_may_have_ended(bucket):
    """In an outage the run goes on without writing, and may write again when its lease is renewed."""
    store, _, workdir = bucket
    with locked(workdir, print) as held:
        begin = time.monotonic()
        store.hook = lambda method, name: name == NAME
        wait_for(lambda: isinstance(raised(held.check_write), ConnectionError), seconds=20)
        assert time.monotonic() - begin > 0.3
        assert is_temporary(raised(held.check_write))
        held.check()
        store.hook = lambda method, name: False
        wait_for(lambda: raised(held.check_write) is None, seconds=20)


def test_in_a_bucket_a_renewal_counts_from_when_it_was_sent(bucket, monkeypatch):
    """The answer of an earlier one was lost, so the object is this process's, but may be almost five minutes old."""
    store, _, workdir = bucket
    monkeypatch.setattr(lock, "RENEW_SECONDS", 100.0)
    with closing(lock.Lease(workdir, print)) as lease:
        store.put(NAME, lock._text(lease.own).encode())
        writes = []
        store.hook = lambda method, name: method == "PUT" and bool(writes.append(lock._clock()))
        lease._renew()
        assert len(writes) == 2  # the first one finds another generation
        assert writes[0] < lease.renewed < writes[1]


def test_in_a_bucket_a_lease_ages_while_its_machine_is_suspended(bucket, monkeypatch):
    """Linux's monotonic clock stands still then, and so do all threads; CLOCK_BOOTTIME goes on."""
    _, _, workdir = bucket
    monkeypatch.setattr(lock, "LEASE_SECONDS", 300.0)
    monkeypatch.setattr(lock, "RENEW_SECONDS", 60.0)
    clock = time.clock_gettime
    with locked(workdir, print) as held:
        held.check_write()
        for suspended, refused in ((200, False), (290, True)):
            ahead = {time.CLOCK_BOOTTIME: clock(time.CLOCK_BOOTTIME) + suspended}
            monkeypatch.setattr(lock.time, "clock_gettime", ahead.__getitem__)
            assert isinstance(raised(held.check_write), ConnectionError) == refused


def test_in_a_bucket_a_trainer_whose_lease_has_ended_writes_nothing(bucket, toy, monkeypatch):
    """From step 3 on it is cut off from the lease alone, and another trainer takes that over."""
    store, _, toy.workdir = bucket
    monkeypatch.setattr(lock, "LEASE_SECONDS", 300.0)
    monkeypatch.setattr(storage, "CLOSE_SECONDS", 0.1)
    found = {}

    def cut_off():
        store.hook = lambda method, name: name == NAME
        store.put(NAME, another())
        wait_for(lambda: "run/checkpoints/2/commit_success.txt" in store.objects)
        monkeypatch.setattr(lock, "LEASE_SECONDS", 0.0)
        found.update(store.objects)

    toy.at[3] = cut_off
    with pytest.raises(UserError, match="could not be renewed"):
        toy.train(num_steps=5, every=2)
    written = {name for name in store.objects if store.objects[name] != found.get(name)}
    assert not [name for name in written if not name.startswith(("run/goodput/", "run/tensorboard/"))]
    assert [name for name in store.objects if name.startswith("run/metrics/")] == ["run/metrics/00000001.jsonl"]


def test_in_a_bucket_no_image_is_drawn_under_a_lease_that_may_have_ended(bucket, toy, monkeypatch):
    _, _, toy.workdir = bucket
    monkeypatch.setattr(lock, "LEASE_SECONDS", 300.0)
    monkeypatch.setattr(storage, "CLOSE_SECONDS", 0.1)
    toy.at[2] = lambda: monkeypatch.setattr(lock, "LEASE_SECONDS", 0.0)
    with pytest.raises((UserError, ConnectionError), match="could not be renewed"):
        toy.train(num_steps=3, every=100, images_every=2)
    assert toy.drawn == {}


@pytest.mark.parametrize("of", [{"images_every": 2}, {"evaluation__every": 2, "evaluation__loss_images": 1}])
def test_in_a_bucket_nothing_is_written_under_a_lease_that_has_ended_while_it_was_drawn(bucket, toy, monkeypatch, of):
    _, _, toy.workdir = bucket
    monkeypatch.setattr(lock, "LEASE_SECONDS", 300.0)
    monkeypatch.setattr(storage, "CLOSE_SECONDS", 0.1)
    toy.drawing = lambda: monkeypatch.setattr(lock, "LEASE_SECONDS", 0.0)
    with pytest.raises((UserError, ConnectionError), match="could not be renewed"):
        toy.train(num_steps=3, every=100, **of)
    assert toy.drawn == {}
    assert toy.evaluated == []


def test_in_a_bucket_a_save_is_not_committed_under_a_lease_that_has_ended_meanwhile(bucket, toy, monkeypatch):
    store, _, toy.workdir = bucket
    monkeypatch.setattr(lock, "LEASE_SECONDS", 300.0)

    def end_lease(method, name):
        if method == "PUT" and name.startswith("run/checkpoints/4/"):
            monkeypatch.setattr(lock, "LEASE_SECONDS", 0.0)
        return False

    store.hook = end_lease
    monkeypatch.setattr(storage, "CLOSE_SECONDS", 0.1)
    with pytest.raises(UserError, match="could not be renewed"):
        toy.train(num_steps=4, every=2)
    assert [name for name in store.objects if name.startswith("run/checkpoints/4/state/")]
    marks = [f"run/checkpoints/{step}/commit_success.txt" in store.objects for step in (2, 4)]
    assert marks == [True, False]


def test_in_a_bucket_one_of_two_at_once_gets_the_lease(bucket, monkeypatch):
    """The second one writes between the first one's read and its write."""
    store, _, workdir = bucket
    other = another()
    read = lock.read_generation

    def read_and_be_late(path):
        found = read(path)
        if NAME not in store.objects:
            store.put(NAME, other)
        return found

    monkeypatch.setattr(lock, "read_generation", read_and_be_late)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: store.put(NAME, other))  # it is renewed
    with pytest.raises(LockedError), locked(workdir, print):
        pass


def test_a_bucket_that_refuses_is_named(bucket):
    store, _, workdir = bucket
    store.hook = lambda method, name: name == NAME
    with pytest.raises(UserError, match="gs://bucket/run"), locked(workdir, print):
        pass


def test_in_a_bucket_a_garbled_lease_is_waited_for(bucket):
    """It is somebody's, so it may be renewed."""
    store, _, workdir = bucket
    store.put(NAME, b"\xff{")
    begin = time.monotonic()
    with locked(workdir, print):
        assert time.monotonic() - begin > 0.4
