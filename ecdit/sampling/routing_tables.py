"""Computes tables of a sample's routing: coverage, the busiest token, and the tokens that each expert takes.

Everything follows from the gates that `sampler.make_sampler` returns: 0 where an expert did not take a token.

Axes: n images, P sparse layers, N tokens in raster order, E experts, K numbers of experts on a token (0, 1, ...),
p pixels along a side of a patch.
"""

import csv
import io
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8


class Takings(NamedTuple):
    """The tokens that every expert of every sparse layer takes in the last solver steps."""

    patches: UInt8[np.ndarray, "P E p p 3"]  # the mean of the images' patches under its tokens; black if it took none
    tokens: Float[np.ndarray, "P E n"]  # how many tokens of each image it takes, on average over the steps
    gates: Float[np.ndarray, "P E n"]  # the sum of its gates in each image, on average over the steps


def counts_of(gates: Float[np.ndarray, "*axes E"]) -> Int[np.ndarray, "*axes"]:
    """Returns how many experts took each token, int32."""
    return (gates > 0).sum(axis=-1, dtype=np.int32)


def coverage(counts: Int[np.ndarray, "n steps P N"]) -> Float[np.ndarray, "steps P K"]:
    """Returns the share of all images' tokens that 0, 1, ..., K - 1 experts took; K - 1 is the most on any token."""
    shares = [(counts == number).mean(axis=(0, 3)) for number in range(int(counts.max()) + 1)]
    return np.stack(shares, axis=-1)


def busiest_share(counts: Int[np.ndarray, "n steps P N"], num_experts: int) -> Float[np.ndarray, "n steps P"]:
    """Returns the share of the layer's experts that took the token which most of them took."""
    return counts.max(axis=-1) / num_experts


def takings(
    images: UInt8[np.ndarray, "n h w 3"], gates: Float[np.ndarray, "n steps P N E"], last_steps: int
) -> Takings:
    """Returns what each expert takes in the last `last_steps` solver steps, when the images are nearly drawn."""
    late = gates[:, -last_steps:]
    times_taken = (late > 0).sum(axis=1)  # (n, P, N, E)
    taken = np.einsum("ipte->pe", times_taken)
    patches = np.einsum(
        "ipte,itabc->peabc", times_taken.astype(np.float64), split_patches(images, gates.shape[3]), optimize=True
    )
    mean = patches / np.maximum(taken, 1)[:, :, None, None, None]
    steps = late.shape[1]
    return Takings(
        mean.round().astype(np.uint8),
        np.moveaxis(times_taken.sum(axis=2), 0, -1) / steps,
        np.moveaxis(late.sum(axis=(1, 3), dtype=np.float64), 0, -1) / steps,
    )


def favourites(found: Takings, count: int) -> Int[np.ndarray, "P E top"]:
    """Returns the images of which each expert takes the most tokens, the most first, at most `count`.

    Where an image is a group of its own, an expert of expert choice takes equally many tokens of every image. Equal
    numbers of tokens are ordered by the sum of the gates.
    """
    order = np.lexsort((-found.gates, -found.tokens), axis=-1)
    return order[..., :count]


def split_patches(images: UInt8[np.ndarray, "n h w 3"], num_tokens: int) -> UInt8[np.ndarray, "n N p p 3"]:
    """Returns the pixels under each token: tokens are square patches in raster order."""
    n, side = len(images), images.shape[1]
    grid = math.isqrt(num_tokens)
    p = side // grid
    split = images.reshape(n, grid, p, grid, p, 3).swapaxes(2, 3)
    return split.reshape(n, num_tokens, p, p, 3)


def coverage_csv(
    shares: Float[np.ndarray, "steps P K"],
    busiest: Float[np.ndarray, "n steps P"],
    times: Float[np.ndarray, " steps"],
) -> str:
    """Returns a table with a line for every solver step and sparse layer.

    `busiest` is the mean over images, `busiest_most` the largest of them.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["time", "layer", *[f"share_{k}" for k in range(shares.shape[2])], "busiest", "busiest_most"])
    for step, layer in np.ndindex(*shares.shape[:2]):
        of_images = busiest[:, step, layer]
        numbers = [*shares[step, layer], of_images.mean(), of_images.max()]
        table.writerow([f"{times[step]:.4g}", layer + 1, *[f"{number:.6g}" for number in numbers]])
    return text.getvalue()


def layer_table(shares: Float[np.ndarray, "steps P K"], busiest: Float[np.ndarray, "n steps P"]) -> str:
    """Returns a table for people: each sparse layer's mean coverage over solver steps, and its busiest token."""
    mean = shares.mean(axis=0)
    upper = mean[:, 3:].sum(axis=1)
    lines = ["layer   0 experts  1        2        3 or more  busiest token"]
    for layer in range(len(mean)):
        few = [mean[layer, k] if k < mean.shape[1] else 0.0 for k in range(3)]
        cells = "".join(f"{share:<9.1%}" for share in few)
        lines.append(f"{layer + 1:<8}  {cells}{upper[layer]:<11.1%}{busiest[:, :, layer].max():.1%} of the experts")
    return "\n".join(lines)
