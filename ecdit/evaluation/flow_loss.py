"""The flow loss on fixed (image, noise, time) triples, by time: the same numbers are compared at every step of a run.

Each image meets every bin of time once, with a time drawn uniformly in the bin and noise of its own, so the loss of a
bin is a mean over all images, and the mean over bins is that of uniform times (not of those that training draws). No
token, caption or pixel is dropped, flipped or cropped. The loss is the mean squared error of the velocity over an
image's elements.

A batch has different images, at times of neighbouring bins: where images compete for experts ("train" groups of several
images), they compete with others at other times, as in training. Axes: n images, B of a batch.
"""

import dataclasses
import math
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float64, Int

from ecdit.components import Denoiser, Mode
from ecdit.data import DataError
from ecdit.data.generated import Split
from ecdit.data.loader import augmented, part_reader
from ecdit.data.prepared import Prepared, Row, StoredPart, empty_caption
from ecdit.data.tokenizer import load_tokenizer
from ecdit.diffusion.flow import SAMPLE_KEY_IMPL, interpolate, target_scale, velocity_target
from ecdit.encoders.autoencoder import to_unit
from ecdit.partitioning import batch_sharding, batch_shards, place_rows, replicated
from ecdit.progress import each
from ecdit.system import Params, System
from ecdit.training.step import text_states

BINS = 10  # of time, equally wide
SEED = 0x1055  # of noise and times

Rows = dict[str, np.ndarray]  # image or latents, tokens, size_crop: as training reads them, [n, ...]


class LossProgram(NamedTuple):
    """A compiled function from weights and a batch to the loss of each image."""

    losses: jax.stages.Wrapped  # (params, rows of B images, images int32[B], bins int32[B]) -> float32[B]
    batch_size: int
    mesh: Mesh


def fixed_rows(prepared: Prepared, count: int, split: Split = "held_out") -> Rows:
    """Returns `count` rows of a split, always the same ones, or all if there are fewer stored.

    The parts of a mixture come at their rates, each until its records are used up: no record comes twice.

    Raises:
      DataError: there are none.
    """
    # Every part's rows with their places in an endless mixture, of which the first are taken.
    rows_of = {
        place: min(count, count if part is None else _records(part, split))  # generated rows have no end
        for place, part in enumerate(prepared.stored)
    }
    rates = [Fraction(component.rate) for component in prepared.composition.components]
    chosen = sorted(((i + 0.5) / rates[part], part, i) for part, rows in rows_of.items() for i in range(rows))[:count]
    if not chosen:
        raise DataError(f"the data has no record in the split {split}: see data.prepare.held_out")
    readers = {part: part_reader(prepared, part, 0, split) for part, rows in rows_of.items() if rows}

    def read_row(row: int) -> Row:
        _, part, index = chosen[row]
        return readers[part](index)

    plain = dataclasses.replace(prepared.config, caption_dropout=0.0, flip_probability=0.0, crop_padding=0)
    empty = empty_caption(prepared) if plain.text_states else None
    read = augmented(plain, 0, read_row, load_tokenizer(prepared.tokenizer), empty)
    rows = [read(row) for row in range(len(chosen))]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _records(part: StoredPart, split: Split) -> int:
    """Returns how many records a part has in a split."""
    return part.manifest.num_held_out if split == "held_out" else part.manifest.num_records


def make_loss_program(system: System, mesh: Mesh, about: int, mode: Mode = "sample") -> LossProgram:
    """Returns the program, which compiles when it is first called.

    Args:
      system: the model.
      mesh: of devices.
      about: images of a batch; as many are taken as devices and groups of images need, at least these.
      mode: whether images compete for experts as in training or as in sampling.
    """
    size = batch_size(system.parts.denoiser, mesh, about, mode)
    system.parts.denoiser.check_layout(mesh, size // batch_shards(mesh), mode)
    rows = batch_sharding(mesh)

    def losses(params: Params, batch: dict[str, Array], images: Array, bins: Array) -> Array:
        model = system.bind(params)
        root = jax.random.key(SEED, impl=SAMPLE_KEY_IMPL)

        def keys_of(image: Array, bin_: Array) -> Array:
            key = jax.random.fold_in(jax.random.fold_in(root, image), bin_)
            return jax.random.split(key, 3)

        noise_keys, time_keys, autoencoder_keys = jnp.moveaxis(jax.vmap(keys_of)(images, bins), 1, 0)
        content = batch["latents"].astype(jnp.float32) if system.config.reads_latents else to_unit(batch["image"])
        latents = model.autoencoder.encode(content, autoencoder_keys)
        noise = jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:], jnp.float32))(noise_keys)
        time = (bins + jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(time_keys)) / BINS
        noisy = interpolate(latents, noise, time)
        text = text_states(model.text, batch, system.config.text.dtype)
        found = model.denoiser(noisy, time, text, batch["size_crop"], None, mode)
        scale = target_scale(time, system.config.predicts_data)[:, None, None, None]
        error = found.velocity.astype(jnp.float32) - velocity_target(latents, noise) * scale
        return jnp.mean(jnp.square(error), axis=(1, 2, 3))

    jitted = jax.jit(
        losses,
        in_shardings=(system.shardings(mesh), rows, rows, rows),
        out_shardings=replicated(mesh),
    )
    return LossProgram(jitted, size, mesh)


def batch_size(denoiser: Denoiser, mesh: Mesh, about: int, mode: Mode) -> int:
    """Returns the least number of images, at least `about`, that gives each device whole groups."""
    unit = batch_shards(mesh) * denoiser.images_together(mode)
    return math.ceil(about / unit) * unit


def losses_by_time(program: LossProgram, params: Params, rows: Rows) -> Float64[np.ndarray, " bins"]:
    """Returns the mean loss over all images in each bin of time. Collective: all processes get the same."""
    return losses_by_image(program, params, rows).mean(axis=0)


def losses_by_image(program: LossProgram, params: Params, rows: Rows) -> Float64[np.ndarray, "n bins"]:
    """Returns the loss of each image in each bin of time. Collective: all processes get the same."""
    count, size = len(rows["size_crop"]), program.batch_size
    losses = np.zeros((count, BINS))
    passes = [(shift, begin) for shift in range(BINS) for begin in range(0, count, size)]
    for shift, begin in each(passes, "computing the loss", "batches", len(passes), shown=jax.process_index() == 0):
        images = (np.arange(begin, begin + size) % count).astype(np.int32)  # the last batch goes on with the first
        bins = time_bins(images, shift)
        with jax.set_mesh(program.mesh):
            batch = {name: x[images] for name, x in rows.items()}
            placed = place_rows(program.mesh, (batch, images, bins))
            found = np.asarray(program.losses(params, *placed), np.float64)
        valid = slice(min(size, count - begin))
        losses[images[valid], bins[valid]] = found[valid]
    return losses


def time_bins(images: Int[np.ndarray, " B"], shift: int) -> Int[np.ndarray, " B"]:
    """Returns the bin of each image in a pass: over all passes, each image meets each bin once."""
    return ((images + shift) % BINS).astype(np.int32)
