"""Weights as a folder of safetensors files, in shards as other libraries have them, with files beside them."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ecdit.errors import UserError
from ecdit.files import check_writable, sync_tree, writing
from ecdit.files import sync as sync_directory
from ecdit.pretrained.config_json import WeightsError
from ecdit.pretrained.safetensors_folder import STEMS, SafetensorsFolder, weight_files

STEM = STEMS[0]
SHOWN = 5  # names of each kind in an error


def flat_names(params: dict[str, Any]) -> dict[str, Any]:
    """Returns a nested dict of arrays as {'denoiser.pairs.even.experts.up': array}."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {".".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def check_folder(folder: Path) -> None:
    """Raises UserError unless `save_folder` can make the folder. Call it before the work whose result goes there."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder, which must be missing or empty")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} holds other files; name a folder that is missing or empty, or delete it first")
    if not folder.absolute().parent.is_dir():
        raise UserError(f"{folder.absolute()}: its directory does not exist")
    check_writable(folder.absolute().parent)


def save_folder(
    params: dict[str, Any], folder: Path, metadata: dict[str, str], files: Mapping[str, bytes], shard_bytes: int
) -> list[str]:
    """Writes the arrays under their dotted names; the folder appears whole or not at all, even after a kill.

    Args:
      params: nested dicts of arrays.
      folder: a folder that is missing or empty.
      metadata: is written into every shard.
      files: further files, by their paths in the folder.
      shard_bytes: that a shard has at most, unless it holds a single larger array. Only one is in memory at a time.

    Returns the names of the shards.

    Raises:
      UserError: the folder holds something, or cannot be written.
    """
    with new_folder(folder) as scratch:
        write_files(files, scratch)
        return write_arrays(flat_names(params), scratch, STEM, metadata, shard_bytes)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder to fill, which gets the name of `folder` when it is whole, and is deleted after an error.

    Raises:
      UserError: the folder holds something, or cannot be written.
    """
    check_folder(folder)
    scratch = folder.absolute().with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    with writing(folder):
        try:
            scratch.mkdir()
            yield scratch
            sync_tree(scratch)  # or a power failure could leave the folder's name with empty files
            os.replace(scratch, folder.absolute())  # over an empty folder too, but not over one that holds something
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        sync_directory(folder.absolute().parent)


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Writes files, by their paths in a folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def write_arrays(
    arrays: Mapping[str, Any], folder: Path, stem: str, metadata: dict[str, str], shard_bytes: int
) -> list[str]:
    """Writes arrays by their names into one safetensors file or several with an index; returns the files' names.

    Args:
      arrays: on devices, or in the host's memory.
      folder: that the files go to.
      stem: with which their names begin.
      metadata: is written into every shard.
      shard_bytes: see `save_folder`.
    """
    from safetensors.numpy import save_file  # here: training writes none

    shards = _shards(arrays, shard_bytes)
    one = len(shards) == 1
    names = [f"{stem}{'' if one else f'-{n:05d}-of-{len(shards):05d}'}.safetensors" for n in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        save_file({key: np.asarray(arrays[key], order="C") for key in shard}, folder / name, metadata)
    if not one:
        (folder / f"{stem}.safetensors.index.json").write_text(_index(arrays, names, shards))
    return names


def load_folder(folder: Path, target: dict[str, Any]) -> dict[str, Any]:
    """Reads what `save_folder` wrote; each device's part alone.

    Args:
      folder: with the files.
      target: nested dicts of ShapeDtypeStructs with shardings, of all arrays.

    Raises:
      WeightsError: files are missing or damaged, or hold other arrays than `target` has.
    """
    tensors, wanted = SafetensorsFolder(folder), flat_names(target)
    found = {name: f"{tensors.dtype(name)}{list(tensors.shape(name))}" for name in tensors.names()}
    needed = {name: f"{np.dtype(x.dtype)}{list(x.shape)}" for name, x in wanted.items()}
    other = [f"{name} is {found.get(name, 'missing')}, not {text}" for name, text in needed.items()]
    wrong = [line for line, name in zip(other, needed, strict=True) if found.get(name) != needed[name]]
    wrong += [f"{name} is unknown" for name in found if name not in needed]
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise WeightsError(f"{folder} does not hold this model: {'; '.join(wrong[:SHOWN])}{more}")

    def read(path: Any, x: jax.ShapeDtypeStruct) -> jax.Array:
        name = ".".join(str(key.key) for key in path)
        part = lambda index: tensors.read(name, index)  # noqa: E731
        return jax.make_array_from_callback(x.shape, x.sharding, part)

    return jax.tree_util.tree_map_with_path(read, target)


def read_metadata(folder: Path) -> dict[str, str]:
    """Returns the metadata that `save_folder` wrote.

    Raises:
      WeightsError: there are no such files, or they are damaged.
    """
    path = weight_files(folder)[0]
    SafetensorsFolder(folder)  # names a damaged file
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return dict(file.metadata() or {})


def _shards(arrays: Mapping[str, Any], shard_bytes: int) -> list[list[str]]:
    """Returns the names of each shard's arrays, in order; a shard is closed where the next array would not fit."""
    shards, size = [[]], 0
    for name, array in arrays.items():
        if shards[-1] and size + array.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += array.nbytes
    return shards


def _index(arrays: Mapping[str, Any], names: list[str], shards: list[list[str]]) -> str:
    places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    total = sum(array.nbytes for array in arrays.values())
    return json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2) + "\n"
