"""Compares sampling with diffusers' PixArt pipeline of the same width, depth and heads, by batch, on the CPU.

    python -m tests.benchmarks.sampling_pixart [--batches=1,8,64] [--steps=4] [--width=256] [--depth=6] [--json=FILE]

Needs the extra `parity`. All candidates have random weights, the same number of network calls (Euler here, DPM-Solver++
there, one call a step), guidance, float32, and take turns in one process. Both return latents. The pipeline is given
the caption's states, here a small text tower computes them, once an image. `dense` has the FFN that PixArt has in each
block, `8E` the paper's eight experts in every other block. Parameters of the denoisers are printed.
"""

import argparse
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ecdit.diffusion.flow import sample_keys
from ecdit.experiment import Experiment
from ecdit.partitioning import make_mesh
from ecdit.sampling.sampler import make_sampler
from ecdit.system import make_system
from ecdit.training.state import run_key
from tests.benchmarks import timing
from tests.benchmarks.accelerator_device import ALONE, random_tokens
from tests.benchmarks.moe_layer import finished
from tests.benchmarks.paper import paper_experiment

TEXT_WIDTH, TEXT_LENGTH, HEAD_WIDTH, CHANNELS = 64, 32, 32, 4
GUIDANCE = 4.5
OURS = {"dense": "XL-dense", "8E": "XL-8E"}


def experiment(name: str, arguments: argparse.Namespace) -> Experiment:
    """configs/ec_dit.py:`name` at the benchmark's size."""
    heads = arguments.width // HEAD_WIDTH
    return paper_experiment(
        name,
        **ALONE,
        model__latent_size=arguments.latent,
        model__latent_channels=CHANNELS,
        model__width=arguments.width,
        model__depth=arguments.depth,
        model__extra_blocks=0,
        model__mask_ratio=0.0,
        model__heads=heads,
        model__kv_heads=heads,
        model__dtype="float32",
        model__attention="plain",
        model__projections="plain",
        data__latent_channels=CHANNELS,
        data__image_size=8 * arguments.latent,
        data__vocab_size=300,
        data__caption_length=TEXT_LENGTH,
        text__vocab_size=300,
        text__width=TEXT_WIDTH,
        text__heads=2,
        text__layers=1,
        text__dtype="float32",
        sampling__solver="euler",
        sampling__num_steps=arguments.steps,
        sampling__guidance__scale=GUIDANCE,
        sampling__batch_size=1,
        runtime__compilation_cache="",
    )


def ours(config: Experiment, batches: list[int]) -> tuple[dict[int, Callable[[], Any]], int]:
    """Functions that draw a batch's latents, by batch, and the denoiser's number of parameters."""
    import dataclasses

    system, mesh = make_system(config.system), make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        params = jax.jit(system.init, out_shardings=system.shardings(mesh))(run_key(0, "init"))
    candidates = {}
    for batch in batches:
        sampler = make_sampler(system, dataclasses.replace(config.sampling, batch_size=batch), mesh)
        tokens, null = random_tokens(np.random.default_rng(0), config, batch), np.zeros((1, TEXT_LENGTH), np.int32)
        null[0, 0] = 1
        keys = sample_keys(0, [""] * batch, range(batch))
        candidates[batch] = functools.partial(finished, sampler, params, tokens, null, keys)
    return candidates, sum(leaf.size for leaf in jax.tree.leaves(params["denoiser"]))


def pixart(arguments: argparse.Namespace, batches: list[int]) -> tuple[dict[int, Callable[[], Any]], int]:
    """Returns the same for the pipeline of diffusers."""
    import diffusers
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=arguments.width // HEAD_WIDTH,
        attention_head_dim=HEAD_WIDTH,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,  # as PixArt's, with a variance that is dropped
        num_layers=arguments.depth,
        cross_attention_dim=arguments.width,
        sample_size=arguments.latent,
        caption_channels=TEXT_WIDTH,
    ).eval()
    pipeline = diffusers.PixArtAlphaPipeline(None, None, None, transformer, diffusers.DPMSolverMultistepScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def draw(batch: int) -> Any:
        states, mask = torch.zeros(batch, TEXT_LENGTH, TEXT_WIDTH), torch.ones(batch, TEXT_LENGTH)
        with torch.inference_mode():
            return pipeline(
                prompt_embeds=states + 1,
                prompt_attention_mask=mask,
                negative_prompt=None,
                negative_prompt_embeds=states,
                negative_prompt_attention_mask=mask,
                num_inference_steps=arguments.steps,
                guidance_scale=GUIDANCE,
                use_resolution_binning=False,
                output_type="latent",
            ).images

    parameters = sum(value.numel() for value in transformer.parameters())
    return {batch: functools.partial(draw, batch) for batch in batches}, parameters


def use_torchvision() -> None:
    """Lets torchvision be imported beside PyTorch's CPU build, which diffusers does: see tests/parity/conftest.py."""
    import torch

    operators = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            operators.define(f"{operator}() -> Tensor")
    torch.torchvision_operators = operators  # pyright: ignore[reportAttributeAccessIssue]  # gone with the object


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures in one process: a case for each batch, ratios of seconds against the pipeline."""
    use_torchvision()
    batches = [int(batch) for batch in arguments.batches.split(",")]
    candidates = {name: ours(experiment(config, arguments), batches) for name, config in OURS.items()}
    candidates["pixart"] = pixart(arguments, batches)
    parameters = {name: count for name, (_, count) in candidates.items()}
    tokens = (arguments.latent // 2) ** 2
    cases = {}
    for batch in batches:
        draws = {name: functions[batch] for name, (functions, _) in candidates.items()}
        shape = (batch, CHANNELS, arguments.latent, arguments.latent)
        assert tuple(draws["pixart"]().shape) == shape
        assert draws["dense"]().shape == (batch, arguments.latent, arguments.latent, CHANNELS)
        seconds = timing.take_turns(draws, arguments.rounds, arguments.calls, warmup=1)
        sizes = f"{tokens} tokens, width {arguments.width}, depth {arguments.depth}, {arguments.steps} steps"
        rates = {name: batch / min(found) for name, found in seconds.items()}
        case = timing.case(f"batch {batch}, {sizes}", seconds, "pixart", images_per_second=rates)
        cases[f"batch {batch}"] = case
    return {"environment": {**timing.machine(), "parameters": parameters}, "cases": cases}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,8,64", help="images at once")
    parser.add_argument("--steps", type=int, default=4, help="network calls an image")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=6, help="blocks")
    parser.add_argument("--latent", type=int, default=16, help="side of the latents, in patches of 2")
    timing.run_all("sampling_pixart", timing.parse(parser, rounds=5, calls=1), measure)


if __name__ == "__main__":
    main()
