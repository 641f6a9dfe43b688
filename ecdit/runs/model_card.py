"""Writes the README.md of a folder that is exported for PyTorch: how to sample, and what the model is.

It says what the run, its data and its evaluations say themselves; what cannot be read is named as such.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import ecdit
from ecdit.data import DataError
from ecdit.data.generated import GENERATED
from ecdit.data.prepared import open_prepared
from ecdit.errors import UserError
from ecdit.experiment import Experiment
from ecdit.interop.pytorch_parts import denoiser_values
from ecdit.pretrained.safetensors_folder import variant_of
from ecdit.runs.diffusers_folder import Tower, public_towers
from ecdit.runs.evaluator import EVALUATIONS, scalars
from ecdit.runs.trained_run import Run
from ecdit.storage import children

PROMPT = "a red heart"

ALONE = """\
import sys

import torch
from PIL import Image

sys.path += ["transformer", "text_encoder", "tokenizer"]
from captions import Captions
from ec_dit import Denoiser
from text_tower import TextTower

torch.set_grad_enabled(False)
device = "cuda" if torch.cuda.is_available() else "cpu"
tower, denoiser = TextTower.from_pretrained("text_encoder"), Denoiser.from_pretrained("transformer").to(device)
text = [x.to(device) for x in tower(Captions.from_pretrained("tokenizer")(["{prompt}", ""]))]
size_crop, x = torch.tensor([[{original}.0, {original}.0, 0.0, 0.0]] * 2), torch.randn(1, {channels}, {size}, {size})
size_crop, x = size_crop.to(device), x.to(device)
for step in range({steps}):  # time 1 is noise, 0 the image
    time = torch.full((2,), 1 - step / {steps}, device=device)
    caption, null = denoiser(x.repeat(2, 1, 1, 1), time, *text, size_crop)
    x = x - (null + {scale} * (caption - null)) / {steps}
