"""Makes all processes of a run load the same public weights, though only the first one reads all of them.

The first process reads whole folders, once, for their fingerprints, and tells the others. Every process then reads only
the slices that its devices hold. A sum over the bits of each slice (`slice_sums`) is compared with the first process's
sum over the whole tensor, so that a process that has read anything else is refused.
"""

import dataclasses
import functools
import hashlib
import json
import math
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from ecdit.multihost import gathered, host_differences, together
from ecdit.pretrained.config_json import WeightsError
from ecdit.pretrained.layout import Layout
from ecdit.pretrained.weights import (
    SHOWN,
    Bounds,
    Loaded,
    Tensors,
    fingerprint,
    load_folder,
    open_folder,
    read_sum,
    tensors_fingerprint,
)


@dataclasses.dataclass(frozen=True)
class _Told:
    """Holds what the first process has told the others of a folder."""

    fingerprint: str
    sums: Mapping[str, int]  # by tensor


_TOLD: dict[Path, _Told] = {}  # of several processes; the same on all of them


def fingerprint_once(folder: Path) -> str:
    """Returns a folder's `fingerprint`, which the first process has told, or for which this one reads all of it once.

    It is read again only if a file in the folder has another size or time than before.

    Raises:
      WeightsError: the folder cannot be read.
    """
    if folder in _TOLD:
        return _TOLD[folder].fingerprint
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir())] if folder.is_dir() else []
    return _fingerprint(folder, tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))


@functools.cache  # a start asks for it several times
def _fingerprint(folder: Path, state: tuple[tuple[str, int, int], ...]) -> str:
    del state
    return fingerprint(folder)


def share_fingerprints(folders: Sequence[Path]) -> None:
    """Lets only the first process read whole folders, for `fingerprint_once` and `load_agreed`. Collective.

    All processes compare the configs and the names, dtypes and shapes of the tensors, for which they read headers.

    Raises:
      WeightsError: a folder cannot be read, or its config or its tensors differ between processes.
    """
    if jax.process_count() == 1:
        return
    outlines = together(lambda: {f"config or tensors of {folder}": _outline(folder) for folder in folders})
    if differences := host_differences(outlines):
        raise WeightsError("the hosts have other public weights:\n  " + "\n  ".join(differences))

    def read() -> list[Any]:
        found = []
        for folder in folders if jax.process_index() == 0 else ():
            sums: dict[str, int] = {}
            found.append([tensors_fingerprint(*open_folder(folder), sums), sums])
        return found

    told = gathered(together(read))[0]
    _TOLD.update({folder: _Told(*one) for folder, one in zip(folders, told, strict=True)})


def load_agreed(abstract: nnx.State, layout: Layout, folder: Path, mesh: Mesh | None) -> dict[str, Any]:
    """Returns a network's parameters from a folder, as `load_folder` reads them.

    After `share_fingerprints` it is collective, and refuses processes that have read other weights than the first one.

    Raises:
      WeightsError: as `load_folder`; or a process has read other weights.
    """
    if folder not in _TOLD:
        return load_folder(abstract, layout, folder, mesh).params
    loaded = together(lambda: load_folder(abstract, layout, folder, mesh, with_sums=True))
    if wrong := _wrong(loaded, _TOLD[folder].sums, open_folder(folder)[0]):
        hosts = _refused(loaded, wrong[:SHOWN], open_folder(folder)[0])
        raise WeightsError(
            f"{folder}: the hosts have read other weights than the first one, whose folder has the fingerprint "
            f"{_TOLD[folder].fingerprint[:12]}:\n  " + "\n  ".join(hosts)
        )
    return loaded.params


def _outline(folder: Path) -> str:
    """Returns the beginning of a sha256 over all of a folder but the tensors' bytes. Reads headers."""
    tensors, config = open_folder(folder)
    every = [(name, str(tensors.dtype(name)), tensors.shape(name)) for name in tensors.names()]
    return hashlib.sha256(json.dumps([config, every], sort_keys=True).encode()).hexdigest()[:12]


def _wrong(loaded: Loaded, sums: Mapping[str, int], tensors: Tensors) -> list[str]:
    """Returns the tensors of which the processes together have not read what the first one told. Collective."""
    mine = {
        name: [sum(part.sum * part.devices for part in parts.values()), sum(map(_places, parts.items()))]
        for name, parts in loaded.slices.items()
    }
    everyones = gathered(mine)
    wrong = []
    for name in sorted(mine):
        found, places = (sum(one[name][i] for one in everyones) for i in (0, 1))
        copies, left = divmod(places, math.prod(tensors.shape(name)))
        assert left == 0, name  # devices hold whole copies together
        if (found - copies * sums[name]) % 2**64:
            wrong.append(name)
    return wrong


def _places(item: tuple[Bounds, Any]) -> int:
    """Returns how many numbers of a tensor this process's devices hold in a slice."""
    bounds, part = item
    return part.devices * math.prod(stop - start for start, stop in bounds)


def _refused(loaded: Loaded, wrong: Sequence[str], tensors: Tensors) -> list[str]:
    """Returns a line for every process whose slices of some tensors are not those of the first one. Collective."""
    mine = {name: [[bounds, part.sum] for bounds, part in loaded.slices[name].items()] for name in wrong}
    everyones = gathered({"host": socket.gethostname(), "read": mine})

    def compare() -> list[str]:
        sums = functools.cache(functools.partial(read_sum, tensors))
        lines = []
        for number, one in enumerate(everyones if jax.process_index() == 0 else ()):
            names = [
                name
                for name, parts in one["read"].items()
                if any(sums(name, tuple(map(tuple, bounds))) != found for bounds, found in parts)
            ]
            if names:
                lines.append(f"process {number} (host {one['host']}): {', '.join(names)}")
        # The first process's own files may have changed since it told their sums.
        return lines or [f"the first process, since its start: {', '.join(wrong)}"]

    return gathered(together(compare))[0]
