"""Compares decoding of stored JPEG by `decode_stored`, simplejpeg, PyTurboJPEG (if installed), Pillow and tf.io.

On one core. The images are smooth noise, encoded as preparation does; all candidates decode the same bytes in a turn.
Run it as `python -m tests.benchmarks.jpeg_decoding`.
"""

import argparse
import functools
import io
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from ecdit.data.images import decode_stored, encode
from tests.benchmarks import timing


def stored_images(number: int, side: int, quality: int) -> list[bytes]:
    """JPEGs of smooth noise, which compress about as photographs do."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (number, side // 8, side // 8, 3), np.uint8)
    smooth = [np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)) for image in coarse]
    return [encode(image, "jpeg", quality) for image in smooth]


def decoders() -> dict[str, Callable[[bytes], Any]]:
    """Functions from JPEG bytes to uint8[H, W, 3], by name; those that are installed."""
    import simplejpeg

    def pillow(data: bytes) -> np.ndarray:
        with Image.open(io.BytesIO(data)) as file:
            return np.asarray(file.convert("RGB"))

    found: dict[str, Callable[[bytes], Any]] = {
        "decode_stored": decode_stored,
        "simplejpeg": functools.partial(simplejpeg.decode_jpeg, colorspace="RGB"),
        "pillow": pillow,
    }
    try:
        import turbojpeg

        found["pyturbojpeg"] = functools.partial(turbojpeg.TurboJPEG().decode, pixel_format=turbojpeg.TJPF_RGB)
    except (ImportError, RuntimeError):  # RuntimeError: the C library is missing
        pass
    try:
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        found["tf.io"] = lambda data: tf.io.decode_jpeg(data, channels=3).numpy()
    except ImportError:
        pass
    return found


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One run: every decoder on the same images, by turns; ratios are against the fastest peer."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    images = stored_images(arguments.images, arguments.side, arguments.quality)
    found = decoders()
    expected = decode_stored(images[0]).astype(int)
    for name, decode in found.items():
        difference = np.abs(np.asarray(decode(images[0])).astype(int) - expected).mean()
        assert difference < 2, f"{name} differs by {difference} on average"

    def candidate(decode: Callable[[bytes], Any]) -> Callable[[], None]:
        def all_images() -> None:
            for data in images:
                decode(data)

        return all_images

    candidates = {name: candidate(decode) for name, decode in found.items()}
    seconds = timing.take_turns(candidates, arguments.rounds, arguments.calls)
    peer = timing.fastest(seconds, [name for name in found if name != "decode_stored"])
    sizes = f"{arguments.images} JPEGs of {arguments.side} px, quality {arguments.quality}"
    return {"environment": timing.machine(), "cases": {"jpeg": timing.case(sizes, seconds, peer)}}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=50, help="in a call")
    parser.add_argument("--side", type=int, default=256, help="px")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs")
    timing.run_all("jpeg_decoding", timing.parse(parser, rounds=20, calls=2), measure)


if __name__ == "__main__":
    main()
