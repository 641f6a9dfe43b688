"""Draws the same training captions again and again while a run trains, with the EMA weights of a step."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from ecdit.data.config import DataConfig
from ecdit.data.prepared import open_prepared, prompt_tokens, sample_captions, sample_targets
from ecdit.files import writing
from ecdit.multihost import on_first
from ecdit.sampling.grids import save_grid, write_png
from ecdit.sampling.routing_maps import draw_maps
from ecdit.sampling.sampler import SamplingConfig, make_sampler, network_times, sample_images, warn
from ecdit.storage import make_directory
from ecdit.system import Params, System

Images = UInt8[np.ndarray, "n h w 3"]


class SampleWriter:
    """Draws `sampling.num_grid` captions, evenly spaced over the data, beside their true images. Compiles once."""

    def __init__(self, data: DataConfig, sampling: SamplingConfig, system: System, mesh: Mesh, workdir: Path):
        self.data, self.sampling, self.directory = data, sampling, workdir / "samples"
        self.with_experts = system.parts.denoiser.counts_experts()
        self.sampler = make_sampler(system, sampling, mesh, self.with_experts, not_finite=warn)  # training goes on
        prepared, self.tokenize = open_prepared(data), prompt_tokens(data)
        self.prompts = sample_captions(prepared, sampling.num_grid)
        self.targets = sample_targets(prepared, sampling.num_grid)

    def write(self, params: Params, step: int, permit: Callable[[], None] = lambda: None) -> dict[str, Path]:
        """Writes the grid of step `step`, and a heat map of experts if the model has any; returns the files by name.

        Collective: all processes draw, the first one writes, after it has called `permit`.

        Raises:
          UserError: a file cannot be written; or another error that `permit` raises.
        """
        prompts = self.prompts
        images = sample_images(
            self.sampler,
            params,
            self.tokenize,
            prompts,
            [0] * len(prompts),
            self.sampling,
        )
        images, counts = images if self.with_experts else (images, None)
        files = {"samples": self.directory / f"step_{step:08d}.png"}
        if counts is not None:
            files["experts"] = self.directory / f"step_{step:08d}_experts.png"

        def save() -> None:
            permit()
            with writing(self.directory):
                make_directory(self.directory)
                cells, captions, columns = beside_targets(images, prompts, self.targets)
                save_grid(cells, captions, files["samples"], columns)
                if counts is not None:
                    write_png(draw_maps(images, prompts, counts, network_times(self.sampling)), files["experts"])

        on_first(save)
        return files


def beside_targets(
    images: Images, captions: Sequence[str], targets: Sequence[UInt8[np.ndarray, "h w 3"] | None]
) -> tuple[Images, list[str], int]:
    """Returns the images, captions and columns of a grid in which each image has its true image to its right.

    An image without a target of its size has a white cell there. If none has a target, the grid has only the images.
    """
    fitting = [target if target is not None and target.shape == images.shape[1:] else None for target in targets]
    if all(target is None for target in fitting):
        return images, list(captions), 0
    white = np.full_like(images[0], 255)
    cells = [cell for image, target in zip(images, fitting, strict=True) for cell in (image, target)]
    texts = [
        text
        for caption, target in zip(captions, fitting, strict=True)
        for text in (caption, "" if target is None else "true image")
    ]
    cells = np.stack([white if cell is None else cell for cell in cells])
    return cells, texts, 2 * math.ceil(math.sqrt(len(images) / 2))
