"""Measures the accuracy of the `shapes` data's judge on the data's own images and on Pillow's drawings of its scenes.

    python -m tests.benchmarks.shapes_judge --only=none [--scenes=2000] [--sizes=32,64] [--json=FILE]
    python -m tests.benchmarks.shapes_judge --only=own --sizes=32

The scenes are training rows on textured ground, with all six kinds of captions. Each image is judged with its own
caption, which must be accepted, and with every caption that differs in one attribute, which must be rejected. The
numbers are shares of captions in percent.

    own                 the data's renderer
    pillow              Pillow's polygons and ellipses, drawn 8 times as large and reduced
    pillow, no edges    drawn at the image's own size, where Pillow smooths nothing
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ecdit.data.shape_captions import metadata_of
from ecdit.data.shape_rendering import render
from ecdit.data.shape_scenes import COLORS, KINDS, RELATIONS, SHAPES, Box, Scene, ShapesConfig, scene_of
from ecdit.evaluation.shapes_judge import find_objects, verdict

Metadata = dict[str, Any]

# Corners in the box [-1, 1] x [-1, 1], written apart from the data's renderer, which has conditions and no corners.
POLYGONS = {
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": [(0, -1), (1, 1), (-1, 1)],
    "diamond": [(0, -1), (1, 0), (0, 1), (-1, 0)],
    "cross": [
        *[(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3)],
        *[(0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)],
    ],
}


def star_corners() -> list[tuple[float, float]]:
    """A five-pointed star's ten corners, stretched so that it touches all sides of the box."""
    angles = np.deg2rad(-90 + 36 * np.arange(10))
    radii = np.where(np.arange(10) % 2 == 0, 1, (3 - 5**0.5) / 2)
    x, y = radii * np.cos(angles), radii * np.sin(angles)
    return list(zip(x / abs(x).max(), 2 * (y - y.min()) / (y.max() - y.min()) - 1, strict=True))


def pillow_shape(draw: ImageDraw.ImageDraw, shape: str, box: Box, side: int, color: int | tuple[int, ...]) -> None:
    """Draws one shape on an image of `side` px."""

    def place(x: float, y: float) -> tuple[float, float]:
        return (box.x + x * box.half) * side, (box.y + y * box.half) * side

    if shape in ("circle", "ring"):
        draw.ellipse([place(-1, -1), place(1, 1)], fill=color)
    else:
        draw.polygon([place(*corner) for corner in POLYGONS.get(shape) or star_corners()], fill=color)


def draw_with_pillow(scene: Scene, side: int, scale: int = 8) -> np.ndarray:
    """The scene drawn by Pillow `scale` times as large and reduced by area, uint8[side, side, 3].

    The ground is the data's own: textures are no matter of a rasteriser.
    """
    ground = Image.fromarray(render(dataclasses.replace(scene, objects=()), side))
    image = ground.resize((side * scale, side * scale), Image.Resampling.NEAREST)
    for placed in scene.objects:
        mask = Image.new("L", image.size, 0)
        draw = ImageDraw.Draw(mask)
        pillow_shape(draw, placed.shape, placed.box, side * scale, 255)
        if placed.shape == "ring":
            hole = dataclasses.replace(placed.box, half=placed.box.half / 2)
            pillow_shape(draw, "circle", hole, side * scale, 0)
        image.paste(placed.rgb, mask=mask)
    return np.asarray(image.resize((side, side), Image.Resampling.BOX))


def false_metadata(scene: Scene) -> Iterator[tuple[str, Metadata]]:
    """Yields (attribute, metadata) of every caption that differs in one attribute from the scene's own."""
    true = metadata_of(scene, "")
    taken = {item["class"] for item in true["include"]}
    for place, item in enumerate(true["include"]):

        def changed(place: int = place, **values: Any) -> Metadata:
            include = [dict(each) for each in true["include"]]
            include[place] |= values
            exclude = [{"class": include[0]["class"], "count": include[0]["count"] + 1}]
            return {**true, "include": include, **({"exclude": exclude} if "exclude" in true else {})}

        yield from (("shape", changed(**{"class": shape})) for shape in SHAPES if shape not in taken)
        if "color" in item:
            yield from (("color", changed(color=color)) for color in COLORS if color != item["color"])
        if "position" in item:
            relation = item["position"][0]
            yield from (("position", changed(position=[other, 0])) for other in RELATIONS if other != relation)
        if scene.kind == "counting":
            yield from (("count", changed(count=count)) for count in (2, 3, 4) if count != item["count"])
    if scene.kind == "color_attr":
        first, second = true["include"]
        exchanged = [first | {"color": second["color"]}, second | {"color": first["color"]}]
        yield "color", true | {"include": exchanged}


