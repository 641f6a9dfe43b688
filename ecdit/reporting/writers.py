"""Writers of a run's scalars and images: TensorBoard, and Weights & Biases if the config names a project."""

import importlib.util
import io
import itertools
import secrets
import socket
import tempfile
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
from PIL import Image

from ecdit.config import require
from ecdit.errors import UserError
from ecdit.files import is_remote, replace_text, writing
from ecdit.storage import AppendedObjects, make_directory

TENSORBOARD, WANDB_ID = "tensorboard", "wandb_id"


class Writer(Protocol):
    """Receives the scalars and images of `Reporter`."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes values by name."""
        ...

    def image(self, step: int, name: str, path: Path) -> None:
        """Writes a PNG."""
        ...

    def save(self) -> None:
        """Flushes buffered data, so that it precedes the checkpoint."""
        ...

    def close(self) -> None:
        """Ends the writing."""
        ...


class TensorBoard:
    """Writes an event file for each start of a run; steps that a resumed run repeats are hidden in the earlier files.

    In a bucket, which cannot append, each start writes several files. It writes in the caller's thread, unlike
    tensorboardX's SummaryWriter, whose own thread swallows the error of a full disk.
    """

    def __init__(self, workdir: Path, start_step: int):
        # Imported here, because it imports torch if torch is installed.
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]  # made at run time

        self.event, self.summary, self.directory = Event, Summary, workdir / TENSORBOARD
        # TensorBoard finds files by "tfevents", and reads them in the order of their names.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        with writing(self.directory):
            make_directory(self.directory)
            self.file = self._open(self.directory / name)
        self._write(file_version="brain.Event:2")
        # TensorBoard hides older points from that step on.
        self._write(step=start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes values by name."""
        points = [self.summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step=step, summary=self.summary(value=points))

    def image(self, step: int, name: str, path: Path) -> None:
        """Writes a PNG."""
        png = path.read_bytes()
        with Image.open(io.BytesIO(png)) as image:
            width, height = image.size
        image = self.summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._write(step=step, summary=self.summary(value=[self.summary.Value(tag=name, image=image)]))

    def save(self) -> None:
        """Writes the object that has begun, in a bucket."""
        if self.parts is not None:
            with writing(self.directory):
                self.parts.save()

    def close(self) -> None:
        """Closes the file."""
        with writing(self.directory):
            self.file.close()

    def _open(self, path: Path) -> Any:
        from tensorboardX.record_writer import RecordWriter, register_writer_factory

        self.parts = None
        if is_remote(path):  # tensorboardX's own writer for buckets sends the whole file at each flush
            numbers = itertools.count()
            self.parts = AppendedObjects(lambda _: path.with_name(f"{path.name}.{next(numbers):06d}"))
            register_writer_factory("gs", types.SimpleNamespace(open=lambda _: self.parts))
        return RecordWriter(str(path))

    def _write(self, **fields: Any) -> None:
        with writing(self.directory):
            self.file.write(self.event(wall_time=time.time(), **fields).SerializeToString())
            self.file.flush()


class WeightsAndBiases:
    """Logs to one run of Weights & Biases for a workdir, however often it resumes; the workdir keeps the run's id."""

    def __init__(self, project: str, config: dict[str, Any], workdir: Path):
        """Starts or continues the run of `workdir`; `config` is what Weights & Biases shows as its config."""
        import wandb

        id_file = workdir / WANDB_ID
        with writing(id_file):
            if not (id_file.exists() and id_file.read_text().strip()):  # an older version could leave an empty file
                replace_text(id_file, secrets.token_hex(4))
        self.make_image = wandb.Image
        try:
            self.run = wandb.init(
                project=project,
                id=id_file.read_text(),
                resume="allow",
                dir=tempfile.mkdtemp() if is_remote(workdir) else workdir,
                config=config,
                settings=wandb.Settings(console="off"),  # it would rewrite the run's output
            )
        except wandb.Error as error:
            raise UserError(f"config.train.wandb_project: Weights & Biases refused: {error}") from None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Logs values by name. After a resume, steps that it already has stay as they are."""
        self.run.log(dict(values), step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        """Logs a PNG."""
        shown = Image.open(io.BytesIO(path.read_bytes())) if is_remote(path) else str(path)
        self.run.log({name: self.make_image(shown)}, step=step)

    def save(self) -> None:
        """Does nothing: nothing is buffered."""

    def close(self) -> None:
        """Sends the rest and ends the run."""
        self.run.finish()


def check_writers(project: str) -> None:
    """Raises ConfigError where train.wandb_project names a project and the package for it is missing."""
    found = not project or importlib.util.find_spec("wandb") is not None
    require(found, "train.wandb_project", project, "needs the package wandb: pip install -e '.[wandb]'")


def open_writers(project: str, config: dict[str, Any], workdir: Path, start_step: int) -> list[Writer]:
    """Returns the writers of a run that goes on after `start_step`; none on other processes than the first.

    Args:
      project: of Weights & Biases; "" for none.
      config: the run's, as nested plain dicts, for Weights & Biases.
      workdir: of the run.
      start_step: steps done.

    Raises:
      UserError: a file cannot be written.
    """
    if jax.process_index() > 0:
        return []
    writers: list[Writer] = [TensorBoard(workdir, start_step)]
    return writers + ([WeightsAndBiases(project, config, workdir)] if project else [])