Image.fromarray(((x[0].permute(1, 2, 0).clip(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()).save("sample.png")
"""

PIPELINE = """\
import torch
from diffusers import DiffusionPipeline
{imports}
device = "cuda" if torch.cuda.is_available() else "cpu"
pipeline = DiffusionPipeline.from_pretrained(".", trust_remote_code=True{towers}).to(device)
noise = torch.Generator(device).manual_seed(0)
{draw}
"""


def model_card(run: Run, workdir: Path, title: str, with_towers: bool) -> str:
    """Returns the text of README.md.

    Args:
      run: the open run.
      workdir: that has its evaluations.
      title: of the text.
      with_towers: whether the folder has the run's public weights.

    Raises:
      UserError: the denoiser is the user's own, or a folder of public weights cannot be read.
    """
    towers = public_towers(run.experiment)
    sections = {
        "Sample": _sampling(run.experiment, () if with_towers else towers),
        "Model": _table(_model(run)),
        "Public weights": _towers(towers, with_towers),
        "Training": _table(_training(run)),
        "Data": "\n".join(f"- {line}" for line in _data(run)),
        "Scores": _scores(workdir, run.step),
    }
    body = "".join(f"\n## {name}\n\n{text}\n" for name, text in sections.items() if text)
    kind = f"EC-DIT (arXiv 2410.02098), a text-to-image diffusion transformer, exported by ecdit {ecdit.__version__}."
    return f"# {title}\n\n{kind}\n{body}"


def _sampling(experiment: Experiment, towers: Sequence[Tower]) -> str:
    """Returns the scripts that sample: by the networks alone if they are all there and the solver is Euler's."""
    sampling, model = experiment.sampling, experiment.model
    guidance = sampling.guidance
    classes = {tower.library: [one.kind for one in towers if one.library == tower.library] for tower in towers}
    imports = "".join(
        f"from {library} import {', '.join(dict.fromkeys(kinds))}\n" for library, kinds in classes.items()
    )
    passed = "".join(f", {one.part}={one.kind}.from_pretrained({_arguments(one)})" for one in towers)
    draw = f'pipeline("{PROMPT}", generator=noise).images[0].save("sample.png")'
    if experiment.autoencoder == "latents":  # the run has no autoencoder, which would make an image of them
        draw = f'latents = pipeline("{PROMPT}", generator=noise, output_type="latent").images'
    by_pipeline = PIPELINE.format(imports=imports, towers=passed, draw=draw)
    text = f"By diffusers, in this folder:\n\n```python\n{by_pipeline}```"
    plain = (
        sampling.solver == "euler" and sampling.time_shift == 1 and guidance.mode == "plain" and guidance.is_always()
    )
    if not plain or experiment.system.folders or experiment.autoencoder != "identity":
        return text
    alone = ALONE.format(
        prompt=PROMPT,
        original=sampling.original_size,
        channels=model.latent_channels,
        size=model.latent_size,
        steps=sampling.num_steps,
        scale=guidance.scale,
    )
    return (
        f"By torch and safetensors, with sentencepiece and pillow, in this folder:\n\n```python\n{alone}```\n\n{text}"
    )


def _arguments(tower: Tower) -> str:
    """Returns what a public tower's library is passed to read its folder."""
    width = "" if tower.projection is None else f", projection_dim={tower.projection}"
    variant = variant_of(tower.folder)
    return f'"{tower.folder.as_posix()}"{width}' + (f', variant="{variant}"' if variant else "")


def _model(run: Run) -> dict[str, Any]:
    experiment, values = run.experiment, denoiser_values(run.experiment.system)
    count = lambda part: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(run.system.shapes()[part]))  # noqa: E731
    parameters = count("denoiser")
    experts = f"{values['num_experts']}, {values['ffn'].replace('_', ' ')}"
    return {
        "images": f"{experiment.data.image_size} x {experiment.data.image_size} pixels",
        "parameters of the denoiser": f"{parameters:,}",
        "of them work on an average token": f"{parameters - run.system.parts.denoiser.idle_params():,}",
        "parameters of the text encoder": f"{count('text'):,}",
        "width, blocks": f"{values['width']}, {values['depth']} + {values['extra_blocks']}",
        "experts in every second block": "none" if values["ffn"] == "dense" else experts,
        "text encoder": ", ".join(map(str, experiment.text.folders)) or "trained or drawn with the denoiser",
        "autoencoder": experiment.vae.weights if experiment.autoencoder == "vae" else experiment.autoencoder,
    }


def _towers(towers: Sequence[Tower], with_towers: bool) -> str:
    if not towers:
        return ""
    where = "They are in this folder." if with_towers else "They are not in this folder, and have to be passed."
    lines = [f"| {one.part} | {one.folder.as_posix()} | {one.kind} | {one.fingerprint} |" for one in towers]
    return "\n".join([where, "", "| part | name | class | fingerprint |", "|---|---|---|---|", *lines])


def _training(run: Run) -> dict[str, Any]:
    experiment = run.experiment
    return {
        "step of the EMA weights": f"{run.step:,}",
        "images in a step": f"{experiment.train.batch_size:,}",
        "optimizer": f"{experiment.optimizer.name}, learning rate {experiment.optimizer.learning_rate:g}",
        "tokens dropped in training": f"{getattr(experiment.model, 'mask_ratio', 0):.0%}",
        "checkpoint": f"`{run.checkpoint}`",
    }


def _data(run: Run) -> list[str]:
    """Returns a line for the data, and for each part of it who made it and under which licence."""
    data = run.experiment.data
    lines = [f"task `{data.task}`, fingerprint `{run.dataset}`"]
    try:
        prepared = open_prepared(data)
    except (DataError, OSError):
        return [*lines, "The data was not at hand at the export, so its makers and licences are not known here."]
    if prepared.fingerprint != run.dataset:
        return [*lines, "At the export there was other data at its place, so makers and licences are not known here."]
    for component, part in zip(prepared.composition.components, prepared.stored, strict=True):
        made = GENERATED[component.task].attribution if part is None else part.manifest.attribution
        lines.append(f"`{component.task}`: {made or 'its source names no maker and no licence'}")
    return lines


def _scores(workdir: Path, step: int) -> str:
    """Returns the scores of the last evaluation up to a step, without the losses by time."""
    found = [path for path in children(workdir / EVALUATIONS) if re.fullmatch(r"step_\d+\.json", path.name)]
    records = []
    for path in sorted(found):
        try:
            record = json.loads(path.read_text())
            if record["step"] <= step:
                records.append(record)
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"{path}: is damaged: {type(error).__name__}: {error}") from None
    if not records:
        return "The run has no evaluation up to this step."
    rows = {name: f"{value:.4g}" for name, value in scalars(records[-1]).items() if "/t_" not in name}
    return f"Of step {records[-1]['step']:,}.\n\n{_table(rows)}"


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