def blur(sigma: float) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    """A Gaussian blur, `sigma` in px."""
    return lambda image, random: np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))


def noise(sigma: float) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    """Gaussian noise on every channel, `sigma` in levels of 255."""
    return lambda image, random: np.clip(np.rint(image + random.normal(0, sigma, image.shape)), 0, 255).astype(np.uint8)


def shift(down: int, right: int) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    """Moved by whole pixels; the first row or column is repeated."""

    def moved(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
        padded = np.pad(image, ((max(down, 0), max(-down, 0)), (max(right, 0), max(-right, 0)), (0, 0)), mode="edge")
        return padded[max(-down, 0) :, max(-right, 0) :][: image.shape[0], : image.shape[1]]

    return moved


RASTERISERS: dict[str, Callable[[Scene, int], np.ndarray]] = {
    "own": render,
    "pillow": draw_with_pillow,
    "pillow, no edges": lambda scene, side: draw_with_pillow(scene, side, scale=1),
}
CHANGES: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "none": lambda image, random: image,
    **{f"blur {sigma} px": blur(sigma) for sigma in (0.5, 0.75, 1.0, 1.5)},
    **{f"noise {sigma}": noise(sigma) for sigma in (5, 10, 15, 20, 30)},
    "shift 1 px": shift(1, -1),
    "shift 2 px": shift(-2, 2),
    "blur 0.5 px, noise 10, shift 1 px": lambda image, random: noise(10)(
        shift(-1, 1)(blur(0.5)(image, random), random), random
    ),
}


@dataclasses.dataclass(frozen=True)
class Rates:
    """Captions judged, and judged rightly."""

    true: int = 0
    accepted: int = 0
    false: int = 0
    rejected: int = 0

    def __add__(self, other: "Rates") -> "Rates":
        return Rates(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


def scenes_of(count: int, image_size: int, seed: int = 0) -> Iterator[Scene]:
    config = ShapesConfig(image_size, "textured", "train", KINDS)
    return (scene_of(config, seed, row) for row in range(count))


def measure(rasteriser: str, change: str, image_size: int, count: int, seed: int = 0) -> Rates:
    """Judges `count` scenes; the noise of a scene depends on its row alone."""
    rates = Rates()
    for row, scene in enumerate(scenes_of(count, image_size, seed)):
        image = CHANGES[change](RASTERISERS[rasteriser](scene, image_size), np.random.default_rng([seed, row]))
        objects = find_objects(image)
        rejected = [not verdict(objects, metadata).correct for _, metadata in false_metadata(scene)]
        rates += Rates(1, verdict(objects, metadata_of(scene, "")).correct, len(rejected), sum(rejected))
    return rates


def table(rows: list[dict[str, Any]]) -> str:
    """The rates as markdown."""
    lines = ["| px | drawn by | changed by | accepted, % | rejected, % |", "|---|---|---|---|---|"]
    for row in rows:
        accepted, rejected = (100 * row[good] / row[of] for good, of in (("accepted", "true"), ("rejected", "false")))
        lines.append(f"| {row['px']} | {row['drawn']} | {row['changed']} | {accepted:.2f} | {rejected:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=2000, help="of every row of the table")
    parser.add_argument("--sizes", default="32,64", help="px, separated by commas")
    parser.add_argument("--only", help="one rasteriser or one change, by its name in the table")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes and the noise")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--json", type=Path, help="where to write the counts")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    cases = [(drawn, changed, size) for size in sizes for drawn in RASTERISERS for changed in CHANGES]
    cases = [case for case in cases if not arguments.only or arguments.only in case]
    if not cases:
        parser.error(f"--only={arguments.only}: must be one of {', '.join([*RASTERISERS, *CHANGES])}")
    with concurrent.futures.ProcessPoolExecutor(arguments.jobs) as pool:
        futures = [pool.submit(measure, *case, arguments.scenes, arguments.seed) for case in cases]
        rows = [
            {"px": size, "drawn": drawn, "changed": changed, **dataclasses.asdict(future.result())}
            for (drawn, changed, size), future in zip(cases, futures, strict=True)
        ]
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
