"""Writes one HTML file that shows a sample's routing in a browser, without a network.

`routing_page.html` is the page; this puts the data into it. Axes as in `sampling.routing_tables`.
"""

import base64
import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from ecdit.errors import UserError
from ecdit.sampling.routing_maps import VIRIDIS
from ecdit.sampling.routing_tables import Takings, favourites

TEMPLATE = Path(__file__).with_name("routing_page.html")
MAX_BYTES = 32 * 2**20  # of a page
FAVOURITES = 5  # captions of an expert


def quantise(gates: Float[np.ndarray, "*axes"], top: float) -> UInt8[np.ndarray, "*axes"]:
    """Returns gates of 0 .. top in steps of top / 255. Only 0 becomes 0, so that it still says: not taken."""
    steps = (gates * (255 / top)).round()
    return np.where(gates > 0, np.clip(steps, 1, 255), 0).astype(np.uint8)


def render_page(
    prompts: Sequence[str],
    images: UInt8[np.ndarray, "n h w 3"],
    gates: Float[np.ndarray, "n steps P N E"],
    times: Float[np.ndarray, " steps"],
    found: Takings,
    about: str,
    last_steps: str,
    num_images: int,
    steps: Sequence[int],
) -> str:
    """Returns the HTML of a page.

    Args:
      prompts: of all images.
      images: all images, square.
      gates: all gates.
      times: when each solver step starts.
      found: what the experts take of all images.
      about: a line on where the images come from.
      last_steps: when `found` was taken, such as "in the last 5 steps".
      num_images: how many images the page shows, the first ones.
      steps: the solver steps that it shows.

    Raises:
      UserError: the page would have more than MAX_BYTES.
    """
    shown = gates[:num_images][:, list(steps)]
    top = float(shown.max()) or 1.0
    order = favourites(found, FAVOURITES)
    data = {
        "about": about,
        "prompts": list(prompts[:num_images]),
        "images": [_png(image) for image in images[:num_images]],
        "times": times[list(steps)].tolist(),
        "layers": gates.shape[2],
        "experts": gates.shape[4],
        "grid": round(gates.shape[3] ** 0.5),
        "top": top,
        "gates": base64.b64encode(gzip.compress(quantise(shown, top).tobytes(), mtime=0)).decode(),
        "patches": _png(_sprites(found.patches)),
        "favourites": [
            [
                [[prompts[image], round(float(found.tokens[layer, expert, image]), 1)] for image in images]
                for expert, images in enumerate(experts)
            ]
            for layer, experts in enumerate(order.tolist())
        ],
        "lastSteps": last_steps,
        "colours": VIRIDIS.tolist(),
    }
    page = TEMPLATE.read_text(encoding="utf-8").replace("@DATA@", _json(data))
    size = len(page.encode())
    if size > MAX_BYTES:
        raise UserError(
            f"the page of {num_images} images and {len(steps)} times would have {size / 2**20:.0f} MiB, more than "
            f"{MAX_BYTES // 2**20}: take fewer by --page_images or --page_times"
        )
    return page


def _json(data: dict[str, Any]) -> str:
    """Returns JSON that may stand in a <script> whatever the prompts are: without "<", no tag can begin in it."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _png(image: UInt8[np.ndarray, "h w 3"]) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _sprites(patches: UInt8[np.ndarray, "P E p p 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Returns one image of all patches: a row for each layer, a column for each expert."""
    layers, experts, p = patches.shape[:3]
    return patches.swapaxes(1, 2).reshape(layers * p, experts * p, 3)
