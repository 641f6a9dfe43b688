"""The layouts of benchmarks: file names of their images, and the files that their own evaluations expect beside them.

lines, parti   00000.png, 00001.png, ...
coco           images/00000.png, ...: nothing but images, as programs that compute FID read a folder
geneval        00000/samples/0000.png, ..., and 00000/metadata.jsonl
geneval2       images/00000.png, ..., and image_paths.json: {prompt: file}
dpg            images/ID_0.png, ..., and grids/ID.png: four images, two by two
"""

import collections
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ecdit.errors import UserError
from ecdit.files import replace_text
from ecdit.sampling.grids import save_png
from ecdit.sampling.prompt_files import Kind, Prompt

REPEATS: dict[Kind, int] = {"lines": 1, "parti": 1, "coco": 1, "geneval": 4, "geneval2": 1, "dpg": 4}


@dataclasses.dataclass(frozen=True)
class Planned:
    """An image that is to be drawn."""

    file: str  # under the folder of all images
    prompt: str
    repeat: int  # of the prompt, from 0; with the seed it decides the noise
    name: str  # the prompt's, see `Prompt`


def plan_images(kind: Kind, prompts: Sequence[Prompt], repeats: int) -> list[Planned]:
    """Returns `repeats` images of each prompt, prompt by prompt.

    A prompt that stands in the list again goes on with its repeats, so that no two images are the same.

    Raises:
      UserError: the benchmark takes another number of images.
    """
    if kind == "dpg" and repeats not in (1, 4):
        raise UserError(f"--repeats={repeats}: DPG-Bench takes 4 images of a prompt, or 1")
    drawn: collections.Counter[str] = collections.Counter()
    planned = []
    for i, prompt in enumerate(prompts):
        for j in range(repeats):
            file = _file(kind, i, j, i * repeats + j, prompt)
            planned.append(Planned(file, prompt.text, drawn[prompt.text] + j, prompt.name))
        drawn[prompt.text] += repeats
    return planned


def _file(kind: Kind, prompt_index: int, repeat: int, image_index: int, prompt: Prompt) -> str:
    if kind == "geneval":
        return f"{prompt_index:05d}/samples/{repeat:04d}.png"
    if kind == "dpg":
        return f"images/{prompt.name}_{repeat}.png"
    return f"{'' if kind in ('lines', 'parti') else 'images/'}{image_index:05d}.png"


def write_before(out: Path, kind: Kind, prompts: Sequence[Prompt]) -> None:
    """Writes what a benchmark wants beside the images and that needs none of them."""
    if kind != "geneval":
        return
    for i, prompt in enumerate(prompts):
        folder = out / f"{i:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / "metadata.jsonl", json.dumps(prompt.line) + "\n")


def write_after(out: Path, kind: Kind, planned: Sequence[Planned]) -> None:
    """Writes what is made of the images once all are there."""
    if kind == "geneval2":
        paths: dict[str, str] = {}
        for one in planned:
            paths.setdefault(one.prompt, str((out / one.file).absolute()))
        replace_text(out / "image_paths.json", json.dumps(paths, indent=2) + "\n")
    if kind == "dpg":
        (out / "grids").mkdir(exist_ok=True)
        parts = collections.defaultdict(list)
        for one in planned:
            parts[one.name].append(out / one.file)
        for name, files in parts.items():
            save_png(_two_by_two(files), out / "grids" / f"{name}.png")


def _two_by_two(files: Sequence[Path]) -> UInt8[np.ndarray, "h w 3"]:
    """Returns one image, or four: the first two above the others."""
    images = read_alike(files)
    side = 1 if len(images) == 1 else 2
    rows = [np.concatenate(images[side * row : side * (row + 1)], axis=1) for row in range(side)]
    return np.concatenate(rows)


def read_alike(files: Sequence[Path]) -> UInt8[np.ndarray, "n h w 3"]:
    """Returns images of one size. Raises UserError if one cannot be read, or has another size."""
    images = [read_image(file) for file in files]
    for file, image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            sizes = f"is {image.shape[1]} x {image.shape[0]}, {files[0]} is {images[0].shape[1]} x {images[0].shape[0]}"
            raise UserError(f"{file}: {sizes} px: delete the one that is wrong, and it will be drawn again")
    return np.stack(images)


def read_image(file: Path) -> np.ndarray:
    """Returns an image as uint8[h, w, 3]. Raises UserError if it cannot be read."""
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:  # SyntaxError: a broken PNG
        raise UserError(f"{file}: cannot be read as an image: {error}") from None
