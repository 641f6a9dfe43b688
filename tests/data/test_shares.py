"""Tests preparation in shares: by processes at once, on one disk or several, one of them killed: the same bytes."""

import dataclasses
import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ecdit.data import DataError, preparation
from ecdit.data.columns import column_directory, make_column, make_share, read_column
from ecdit.data.locks import locked
from ecdit.data.manifest import read_records_manifest, task_directory
from ecdit.data.preparation import prepare_share
from ecdit.data.prepared import prepare, prepare_column
from ecdit.data.shares import Share, parse_share, sharing
from tests.data.example import Counted, make_config, module
from tests.data.test_preparation import files

ROOT = Path(__file__).parents[2]


def quiet(_):
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """70 pairs in seven parts, with some held out and a spoiled one, that one process has prepared."""
    place = tmp_path_factory.mktemp("shared")
    config = make_config(
        place / "data",
        module=module(place, "shared", "70, spoiled=(3, 25)"),
        task="shared",
        vocab_size=300,
        prepare={"held_out": 0.2},
    )
    prepare(config, say=quiet)
    return config


def elsewhere(config, place):
    return dataclasses.replace(config, directory=str(place))


def working(config):
    return task_directory(config).with_name(f".{config.task}.preparing")


@pytest.mark.parametrize("text", ["3", "3/3", "-1/3", "1/0", "a/3", "1/3/4", "", "1.0/3", " 1/3"])
def test_a_share_is_one_of_its_number(text):
    with pytest.raises(DataError, match="must be I/N, share I of N, with I from 0 to N - 1"):
        parse_share(text)


def test_shares_have_every_part_once():
    shares = [parse_share(f"{index}/3") for index in range(3)]
    assert [[part for part in range(8) if part in share] for share in shares] == [[0, 3, 6], [1, 4, 7], [2, 5]]


def test_shares_that_are_joined_have_the_bytes_of_one_process(whole, tmp_path):
    config, said = elsewhere(whole, tmp_path), []
    for index in (2, 0, 1):
        prepare_share(config, Share(index, 3), 1, said.append)
    for line, share, left in zip(said, ("2/3", "0/3", "1/3"), (5, 2, 0), strict=True):
        assert f"share {share} of {task_directory(config)}" in line
        assert f"{left} of all 7 are left" in line
    assert not task_directory(config).exists()
    prepare(config, say=quiet)
    assert files(tmp_path) == files(Path(whole.directory))
    prepare_share(config, Share(0, 3), 1, said.append)
    assert said[3].endswith("is prepared, with its parts joined")


def test_the_command_without_a_share_prepares_what_shares_have_left(whole, tmp_path, monkeypatch):
    config, written = elsewhere(whole, tmp_path), []
    prepare_share(config, Share(1, 3), 1, quiet)
    real = preparation.write_part
    monkeypatch.setattr(preparation, "write_part", lambda *args: (written.append(args[4].name), real(*args)))
    prepare(config, say=quiet)
    assert written == ["000000", "000002", "000003", "000005", "000006"]
    assert files(tmp_path) == files(Path(whole.directory))


def test_shares_on_disks_of_their_own_are_copied_together(whole, tmp_path):
    for index in range(3):
        host = elsewhere(whole, tmp_path / f"host{index}")
        prepare_share(host, Share(index, 3), 1, quiet)
        shutil.copytree(working(host), tmp_path / "all" / working(host).name, dirs_exist_ok=True)
    prepare(elsewhere(whole, tmp_path / "all"), say=quiet)
    assert files(tmp_path / "all") == files(Path(whole.directory))


def test_what_a_killed_share_has_begun_is_not_in_the_result(whole, tmp_path):
    """Share 1 is killed in part 4, and another host, on its own disk, prepares that part."""
    config = elsewhere(whole, tmp_path)
    for index in range(3):
        prepare_share(config, Share(index, 3), 1, quiet)
    (working(config) / ".000004").mkdir()
    (working(config) / ".000004/train.array_record").write_bytes(b"begun")
    prepare(config, say=quiet)
    assert files(tmp_path) == files(Path(whole.directory))


