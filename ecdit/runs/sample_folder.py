"""Draws a folder of images with a run's weights, on all processes together, and goes on with one that was left."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool

import ecdit
from ecdit.config import flatten, to_dict
from ecdit.errors import UserError
from ecdit.files import in_threads
from ecdit.multihost import from_first, host_differences, on_first, together, wait_for_all
from ecdit.partitioning import batch_shards
from ecdit.progress import progress
from ecdit.runs.provenance import code_state, config_hash, library_versions
from ecdit.runs.trained_run import Run
from ecdit.sampling.grids import save_png
from ecdit.sampling.image_folder import NOT_COMPARED, alone_in, begin_folder, finish_folder, is_finished
from ecdit.sampling.layouts import Planned
from ecdit.sampling.many import Drawn, draw_images, make_programs
from ecdit.sampling.prompt_files import Kind
from ecdit.sampling.prompts import PLACES
from ecdit.system import user_files


def draw_folder(
    run: Run,
    out: Path,
    planned: Sequence[Planned],
    source: Mapping[str, Any],
    write_before: Callable[[], None] = lambda: None,
    draw_after: Callable[[], None] = lambda: None,
) -> int:
    """Draws the images that are not in `out` yet, and writes manifest.json and grid.png; returns how many were drawn.

    Collective: each process writes the images of its own devices into `out`, which all of them must see. The first one
    does the rest.

    Args:
      run: the weights, and how to sample.
      out: the folder.
      planned: all images.
      source: what else decides the images, for the manifest.
      write_before: what the first process writes before the images.
      draw_after: what all processes do once the images are there, before the folder counts as finished.

    Raises:
      UserError: `out` holds something else, another process draws into it, a file cannot be written, or hosts have
        other prompts, weights or settings than most.
    """
    held = contextlib.ExitStack()

    def begin() -> None:
        out.mkdir(parents=True, exist_ok=True)
        held.enter_context(alone_in(out))
        begin_folder(out, planned, source, machine(run))
        write_before()

    with held:
        if differences := host_differences(_facts(planned, source)):
            raise UserError("the hosts would not draw the same images:\n  " + "\n  ".join(differences))
        on_first(begin)
        count = _draw_left(run, out, planned)
        draw_after()
        on_first(lambda: finish_folder(out, planned))
    return count


def _facts(planned: Sequence[Planned], source: Mapping[str, Any]) -> dict[str, str]:
    """Returns what must be equal on all hosts, or one would draw images of another prompt or of another step."""
    rows = "\n".join(repr(dataclasses.astuple(one)) for one in planned)
    facts = {"prompts and repeats": hashlib.sha256(rows.encode("utf-8")).hexdigest()[:12], "images": str(len(planned))}
    values = {key: json.dumps(value) for key, value in source.items() if key not in NOT_COMPARED}
    return facts | {key: text if len(text) <= 40 else config_hash({key: text})[:12] for key, text in values.items()}


def _draw_left(run: Run, out: Path, planned: Sequence[Planned]) -> int:
    """Draws the images that are not in `out` yet, and returns how many. Collective."""
    first = jax.process_index() == 0
    # The first process says which are left: others may not see the same at once.
    whole = in_threads(is_finished, [out / one.file for one in planned]) if first else [True] * len(planned)
    left = from_first(~np.array(whole, bool))
    if run.system.parts.denoiser.images_together("sample") > 1:
        left = whole_batches(left, run.experiment.sampling.batch_size)
    todo = [planned[i] for i in np.flatnonzero(left).tolist()]
    programs = make_programs(run.system, run.experiment.sampling, run.mesh)
    batches = draw_images(
        programs,
        run.params,
        run.tokenize,
        [one.prompt for one in todo],
        [one.repeat for one in todo],
    )
    with progress("sampling", "images", len(planned), len(planned) - len(todo), shown=first) as update:
        for batch in batches:
            together(functools.partial(_write, out, todo, batch))
            update(batch.done)
    wait_for_all("images are written")
    return len(todo)


def _write(out: Path, todo: Sequence[Planned], batch: Drawn) -> None:
    for place, image in batch.images:
        (out / todo[place].file).parent.mkdir(parents=True, exist_ok=True)
        save_png(image, out / todo[place].file)


def whole_batches(left: Bool[np.ndarray, " n"], size: int) -> Bool[np.ndarray, " n"]:
    """Returns `left`, with all images of a batch of `size` where it has one of them.

    Images that compete for experts follow from the others of their batch, so a batch is drawn again as it was.
    """
    found = left.copy()
    for begin in range(0, len(left), size):
        found[begin : begin + size] |= left[begin : begin + size].any()
    return found


def describe_source(run: Run, changes: Sequence[str], kind: Kind) -> dict[str, Any]:
    """Returns all that the images follow from beside prompts and repeats, for the manifest."""
    model = flatten(to_dict(run.experiment.system))
    return {
        "step": run.step,
        "checkpoint": run.checkpoint,
        "weights": "ema",
        "model": config_hash({key: value for key, value in model.items() if key not in PLACES}),
        "public_weights": run.experiment.fingerprints(),
        "files": user_files(run.experiment.denoiser),
        "seed": run.experiment.sampling.seed,
        "sampling": to_dict(run.experiment.sampling),
        "group": getattr(run.experiment.model, "sampling_group", None),
        "vocabulary": run.vocabulary,
        "caption_length": run.experiment.data.caption_length,
        "set": list(changes),
        "format": kind,
        "ecdit": ecdit.__version__,
        "code": code_state()["sources"],
    }


def machine(run: Run) -> dict[str, Any]:
    """Returns what decides the last bits of an image beside its source: devices, their share of a batch, libraries."""
    device, versions = run.mesh.devices.flat[0], library_versions()
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": run.mesh.devices.size,
        "processes": jax.process_count(),
        "images_a_device": run.experiment.sampling.batch_size // batch_shards(run.mesh),
        "mesh": {name: size for name, size in run.mesh.shape.items() if size > 1},
        "versions": {name: versions[name] for name in ("jax", "jaxlib", "flax", "numpy") if name in versions},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
