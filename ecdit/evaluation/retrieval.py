"""Measures retrieval: whether the image of a caption is among those nearest to its sample.

For training captions it measures fit, not generality: a model that memorised its data would be perfect. For
held-out ones it measures how well names and styles that were seen apart are put together.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from ecdit.errors import UserError
from ecdit.sampling.prompts import check_changes
from ecdit.sampling.sampler import SamplingConfig

NUM_CAPTIONS = 480  # sampled unless told otherwise: figures of other counts do not compare with those
_BLOCK = 64, 1024  # samples and images whose distances are computed at a time: 25 MB at 32 px, 100 MB at 64 px


def protocol(config: SamplingConfig, seed: int = 0, changes: Sequence[str] = ()) -> SamplingConfig:
    """Returns the protocol's sampling, whatever the run's own is: Euler, 25 steps, guidance 3, and this seed.

    Args:
      config: the run's own sampling.
      seed: of the noise.
      changes: values of --set, "sampling.guidance.scale=5", which `config` has already and which it keeps.
    """
    kept = {change.partition("=")[0] for change in changes}

    def fixed(group: str, values: dict[str, Any]) -> dict[str, Any]:
        return {} if group in kept else {key: value for key, value in values.items() if f"{group}.{key}" not in kept}

    guidance = {"scale": 3.0, "mode": "plain", "interval_low": 0.0, "interval_high": 1.0}
    sampling = {"solver": "euler", "num_steps": 25, "time_shift": 1.0, "churn": 0.0}
    return dataclasses.replace(
        config,
        guidance=dataclasses.replace(config.guidance, **fixed("sampling.guidance", guidance)),
        seed=seed,
        **fixed("sampling", sampling),
    )


def check_protocol_changes(changes: Sequence[str], places: Sequence[str]) -> None:
    """Raises UserError for a value of --set that changes neither the protocol's sampling nor one of `places`."""
    check_changes(changes, places)
    for change in changes:
        if change.partition("=")[0] == "sampling.seed":
            raise UserError(f"--set={change}: the seed must be given by --seed")


def fixed_choice(num_records: int, count: int = NUM_CAPTIONS) -> Int[np.ndarray, " n"]:
    """Returns the records whose captions are sampled: the same `count` for every run, spread at random, sorted."""
    return np.sort(np.random.Generator(np.random.Philox(0)).permutation(num_records)[:count])


def target_ranks(
    samples: UInt8[np.ndarray, "n h w 3"],
    images: UInt8[np.ndarray, "N h w 3"],
    targets: Int[np.ndarray, " n"],
    candidates: Bool[np.ndarray, "n N"] | None = None,
) -> Int[np.ndarray, " n"]:
    """Returns how many images are strictly nearer to each sample than its target is, by root mean square over pixels.

    An image identical to the target is as near as the target, so it never counts against it: distances are exact.

    Args:
      samples: images to look up.
      images: among which they are looked up.
      targets: the image of each sample's caption.
      candidates: the images that count for each sample; None for all. The target need not be one of them.
    """
    ranks = []
    for begin in range(0, len(samples), _BLOCK[0]):
        block = slice(begin, begin + _BLOCK[0])
        distances = squared_distances(samples[block], images)
        nearer = distances < np.take_along_axis(distances, targets[block, None], axis=1)
        ranks.append((nearer if candidates is None else nearer & candidates[block]).sum(axis=1))
    return np.concatenate(ranks)


def squared_distances(
    samples: UInt8[np.ndarray, "n h w 3"], images: UInt8[np.ndarray, "N h w 3"]
) -> Float[np.ndarray, "n N"]:
    """Returns the sums of squared differences over pixels; exact, as all terms are whole numbers below 2**53."""
    flat = samples.reshape(len(samples), -1).astype(np.float64)
    found = np.empty((len(samples), len(images)))
    for begin in range(0, len(images), _BLOCK[1]):
        some = images[begin : begin + _BLOCK[1]]
        some = some.reshape(len(some), -1).astype(np.float64)
        norms = np.square(flat).sum(axis=1)[:, None] + np.square(some).sum(axis=1)[None]
        found[:, begin : begin + _BLOCK[1]] = norms - 2 * flat @ some.T
    return found


def nearest_other_styles(
    images: UInt8[np.ndarray, "N h w 3"],
    targets: Int[np.ndarray, " n"],
    names: Int[np.ndarray, " N"],
    usable: Bool[np.ndarray, " N"],
) -> Int[np.ndarray, " n"]:
    """Returns for each target the usable image of the same name that is nearest to it: what copying could reach.

    Choosing it takes the target itself, so it is an upper bound for copying one image of the name.

    Args:
      images: of all names and styles.
      targets: which of them are asked for; each of a name that has a usable image.
      names: of the images, numbered.
      usable: the images that may be copied, such as those of training; a target may not be one.
    """
    found = []
    for target in targets:
        same = np.flatnonzero(usable & (names == names[target]))
        found.append(same[squared_distances(images[target][None], images[same])[0].argmin()])
    return np.array(found)


def recall(ranks: Int[np.ndarray, " n"], k: int) -> Float[np.ndarray, ""]:
    """Returns the share of samples whose target is among the k nearest."""
    return (ranks < k).mean()


def chance(num_candidates: Int[np.ndarray, " n"], k: int) -> Float[np.ndarray, ""]:
    """Returns the recall of an order drawn at random, where each sample has so many candidates, none identical."""
    return np.minimum(k / num_candidates, 1).mean()