def test_shares_of_other_settings_or_another_number_are_refused(whole, tmp_path):
    config = elsewhere(whole, tmp_path)
    prepare_share(config, Share(1, 3), 1, quiet)
    before = files(tmp_path)
    with pytest.raises(DataError, match=r"\.shared\.preparing was begun with other settings"):
        prepare_share(dataclasses.replace(config, image_size=16), Share(0, 3), 1, quiet)
    with pytest.raises(DataError, match=r"--share=0/4: .*\.shared\.preparing was begun in 3 shares; go on with that"):
        prepare_share(config, Share(0, 4), 1, quiet)
    assert files(tmp_path) == before
    (working(config) / "shares").unlink()  # as the message says
    prepare_share(config, Share(0, 4), 1, quiet)
    prepare(config, say=quiet)
    assert files(tmp_path) == files(Path(whole.directory))


@pytest.mark.parametrize("last", [0, 1])
def test_parts_that_hosts_prepared_with_other_settings_are_not_joined(whole, tmp_path, last):
    """Each host has a settings.json of its own, of which the last copy stays; otherwise held-out keys are trained."""
    for index in (1 - last, last):
        prepare_ = dataclasses.replace(whole.prepare, held_out=(0.2, 0.6)[index])
        host = dataclasses.replace(elsewhere(whole, tmp_path / f"host{index}"), prepare=prepare_)
        prepare_share(host, Share(index, 2), 1, quiet)
        shutil.copytree(working(host), tmp_path / "all" / working(host).name, dirs_exist_ok=True)
    config = dataclasses.replace(elsewhere(whole, tmp_path / "all"), prepare=prepare_)
    other = "000000" if last else "000001"
    with pytest.raises(DataError, match=rf"\.shared\.preparing/{other} was prepared with other settings"):
        prepare(config, say=quiet)
    for index in range(1 - last, 7, 2):
        shutil.rmtree(working(config) / f"{index:06d}")  # as the message says
    assert prepare(config, say=quiet).stored[0].manifest.settings["held_out"] == (0.2, 0.6)[last]


def test_an_input_that_differs_between_hosts_is_found_when_parts_are_joined(whole, tmp_path, monkeypatch):
    config = elsewhere(whole, tmp_path)
    prepare_share(config, Share(1, 3), 1, quiet)
    monkeypatch.setattr("tests.data.example.Counted.stamp", lambda *_: "later")
    prepare_share(config, Share(0, 3), 1, quiet)
    with pytest.raises(DataError, match="part 1 has changed since"):
        prepare(config, say=quiet)


def test_shares_run_together_but_not_with_themselves_or_with_a_call_that_joins(tmp_path):
    lock, waiting, order = tmp_path / ".a.lock", threading.Event(), []

    def hold(name, context):
        with context:
            order.append(name)

    def wait(line):
        assert "waiting for it" in line
        waiting.set()

    for name, make in (
        ("the same share", lambda: sharing(lock, Share(0, 2), wait)),
        ("a call that joins", lambda: locked(lock, wait)),
    ):
        waiting.clear()
        order.clear()
        thread = threading.Thread(target=hold, args=(name, make()))
        with sharing(lock, Share(0, 2), lambda line: pytest.fail(line)):
            thread.start()
            assert waiting.wait(60)
            with sharing(lock, Share(1, 2), lambda line: pytest.fail(line)):
                order.append("another share")
        thread.join()
        assert order == ["another share", name]


@dataclasses.dataclass(frozen=True)
class Keys:
    """A column of the records' keys."""

    made_by: str = "a"
    process_bytes: int = 0
    name: str = "latents-keys"

    def values(self, records):
        yield from ((record.key.encode(), {}) for record in records)


@pytest.fixture
def records(whole, tmp_path):
    """A copy of the prepared records, whose columns a test may make."""
    config = elsewhere(whole, tmp_path / "data")
    shutil.copytree(whole.directory, config.directory)
    return config


def test_a_column_in_shares_has_the_bytes_of_one_process(records, tmp_path):
    task, said = task_directory(records), []
    manifest = read_records_manifest(records, "shared")
    shutil.copytree(task, tmp_path / "alone")
    make_column(tmp_path / "alone", manifest, Keys(), 1, quiet)
    for index in (1, 2):
        prepare_column(records, Keys(), 1, said.append, share=Share(index, 3))
    begun = [path for path in column_directory(task, ".latents-keys.preparing").iterdir() if path.is_dir()]
    assert sorted(path.name for path in begun) == ["000001", "000002", "000004", "000005"]
    assert "column latents-keys, share 1/3: 20 images" in said[0]
    begun = column_directory(task, ".latents-keys.preparing") / "000001/.train.array_record"
    begun.write_bytes(b"a share that was killed, of a shard that another host has made")
    left = sum(shard.name[:6] in ("000000", "000003", "000006") for shard in (*manifest.train, *manifest.held_out))
    assert f"{left} of all {len(manifest.train) + len(manifest.held_out)} shards are left" in said[3]
    prepare_column(records, Keys(), 1, said.append)
    assert files(task) == files(tmp_path / "alone")
    prepare_column(records, Keys(), 1, said.append, share=Share(0, 3))
    assert "share 0/3: is there" in said[-2]


