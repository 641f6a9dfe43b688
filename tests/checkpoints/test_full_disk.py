"""Tests that a run on a full disk names the file that could not be written."""

import contextlib
import subprocess

import pytest
from PIL import Image

from ecdit.errors import UserError
from ecdit.reporting.reporter import Reporter
from ecdit.reporting.speed import Stopwatch
from ecdit.reporting.writers import TensorBoard
from tests.runs import tiny

METRICS = {"loss": 0.5, "grad_norm": 1.0, "bad_in_row": 0, "bad_leaf": -1}


@pytest.fixture
def disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def fill(disk):
    with (disk / "fill").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 12)):
            pass


def test_metrics_that_cannot_be_written_are_named(disk):
    fill(disk)
    reporter = Reporter(disk, 0, tiny().train, ["w"])
    reporter.begin(Stopwatch(16, 1e9, None))
    with pytest.raises(UserError, match=f"writing {disk}/metrics.jsonl failed: .*No space left"):
        reporter.report(1, METRICS, 0.0)
    with pytest.raises(UserError, match=r"metrics\.jsonl"):  # it tries again to write what it could not
        reporter.close()


def test_tensorboard_s_points_and_images_that_cannot_be_written_are_named(disk, tmp_path):
    Image.effect_noise((200, 200), 50).save(tmp_path / "noise.png")
    board = TensorBoard(disk, 0)
    board.scalars(1, {"loss": 0.5})
    fill(disk)
    with pytest.raises(UserError, match=f"writing {disk}/tensorboard failed: .*No space left"):
        board.image(2, "samples", tmp_path / "noise.png")
    with contextlib.suppress(UserError):
        board.close()
