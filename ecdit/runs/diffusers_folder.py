"""A run's EMA weights as a folder from which PyTorch samples, alone or by diffusers.

README.md                     says how to sample, and what the model is; `model_card` writes it
model_index.json              the parts, by diffusers' names, and the run's settings of sampling
pipeline.py                   diffusers' pipeline, a copy of ecdit/interop/pytorch/pipeline.py, as the others below
scheduler/                    the config of diffusers' FlowMatchEulerDiscreteScheduler
transformer/                  config.json, weights and ec_dit.py
tokenizer/                    the tokenizer of the training and captions.py
text_encoder/                 config.json, weights and text_tower.py of a tower that was trained or drawn
text_encoder/, text_encoder_2/, vae/      public weights, if they are asked for; else they are named in the index
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import ecdit
from ecdit.errors import UserError
from ecdit.experiment import Experiment
from ecdit.interop.pytorch_parts import denoiser_values, torch_weights, tower_values
from ecdit.interop.weights import flat_names, new_folder, write_arrays, write_files
from ecdit.pretrained.agreement import fingerprint_once
from ecdit.pretrained.clip_text import DEFAULTS as CLIP_DEFAULTS
from ecdit.pretrained.config_json import CONFIG, WeightsError, read_json
from ecdit.pretrained.safetensors_folder import STEMS, index_file, weight_files
from ecdit.pretrained.t5x_checkpoint import is_t5x
from ecdit.pretrained.text_encoders import T5_TYPES
from ecdit.runs.kept_tokenizer import FOLDER
from ecdit.runs.trained_run import Run

TRANSFORMERS_STEM, DIFFUSERS_STEM = STEMS
INDEX = ".safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Tower:
    """A public text encoder or autoencoder that a run has."""

    part: str  # its name in the pipeline
    folder: Path
    library: str
    kind: str  # its class there
    fingerprint: str
    # Width of the projected pooled state where transformers has to be told it: its text encoder takes that of a whole
    # CLIP's text_config, a whole CLIP the one beside it, and files may have both.
    projection: int | None = None

    @property
    def stem(self) -> str:
        """Returns the name of its file of weights, by which its library finds them."""
        return DIFFUSERS_STEM if self.library == "diffusers" else TRANSFORMERS_STEM


def export_diffusers(run: Run, folder: Path, shard_bytes: int, card: str, with_towers: bool) -> list[str]:
    """Writes the folder, which appears whole or not at all; returns the names of the transformer's files of weights.

    Args:
      run: an open run.
      folder: that is missing or empty.
      shard_bytes: that a file of weights has at most, unless it holds a single larger array.
      card: what README.md says.
      with_towers: whether to copy public text encoders and autoencoders.

    Raises:
      UserError: the denoiser is the user's own or joins more than two images in a group, or the folder holds
        something or cannot be written.
    """
    system = run.experiment.system
    transformer, towers = denoiser_values(system), public_towers(run.experiment)
    if (images := run.system.parts.denoiser.images_together("sample")) > 2:
        raise UserError(
            f"model.sampling_group = {transformer['sampling_group']!r}: joins {images} images, which the pipeline "
            'would have to draw together; must be "image", or join the two passes of guidance. Resume the run with it'
        )
    metadata = {"ecdit": ecdit.__version__, "step": str(run.step), "checkpoint": run.checkpoint}
    files = {f"{FOLDER}/{name}": data for name, data in run.tokenizer.items()} | {
        "README.md": card.encode(),
        "model_index.json": _json(model_index(run.experiment, towers, with_towers)),
        "pipeline.py": _code("pipeline.py"),
        "scheduler/scheduler_config.json": _json(scheduler_config(run.experiment)),
        "transformer/config.json": _json(transformer),
        "transformer/ec_dit.py": _code("ec_dit.py"),
        f"{FOLDER}/captions.py": _code("captions.py"),
        f"{FOLDER}/captions.json": _json({"length": system.caption_length, "public": system.text.public}),
    }
    if not system.text.public:
        files |= {"text_encoder/config.json": _json(tower_values(system))}
        files |= {"text_encoder/text_tower.py": _code("text_tower.py")}
    with new_folder(folder) as scratch:
        write_files(files, scratch)
        if not system.text.public:
            text = torch_weights(flat_names(run.params["text"]))
            write_arrays(text, scratch / "text_encoder", TRANSFORMERS_STEM, metadata, shard_bytes)
        for tower in towers if with_towers else ():
            _copy(tower, scratch / tower.part)
        arrays = torch_weights(flat_names(run.params["denoiser"]))
        return write_arrays(arrays, scratch / "transformer", DIFFUSERS_STEM, metadata, shard_bytes)


def public_towers(experiment: Experiment) -> tuple[Tower, ...]:
    """Returns the public weights that a run has, with their fingerprints, for which all of them are read.

    Raises:
      WeightsError: a folder cannot be read, or is a checkpoint of T5X.
    """
    system, towers = experiment.system, []
    for folder, part in zip(system.text.folders, ("text_encoder", "text_encoder_2"), strict=False):
        if is_t5x(folder):
            raise WeightsError(f"{folder} is a checkpoint of T5X, which PyTorch's libraries do not read")
        projected = system.text.clip_projection
        kind = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
        values = read_json(folder / CONFIG)
        if values["model_type"] in T5_TYPES:
            kind = "T5EncoderModel"
        width = _other_projection(values) if projected else None
        towers.append(Tower(part, folder, "transformers", kind, fingerprint_once(folder), width))
    if system.autoencoder == "vae":
        folder = Path(system.vae.weights)
        towers.append(Tower("vae", folder, "diffusers", "AutoencoderKL", fingerprint_once(folder)))
    return tuple(towers)


def model_index(experiment: Experiment, towers: tuple[Tower, ...], with_towers: bool) -> dict[str, Any]:
    """Returns diffusers' model_index.json: library and class of each part, and the pipeline's settings."""
    sampling, text = experiment.sampling, experiment.text
    parts: dict[str, Any] = {
        "transformer": ["ec_dit", "Denoiser"],
        "tokenizer": ["captions", "Captions"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": [None, None] if text.public else ["text_tower", "TextTower"],
        "text_encoder_2": [None, None],
        "vae": [None, None],
    }
    settings = {
        "autoencoder": experiment.autoencoder,
        "clip_states": text.clip_states,
        "clip_projection": text.clip_projection,
        "solver": sampling.solver,
        "num_steps": sampling.num_steps,
        "churn": sampling.churn,
        "guidance_scale": sampling.guidance.scale,
        "guidance_mode": sampling.guidance.mode,
        "guidance_low": sampling.guidance.interval_low,
        "guidance_high": sampling.guidance.interval_high,
        "original_size": sampling.original_size,
    }
    if with_towers:
        parts |= {tower.part: [tower.library, tower.kind] for tower in towers}
    elif towers:
        settings["towers"] = {
            tower.part: {
                "class": f"{tower.library}.{tower.kind}",
                "name": tower.folder.as_posix(),
                "fingerprint": tower.fingerprint,
            }
            for tower in towers
        }
    return {"_class_name": ["pipeline", "EcDitPipeline"], "_diffusers_version": "0.42.1", **parts, **settings}


def scheduler_config(experiment: Experiment) -> dict[str, Any]:
    """Returns the scheduler that has the run's times, which the pipeline gives it before they are shifted."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": experiment.sampling.time_shift,
    }


def _other_projection(values: Mapping[str, Any]) -> int | None:
    """Returns the width of a whole CLIP's projection if its text_config has another one, else None."""
    if "projection_dim" not in values or not isinstance(values.get("text_config"), dict):
        return None
    width = values["projection_dim"]
    return None if values["text_config"].get("projection_dim", CLIP_DEFAULTS["projection_dim"]) == width else width


def _copy(tower: Tower, target: Path) -> None:
    """Copies config and weights, the latter under the names by which the tower's library finds them."""
    target.mkdir()
    if tower.projection is None:
        shutil.copyfile(tower.folder / CONFIG, target / CONFIG)
    else:
        values = read_json(tower.folder / CONFIG)
        values["text_config"] |= {"projection_dim": tower.projection}
        (target / CONFIG).write_bytes(_json(values))
    files = weight_files(tower.folder)
    index = index_file(tower.folder)
    if index is None:
        shutil.copyfile(files[0], target / f"{tower.stem}.safetensors")
        return
    shutil.copyfile(index, target / f"{tower.stem}{INDEX}")
    for path in files:
        shutil.copyfile(path, target / path.name)


def _code(name: str) -> bytes:
    return (resources.files("ecdit.interop") / "pytorch" / name).read_bytes()


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