def test_data_that_is_made_when_it_is_read_has_no_shares(tmp_path):
    with pytest.raises(DataError, match="--share=0/2: shapes is made when it is read"):
        prepare_share(make_config(tmp_path, task="shapes"), Share(0, 2), 1, quiet)


def test_a_column_begun_by_other_weights_or_in_other_shares_is_not_gone_on_with(records):
    task, manifest = task_directory(records), read_records_manifest(records, "shared")
    make_share(task, manifest, Keys(), 1, quiet, Share(1, 3))
    before = files(task)
    with pytest.raises(DataError, match=r"\.latents-keys\.preparing was begun from other records, or by another"):
        make_share(task, manifest, Keys("b"), 1, quiet, Share(2, 3))
    with pytest.raises(DataError, match=r"--share=2/4: .*\.latents-keys\.preparing was begun in 3 shares"):
        make_share(task, manifest, Keys(), 1, quiet, Share(2, 4))
    with pytest.raises(DataError, match=r"\.latents-keys\.preparing was begun from other records, or by another"):
        make_column(task, manifest, Keys("b"), 1, quiet)
    assert files(task) == before


@pytest.mark.parametrize("records_differ", [False, True])
def test_shards_that_hosts_computed_of_something_else_are_not_joined(records, tmp_path, records_differ):
    """The copies of two hosts' disks have one `made_of`, the last one's; otherwise rows shift to other records."""
    task, manifest = task_directory(records), read_records_manifest(records, "shared")
    begun = column_directory(task, ".latents-keys.preparing")
    make_share(task, manifest, Keys(), 1, quiet, Share(1, 3))
    there = dataclasses.replace(manifest, fingerprint="others") if records_differ else manifest
    shutil.copytree(task, tmp_path / "there", ignore=shutil.ignore_patterns("columns"))
    make_share(tmp_path / "there", there, Keys() if records_differ else Keys("b"), 1, quiet, Share(2, 3))
    other = column_directory(tmp_path / "there", ".latents-keys.preparing")
    (other / "made_of").unlink()
    shutil.copytree(other, begun, dirs_exist_ok=True)
    with pytest.raises(DataError, match=r"000002/train\.array_record.* were computed from other records, or by anoth"):
        make_column(task, manifest, Keys(), 1, quiet)
    for index in (2, 5):
        shutil.rmtree(begun / f"{index:06d}")
    made = make_column(task, manifest, Keys(), 1, quiet)
    shutil.rmtree(other)
    assert made == make_column(tmp_path / "there", manifest, Keys(), 1, quiet)


def test_a_column_without_a_row_for_each_record_is_refused(records):
    task, manifest = task_directory(records), read_records_manifest(records, "shared")
    make_column(task, manifest, Keys(), 1, quiet)
    first = manifest.train[0]
    longer = dataclasses.replace(first, records=first.records + 1)
    for train, named in ((longer, *manifest.train[1:]), first.name), (manifest.train[1:], first.name):
        with pytest.raises(DataError, match=f"latents-keys has not a row for each record of {named}: delete it"):
            read_column(task, dataclasses.replace(manifest, train=train), "latents-keys", "a")


def test_a_shard_that_was_cut_after_it_was_complete_is_found_when_a_column_is_joined(records):
    task, manifest = task_directory(records), read_records_manifest(records, "shared")
    make_share(task, manifest, Keys(), 1, quiet, Share(1, 3))
    cut = column_directory(task, ".latents-keys.preparing") / "000001/train.array_record"
    cut.write_bytes(b"")
    with pytest.raises(DataError, match=r"\.latents-keys\.preparing is not whole: 000001/train\.array_record of "):
        make_column(task, manifest, Keys(), 1, quiet)
    assert not column_directory(task, "latents-keys").exists()


def test_weights_that_change_while_they_compute_a_column_are_noticed(records):
    """A column takes hours, and the states of the empty caption are computed last, by weights that are read then."""
    task, manifest, maker = task_directory(records), read_records_manifest(records, "shared"), Changing()
    with pytest.raises(DataError, match="the tokenizer or the weights have changed while they were read"):
        make_column(task, manifest, maker, 1, quiet, lambda: setattr(maker, "made_by", "b") or {})
    assert not column_directory(task, maker.name).exists()


