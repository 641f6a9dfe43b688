"""How well samples fit their training images: is the captioned image among the nearest of the whole data set?

It measures fit to training captions, not generality: a model that memorised its data would be perfect.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int, UInt8

from ecdit.diffusion.guidance import GuidanceConfig
from ecdit.sampling.sampler import SamplingConfig

NUM_CAPTIONS = 480  # sampled unless told otherwise: figures of other counts do not compare with those


def protocol(config: SamplingConfig, seed: int = 0) -> SamplingConfig:
    """Returns the protocol's sampling, whatever the run's own is: Euler, 25 steps, guidance 3, and this seed."""
    guidance = GuidanceConfig(scale=3.0, mode="plain")
    return dataclasses.replace(config, solver="euler", num_steps=25, guidance=guidance, seed=seed)


def fixed_choice(num_records: int, count: int = NUM_CAPTIONS) -> Int[np.ndarray, " n"]:
    """Returns the records whose captions are sampled: the same `count` for every run, spread at random, sorted."""
    return np.sort(np.random.Generator(np.random.Philox(0)).permutation(num_records)[:count])


def target_ranks(
    samples: UInt8[np.ndarray, "n h w 3"], pictures: UInt8[np.ndarray, "N h w 3"], targets: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " n"]:
    """Returns how many images are strictly nearer to each sample than its target is, by root mean square over pixels.

    An image identical to the target is as near as the target, so it never counts against it: distances are exact.
    """
    flat = pictures.reshape(len(pictures), -1).astype(np.float64)
    ranks = []
    for sample, target in zip(samples.reshape(len(samples), -1).astype(np.float64), targets, strict=True):
        distance = np.square(flat - sample[None]).sum(axis=1)
        ranks.append(int((distance < distance[target]).sum()))
    return np.array(ranks)


def recall(ranks: Int[np.ndarray, " n"], k: int) -> Float[np.ndarray, ""]:
    """Returns the share of samples whose target is among the k nearest."""
    return (ranks < k).mean()
