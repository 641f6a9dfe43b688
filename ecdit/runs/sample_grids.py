"""Draws the same training captions again and again while a run trains, with the EMA weights of a step."""

import functools
from pathlib import Path

import jax
from jax.sharding import Mesh

from ecdit.data.config import DataConfig
from ecdit.data.prepared import open_prepared, sample_captions, tokenize_captions
from ecdit.files import writing
from ecdit.sampling.grids import save_grid, write_png
from ecdit.sampling.routing_maps import draw_maps
from ecdit.sampling.sampler import SamplingConfig, make_sampler, sample_images
from ecdit.storage import make_directory
from ecdit.system import Params, System


class SampleWriter:
    """Draws `sampling.num_grid` captions, evenly spaced over the data. Compiles once."""

    def __init__(self, data: DataConfig, sampling: SamplingConfig, system: System, mesh: Mesh, workdir: Path):
        self.data, self.sampling, self.directory = data, sampling, workdir / "samples"
        self.with_experts = system.parts.denoiser.counts_experts()
        self.sampler = make_sampler(system, sampling, mesh, self.with_experts)
        self.prompts = sample_captions(open_prepared(data), sampling.num_grid)

    def write(self, params: Params, step: int) -> dict[str, Path]:
        """Writes the grid of step `step`, and a heat map of experts if the model has any; returns the files by name.

        Collective: all processes draw, the first one writes.

        Raises:
          UserError: a file cannot be written.
        """
        prompts = self.prompts
        images = sample_images(
            self.sampler,
            params,
            functools.partial(tokenize_captions, self.data),
            prompts,
            [0] * len(prompts),
            self.sampling,
        )
        images, counts = images if self.with_experts else (images, None)
        files = {"samples": self.directory / f"step_{step:08d}.png"}
        if counts is not None:
            files["experts"] = self.directory / f"step_{step:08d}_experts.png"
        if jax.process_index() == 0:
            with writing(self.directory):
                make_directory(self.directory)
                save_grid(images, prompts, files["samples"])
                if counts is not None:
                    write_png(draw_maps(images, prompts, counts, self.sampling.time_shift), files["experts"])
        return files