class Changing:
    """A column whose weights may change."""

    made_by, process_bytes, name = "a", 0, "latents-changing"
    values = Keys.values


class Killed(Keys):
    """A column whose processes are killed, as by the kernel where memory is short."""

    def values(self, records):
        os.kill(os.getpid(), signal.SIGKILL)
        yield from super().values(records)


def test_a_killed_process_ends_the_column_with_an_error_and_the_same_command_goes_on(records):
    task, manifest = task_directory(records), read_records_manifest(records, "shared")
    with pytest.raises(DataError, match=r"a process that computes latents-keys was killed, .* with fewer --workers"):
        make_column(task, manifest, Killed(), 2, quiet)
    assert make_column(task, manifest, Keys(), 1, quiet).name == "latents-keys"


class Deadly(Counted):
    """A source whose readers are killed, as by the kernel where memory is short."""

    def read(self, part):
        os.kill(os.getpid(), signal.SIGKILL)
        yield from super().read(part)


def test_a_killed_process_ends_the_preparation_of_records_with_an_error(tmp_path):
    more = 'from tests.data.test_shares import Deadly\nadd_task("deadly", Deadly(20))'
    where = module(tmp_path, "unused_deadly", "1", more)
    config = make_config(tmp_path / "data", module=where, task="deadly", vocab_size=300)
    with pytest.raises(DataError, match=r"a process that prepares was killed, .* with fewer --workers takes less"):
        prepare(config, workers=2, say=quiet)


CONFIG = """
import importlib.util, sys
sys.path.insert(0, {root!r})
from configs.emoji import get_config as emoji


def get_config():
    config = emoji()
    with config.unlocked():
        config.data.update(module={module!r}, task="hosts", directory={directory!r})
    return config
"""


@pytest.mark.slow
def test_three_processes_one_of_which_is_killed_end_with_the_bytes_of_one(tmp_path, cpu_env):
    """The command itself: three shares at once on one disk, share 1 killed and started again, then the join."""
    where = module(tmp_path, "hosts", "1500, 50")

    def command(name, *more):
        (tmp_path / f"{name}.py").write_text(
            CONFIG.format(root=str(ROOT), module=where, directory=str(tmp_path / name))
        )
        arguments = [f"--config={tmp_path / name}.py", "--workers=1", *more]
        return [sys.executable, "-m", "ecdit.prepare", *arguments]

    def start(*more):
        return subprocess.Popen(
            command("shared", *more), cwd=ROOT, env=cpu_env(), stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    subprocess.run(command("alone"), check=True, cwd=ROOT, env=cpu_env())
    processes = [start(f"--share={index}/3") for index in range(3)]
    begun = tmp_path / "shared" / ".hosts.preparing"
    while not (begun / "000001").exists():  # share 1 has written its first part of ten
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    os.kill(processes[1].pid, signal.SIGKILL)
    processes[1].communicate()
    assert not (begun / "000028").exists()
    processes[1] = start("--share=1/3")
    for index, process in enumerate(processes):
        out, _ = process.communicate()
        assert process.returncode == 0
        assert f"share {index}/3 of {tmp_path}/shared/hosts: its 10 parts are done" in out
    subprocess.run(command("shared"), check=True, cwd=ROOT, env=cpu_env())
    assert files(tmp_path / "shared") == files(tmp_path / "alone")


@pytest.mark.slow
def test_shares_are_refused_where_nothing_is_divided(tmp_path, cpu_env):
    for more, message in (
        (["--share=3/3"], "error: --share=3/3: must be I/N"),
        (["--share=0/3", "--verify"], "error: --share=0/3: --limit, --verify and --vocabulary are not divided"),
    ):
        arguments = [sys.executable, "-m", "ecdit.prepare", "--config=configs/emoji.py", *more]
        ended = subprocess.run(arguments, cwd=ROOT, env=cpu_env(), capture_output=True, text=True, check=False)
        assert (ended.returncode, message in ended.stderr) == (2, True)


@pytest.mark.parametrize("together", [True, False])
def test_a_lock_fits_file_systems_that_lock_byte_ranges_or_nothing(tmp_path, monkeypatch, together):
    """NFS wants a file that can be read for a shared lock, and one that can be written for the other kind."""
    lock, said = tmp_path / "lock", []

    def flock(file, kind):
        assert fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(lock, said.append, together):
        pass
    assert said == [f"{lock} cannot be locked (No locks available): let no other process do the same here"]
