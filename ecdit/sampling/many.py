"""Draws many images by two compiled programs: one encodes captions, each once, the other draws a batch.

`sampler.make_sampler` does both in one program and returns all images to all hosts. Here a host gets the images of its
own devices alone, and a batch is drawn while the one before it is written.

The last batch is filled up by repeating its last image. Axes: B config.batch_size, L text tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, UInt8

from ecdit.components import TextStates
from ecdit.diffusion.flow import SAMPLE_KEY_IMPL, sample_keys, sample_noise
from ecdit.encoders.autoencoder import to_bytes
from ecdit.errors import UserError
from ecdit.partitioning import batch_sharding, place_rows, replicated
from ecdit.sampling.sampler import (
    WHY_NOT_FINITE,
    SamplingConfig,
    are_finite,
    check_sampling,
    guided_velocity,
    solve,
)
from ecdit.system import Params, System

Tokenize = Callable[[Sequence[str]], Int[np.ndarray, "n L"]]


class Programs(NamedTuple):
    """The two compiled programs, and the mesh they run on."""

    encode: jax.stages.Wrapped  # (params, tokens[B, L]) -> TextStates, whole on every device
    # (params, TextStates of B, TextStates of 1, key data[B, K]) -> uint8[B, H, W, 3], and bool[B]: whether it is finite
    draw: jax.stages.Wrapped
    config: SamplingConfig
    mesh: Mesh


class Drawn(NamedTuple):
    """The images of a batch that this process's devices have drawn."""

    images: list[tuple[int, UInt8[np.ndarray, "H W 3"]]]  # with their places in the list that was asked for
    done: int  # images of the batch, over all processes


def make_programs(system: System, config: SamplingConfig, mesh: Mesh) -> Programs:
    """Returns the programs, which compile when they are first called.

    Raises:
      ConfigError: the batch does not fit the mesh.
    """
    check_sampling(config, system.parts.denoiser, mesh)
    rows, whole, shardings = batch_sharding(mesh), replicated(mesh), system.shardings(mesh)

    def encode(params: Params, tokens: Array) -> TextStates:
        return system.bind(params).text(tokens)

    def draw(params: Params, text: TextStates, null: TextStates, key_data: Array) -> tuple[Array, Array]:
        model = system.bind(params)
        keys = jax.random.wrap_key_data(key_data, impl=SAMPLE_KEY_IMPL)
        noise = sample_noise(keys, system.config.latent_shape)
        latents, _ = solve(config, guided_velocity(model, config, text, null), noise, keys)
        images = model.autoencoder.decode(latents)
        return to_bytes(images), are_finite(images)

    return Programs(
        encode=jax.jit(encode, in_shardings=(shardings, rows), out_shardings=whole),
        draw=jax.jit(draw, in_shardings=(shardings, rows, whole, rows), out_shardings=(rows, whole)),
        config=config,
        mesh=mesh,
    )


def draw_images(
    programs: Programs, params: Params, tokenize: Tokenize, prompts: Sequence[str], repeats: Sequence[int]
) -> Iterator[Drawn]:
    """Yields the images of all (prompt, repeat) in order, batch by batch. Collective.

    A prompt is encoded once if its repeats stand together.

    Raises:
      UserError: an image has values that are not finite; as bytes they would be black. All processes raise it.
    """
    if not prompts:
        return
    size = programs.config.batch_size
    key_data = np.asarray(jax.random.key_data(sample_keys(programs.config.seed, prompts, repeats)))
    texts = _Texts(programs, params, tokenize, prompts)
    null = jax.tree.map(lambda x: x[:1], texts.encode([""] * size))
    pending = None
    for begin in range(0, len(prompts), size):
        rows = np.minimum(np.arange(begin, begin + size), len(prompts) - 1)
        states = texts.of(rows)
        with jax.set_mesh(programs.mesh):
            states, keys = place_rows(programs.mesh, (states, key_data[rows]))
            drawn, finite = programs.draw(params, states, null, keys)
        if pending is not None:
            yield _finished(pending, prompts, repeats)
        pending = _Pending(begin, min(size, len(prompts) - begin), drawn, finite)
    assert pending is not None  # there is a prompt
    yield _finished(pending, prompts, repeats)


class _Pending(NamedTuple):
    """A batch that the devices are drawing."""

    begin: int  # place of its first image
    wanted: int  # images that are asked for
    drawn: Array
    finite: Array


class _Texts:
    """Encoded captions of a list, a batch of them at a time; those that are not needed again are dropped."""

    def __init__(self, programs: Programs, params: Params, tokenize: Tokenize, prompts: Sequence[str]):
        self._programs, self._params, self._tokenize = programs, params, tokenize
        starts = [i for i in range(len(prompts)) if i == 0 or prompts[i] != prompts[i - 1]]
        self._captions = [prompts[i] for i in starts]
        self._place = np.searchsorted(starts, np.arange(len(prompts)), side="right") - 1  # of a prompt in _captions
        self._batches: dict[int, TextStates] = {}

    def of(self, rows: Int[np.ndarray, " B"]) -> TextStates:
        """Returns the states of ascending rows of the list."""
        size = self._programs.config.batch_size
        places = self._place[rows]
        first, last = places[0] // size, places[-1] // size
        self._batches = {number: states for number, states in self._batches.items() if number >= first}
        for number in range(first, last + 1):
            if number not in self._batches:
                captions = self._captions[number * size : (number + 1) * size]
                filled = captions + captions[-1:] * (size - len(captions))
                self._batches[number] = self.encode(filled)
        return jax.tree.map(
            lambda *parts: np.concatenate(parts)[places - first * size],
            *(self._batches[number] for number in range(first, last + 1)),
        )

    def encode(self, captions: Sequence[str]) -> TextStates:
        """Returns the states of a batch of captions, on the host."""
        tokens = place_rows(self._programs.mesh, self._tokenize(captions))
        with jax.set_mesh(self._programs.mesh):
            return jax.tree.map(np.asarray, self._programs.encode(self._params, tokens))


def _finished(batch: _Pending, prompts: Sequence[str], repeats: Sequence[int]) -> Drawn:
    """Fetches the rows of this process's devices: those of the batch that are asked for, each row once."""
    wrong = np.flatnonzero(~np.asarray(batch.finite)[: batch.wanted])
    if len(wrong):
        place = batch.begin + int(wrong[0])
        raise UserError(f"the image of {prompts[place]!r}, repeat {repeats[place]}, is not finite; {WHY_NOT_FINITE}")
    images = []
    for shard in batch.drawn.addressable_shards:
        if shard.replica_id == 0:
            rows = range(batch.drawn.shape[0])[shard.index[0]]
            data = np.asarray(shard.data)
            images += [(batch.begin + row, data[i]) for i, row in enumerate(rows) if row < batch.wanted]
    return Drawn(images, batch.wanted)
