"""Opens a finished or running run to sample from it: its config, model and EMA weights."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

import ecdit
from ecdit import runtime
from ecdit.checkpoints.restore import CheckpointError, open_reader, read_meta, restore_ema
from ecdit.config import ConfigError, require
from ecdit.data.prepared import tokenize_captions
from ecdit.experiment import Experiment, make_experiment
from ecdit.partitioning import MeshConfig, ShardingError, abstract_mesh, make_mesh
from ecdit.sampling.sampler import SamplingConfig, check_sampling, make_sampler, sample_images
from ecdit.storage import reading
from ecdit.system import Params, System, make_system, user_files

CONFIG_FILE = "config.json"
OVERRIDES_FILE = "overrides.json"  # a list of the run's starts


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that is open for sampling."""

    experiment: Experiment  # the experiment in the checkpoint's phase
    system: System
    mesh: Mesh
    params: Params
    step: int
    checkpoint: str  # a hash of the names, shapes and checksums of the checkpoint's arrays


def open_run(workdir: Path, overrides: Sequence[str] = (), step: int | None = None, draw: bool = True) -> Run:
    """Opens a checkpoint's EMA weights on the devices that are present, which need not be those of the training.

    Args:
      workdir: of the run.
      overrides: "key=value" for keys of its config, the value as JSON or a plain string.
      step: of the checkpoint; None for the newest.
      draw: whether to sample; False to get the weights alone.

    Raises:
      CheckpointError: no run, or no such checkpoint.
      ConfigError: an override that the config refuses, or stored latents, which cannot be decoded.
    """
    experiment = saved_experiment(workdir, overrides)
    if draw:
        images, name = experiment.system.has_images, experiment.autoencoder
        require(images, "autoencoder", name, "the run has latents alone: it cannot draw images")
    runtime.configure(dataclasses.replace(experiment.runtime, distributed=False))  # only the trainer joins other hosts
    system = make_system(experiment.system)
    _check_files(workdir, step, user_files(experiment.denoiser))
    mesh = mesh_of_devices(experiment, system, draw)
    params, step = restore_ema(workdir, system, mesh, step)
    with open_reader(workdir) as manager:
        arrays = read_meta(manager, step).arrays
    if experiment.phases:  # all phases have the same parameters
        experiment = experiment.phase_of(step).experiment
        system = make_system(experiment.system)
    digest = hashlib.sha256(json.dumps(arrays, sort_keys=True).encode()).hexdigest()
    return Run(experiment, system, mesh, params, step, digest)


def mesh_of_devices(experiment: Experiment, system: System, draw: bool) -> Mesh:
    """Returns a mesh of the devices that are present: the run's own if it fits them, else one with `fsdp` or `data`.

    Args:
      experiment: of the run.
      system: its model.
      draw: whether batches of `experiment.sampling` must divide over the mesh.

    Raises:
      ConfigError: none of them divides the batch; sampling.batch_size can be set.
      ShardingError: none of them divides the parameters.
    """
    alone = {"slices": 1, "data": 1, "fsdp": 1, "expert": 1, "tensor": 1}
    count, refused = jax.device_count(), []
    for mesh in (experiment.mesh, MeshConfig(**alone | {"fsdp": count}), MeshConfig(**alone | {"data": count})):
        try:
            laid_out = abstract_mesh(mesh, count)
            system.shardings(laid_out)
            if draw:
                check_sampling(experiment.sampling, system.parts.denoiser, laid_out)
            return make_mesh(mesh)
        except (ConfigError, ShardingError) as error:
            refused.append(error)
    raise refused[-1]


def _check_files(workdir: Path, step: int | None, files: Mapping[str, str]) -> None:
    """Raises CheckpointError if a user's file is not as the run had it at `step`, by default the newest."""
    if not files:
        return
    with open_reader(workdir) as manager:
        steps = manager.all_steps()
        if step is not None and step not in steps:
            return  # `restore_ema` lists the available steps
        saved = read_meta(manager, max(steps) if step is None else step).config["files"]
    for path, digest in files.items():
        if saved.get(path) != digest:
            raise CheckpointError(f"{path} is not what {workdir} was trained with: its sha256 is {digest[:12]}")


def saved_experiment(workdir: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Reads the config that a run wrote; touches no device. Raises as `open_run`."""
    try:
        with reading(workdir):
            values = json.loads((workdir / CONFIG_FILE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{workdir} is no run's workdir: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{workdir} is no run's workdir: its {CONFIG_FILE} is no config")
    try:
        make_experiment(values)
    except ConfigError as error:
        raise CheckpointError(
            f"{workdir / CONFIG_FILE}, which ecdit {_version(workdir)} wrote, is no config of ecdit "
            f"{ecdit.__version__}: {error}"
        ) from None
    for override in overrides:
        key, separator, text = override.partition("=")
        *groups, name = key.split(".")
        group: Any = values
        for part in groups:
            group = group.get(part) if isinstance(group, dict) else None
        found = bool(separator) and isinstance(group, dict) and name in group
        require(found, key, text, "no such key of the run's config; write key=value")
        group[name] = text if isinstance(group[name], str) else _json(key, text)
    return make_experiment(values)


def each_image_alone(run: Run) -> Run:
    """Returns the run with groups of one image in sampling, so that no image depends on its neighbours."""
    config = run.system.config
    if not hasattr(config.model, "sampling_group"):  # a denoiser without experts
        return run
    model = dataclasses.replace(config.model, sampling_group="image")
    return dataclasses.replace(run, system=make_system(dataclasses.replace(config, model=model)))


def _version(workdir: Path) -> str:
    """Returns the version of ecdit that started the run last, as its record says."""
    try:
        return str(json.loads((workdir / OVERRIDES_FILE).read_text())[-1]["versions"]["ecdit"])
    except (OSError, ValueError, LookupError, TypeError):
        return "(unknown version)"


def sample_run(
    run: Run,
    prompts: Sequence[str],
    repeats: Sequence[int],
    sampling: SamplingConfig | None = None,
    with_experts: bool = False,
    with_gates: bool = False,
) -> Any:
    """Draws an image for each (prompt, repeat), by the run's own sampling config unless another is given.

    Returns uint8[n, H, W, 3]; with `with_experts` a pair of that and the experts per token, int32[n, steps, P, N];
    with `with_gates` instead a pair with each expert's gate for each token, float32[n, steps, P, N, E].
    """
    sampling = run.experiment.sampling if sampling is None else sampling
    tokens = functools.partial(tokenize_captions, run.experiment.data)
    sampler = make_sampler(run.system, sampling, run.mesh, with_experts, with_gates)
    return sample_images(sampler, run.params, tokens, prompts, repeats, sampling)


def _json(key: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise ConfigError(key, text, "must be written as JSON: a number, true, false or a list") from None
