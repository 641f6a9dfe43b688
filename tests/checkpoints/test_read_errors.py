"""Tests that unreadable checkpoints are not taken for damaged: nothing is moved, and failed reads are retried."""

import errno
import resource
from pathlib import Path

import orbax.checkpoint as ocp
import pytest

from ecdit.checkpoints import read_errors
from ecdit.checkpoints.read_errors import DamagedError, UnreadableError, is_damage, read
from tests.checkpoints.test_resume import aside, steps

# What tensorstore raised while a preloaded library let `read` of its files fail, or after damage, shortened.
TENSORSTORE = 'Error opening "zarr" driver: Error reading "ema.a/.zarray" in OCDBT database at local file "/r/state/": '
FAULTS = [
    ValueError(f"UNKNOWN: {TENSORSTORE}Failed to read 114 bytes: Input/output error [os_error_code='5']"),
    ValueError(f"ABORTED: {TENSORSTORE}Stale file handle [tensorstore_spec='{{}}'] [os_error_code='116']"),
    ValueError(f"{TENSORSTORE}Failed to read 287 bytes: Input/output error [os_error_code='5']"),
    ValueError(f"RESOURCE_EXHAUSTED: {TENSORSTORE}Too many open files [os_error_code='24']"),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale file handle"),
    OSError(errno.EMFILE, "Too many open files"),
    PermissionError(errno.EACCES, "Permission denied"),
    ImportError("zstandard"),
    MemoryError(),
    TimeoutError(),
    RuntimeError("the event loop is closed"),
]  # fmt: skip
DAMAGE = [
    ValueError(f"DATA_LOSS: {TENSORSTORE}Error decoding b-tree node: Length of data (286 bytes)"),
    ValueError(f'FAILED_PRECONDITION: Error reading "ema.a/0": {TENSORSTORE}Truncated Zstd-compressed stream'),
    ValueError(f"OUT_OF_RANGE: {TENSORSTORE}Requested byte range [0, 287) is not valid for value of size 143"),
    ValueError(f"NOT_FOUND: {TENSORSTORE}does not exist [os_error_code='2']"),
    ValueError("Expecting value: line 1 column 303"),
    KeyError("tree_metadata"),
    UnicodeDecodeError("utf-8", b"\xba", 0, 1, "invalid start byte"),
    FileNotFoundError(errno.ENOENT, "No such file or directory"),
    FileNotFoundError("Metadata file (named _METADATA) does not exist at /x"),
]


def caused_by(error):
    """What Orbax makes of tensorstore's errors: an Exception whose cause they are."""
    wrapped = Exception("Encountered error while reading array index: (slice(0, 2, 1),)")
    wrapped.__cause__ = error
    return wrapped


@pytest.mark.parametrize("wrap", [lambda error: error, caused_by])
@pytest.mark.parametrize("error", [*FAULTS, *DAMAGE], ids=lambda error: str(error)[:20] or type(error).__name__)
def test_only_data_that_is_missing_or_cannot_be_decoded_is_damage(error, wrap):
    assert is_damage(wrap(error)) == (error in DAMAGE)


def test_what_is_raised_names_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(read_errors, "RETRY_SECONDS", (0.0, 0.0))

    def fail(error):
        raise error

    with pytest.raises(DamagedError, match=rf"^{tmp_path} cannot be read: .*tree_metadata"):
        read(tmp_path, lambda: fail(KeyError("tree_metadata")))
    with pytest.raises(UnreadableError, match=rf"^{tmp_path} cannot be read: .*Stale file handle.*no sign of damage"):
        read(tmp_path, lambda: fail(OSError(errno.ESTALE, "Stale file handle")))
    with pytest.raises(UnreadableError):  # the checkpoint's directory has gone whole: perhaps a mount has
        read(tmp_path / "gone", lambda: fail(FileNotFoundError(errno.ENOENT, "gone")))


def test_a_file_that_cannot_be_looked_at_is_not_missing(toy, monkeypatch):
    """Orbax asks whether it exists, and hears "no" whatever the system's error is: here a link to itself (ELOOP)."""
    monkeypatch.setattr(read_errors, "RETRY_SECONDS", (0.0,))
    toy.train(num_steps=4, every=2)
    metadata = toy.workdir / "checkpoints/4/state/_METADATA"
    metadata.unlink()
    metadata.symlink_to(metadata)
    with pytest.raises(UnreadableError, match=r"checkpoints/4 cannot be read: .*levels of symbolic links"):
        toy.train(num_steps=6, every=2)
    assert (steps(toy), aside(toy)) == ([2, 4], [])


def test_a_disk_that_cannot_be_read_moves_no_checkpoint(toy, monkeypatch):
    """The kernel answers a read of the address 0 of this process with EIO, as a failing disk does."""
    monkeypatch.setattr(read_errors, "RETRY_SECONDS", (0.0,))
    toy.train(num_steps=4, every=2)
    meta = toy.workdir / "checkpoints/4/meta/metadata"
    data = meta.read_bytes()
    meta.unlink()
    meta.symlink_to("/proc/self/mem")
    with pytest.raises(UnreadableError, match=r"checkpoints/4 cannot be read: .*Input/output error"):
        toy.train(num_steps=6, every=2)
    assert (steps(toy), aside(toy)) == ([2, 4], [])
    assert toy.losses()[-1] == (4, 4.0)
    meta.unlink()
    meta.write_bytes(data)
    assert toy.train(num_steps=6, every=2) == 0
    assert toy.losses() == [(step, float(step)) for step in range(1, 7)]


def test_a_read_that_fails_for_a_moment_is_tried_again(toy, monkeypatch, capsys):
    toy.train(num_steps=4, every=2)
    meta = toy.workdir / "checkpoints/4/meta/metadata"
    aside_file = meta.with_name("kept")
    meta.rename(aside_file)
    meta.symlink_to("/proc/self/mem")
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        aside_file.replace(meta)

    monkeypatch.setattr(read_errors.time, "sleep", sleep)
    assert toy.train(num_steps=6, every=2) == 0
    assert "resumed from step 4" in capsys.readouterr().out
    assert waited == [1.0]


@pytest.mark.parametrize("error", [ImportError("no module named zstandard"), *FAULTS[:2]])
def test_arrays_that_cannot_be_read_move_no_checkpoint(toy, monkeypatch, error):
    toy.train(num_steps=4, every=2)

    def restore(*_, **__):
        raise caused_by(error)

    monkeypatch.setattr(read_errors, "RETRY_SECONDS", ())
    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", restore)
    with pytest.raises(UnreadableError):
        toy.train(num_steps=6, every=2)
    assert (steps(toy), aside(toy)) == ([2, 4], [])


def test_a_process_that_may_open_no_more_files_finds_no_damage(tmp_path, monkeypatch):
    monkeypatch.setattr(read_errors, "RETRY_SECONDS", ())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    (tmp_path / "file").write_text("{}")
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
        with pytest.raises(UnreadableError, match="Too many open files"):
            read(tmp_path, Path(tmp_path / "file").read_text)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
