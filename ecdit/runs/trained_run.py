"""Opens a finished or running run to sample from it: its config, model and EMA weights."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

import ecdit
from ecdit import runtime
from ecdit.checkpoints.restore import CheckpointError, find_step, open_reader, read_meta, restore_ema
from ecdit.config import ConfigError, require
from ecdit.data import DataError
from ecdit.data.manifest import task_directory
from ecdit.data.prepared import Prepared, open_prepared
from ecdit.data.tokenizer import PromptTokens
from ecdit.experiment import Experiment, make_experiment
from ecdit.interop.weights import read_metadata
from ecdit.partitioning import MeshConfig, ShardingError, abstract_mesh, make_mesh
from ecdit.pretrained.config_json import WeightsError
from ecdit.runs.kept_tokenizer import encoder, find_tokenizer
from ecdit.sampling.sampler import SamplingConfig, check_sampling, make_sampler, sample_images
from ecdit.storage import reading
from ecdit.system import Params, System, image_groups, make_system, user_files

CONFIG_FILE = "config.json"
OVERRIDES_FILE = "overrides.json"  # a list of the run's starts


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that is open for sampling."""

    experiment: Experiment  # the experiment in the checkpoint's phase
    system: System
    mesh: Mesh
    params: Params  # whole; opened without drawing, without those of public weights
    step: int
    checkpoint: str  # a hash of what the checkpoint says of its arrays: their names, shapes and checksums
    dataset: str  # fingerprint of the data that the checkpoint was trained on
    vocabulary: str  # hash of the tokenizer that its captions were encoded with
    tokenizer: Mapping[str, bytes]  # its files, by name

    @property
    def tokenize(self) -> PromptTokens:
        """Encodes prompts by that tokenizer."""
        return encoder(self.tokenizer, self.experiment.data)


def open_run(
    workdir: Path,
    overrides: Sequence[str] = (),
    step: int | None = None,
    draw: bool = True,
    join: bool = False,
    load: bool = False,
) -> Run:
    """Opens a checkpoint's EMA weights on the devices that are present, which need not be those of the training.

    Args:
      workdir: of the run.
      overrides: "key=value" for keys of its config, the value as JSON or a plain string.
      step: of the checkpoint; None for the newest.
      draw: whether to sample; False to get the weights alone.
      join: whether to join the other hosts of a pod, as the run did if its config says so.
      load: whether to load public weights also where nothing is drawn.

    Raises:
      CheckpointError: no run, no such checkpoint, or another tokenizer than that of the training.
      ConfigError: an override that the config refuses, or stored latents, which cannot be decoded.
    """
    experiment = saved_experiment(workdir, overrides)
    system, mesh = prepare_to_open(experiment, draw, join)
    with open_reader(workdir) as manager:
        step = find_step(manager, workdir, step)
        meta = read_meta(manager, step)
    check_files(workdir, meta.config.get("files", {}), user_files(experiment.denoiser))
    tokenizer = find_tokenizer(workdir, experiment.data, meta.vocabulary)
    params, step = restore_ema(workdir, system, mesh, step)
    if draw or load:
        experiment.system.share_fingerprints()
        check_weights(workdir, meta.config.get("weights", {}), experiment.fingerprints())
        params |= system.load(mesh)
    if experiment.phases:  # all have the same parameters
        experiment = experiment.phase_of(step).experiment
        system = make_system(experiment.system)
    digest = hashlib.sha256(json.dumps(meta.arrays, sort_keys=True).encode()).hexdigest()
    return Run(experiment, system, mesh, params, step, digest, meta.dataset, meta.vocabulary, tokenizer)


def open_data(run: Run, workdir: Path) -> Prepared:
    """Opens the data that a run was trained on.

    Raises:
      DataError: it cannot be opened, or has changed since training.
    """
    prepared = open_prepared(run.experiment.data)
    if prepared.fingerprint != run.dataset:
        raise DataError(
            f"{task_directory(run.experiment.data)} is not the data of the training: its fingerprint is "
            f"{prepared.fingerprint[:12]}, and step {run.step} of {workdir} was trained on {run.dataset[:12]}"
        )
    return prepared


def prepare_to_open(experiment: Experiment, draw: bool, join: bool) -> tuple[System, Mesh]:
    """Sets up this process for a trained model; returns the model's structure and a mesh. Raises as `open_run`."""
    if draw:
        images, name = experiment.system.has_images, experiment.autoencoder
        require(images, "autoencoder", name, "the run has latents alone: it cannot draw images")
    runtime.configure(dataclasses.replace(experiment.runtime, distributed=join))  # however many hosts trained it
    system = make_system(experiment.system)
    return system, mesh_of_devices(experiment, system, draw)


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


def check_weights(workdir: Path, saved: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raises CheckpointError if a part of the model has other public weights than the run was trained with."""
    for part, digest in found.items():
        if saved.get(part) != digest:
            was = saved.get(part, "none")[:12]
            raise CheckpointError(
                f"{workdir} was trained with other public weights of its {part}: their fingerprint is {was}, and that "
                f"of the folder which the config names is {digest[:12]}"
            )


def check_public_weights(workdir: Path, run: Run) -> None:
    """Raises CheckpointError if the folders of public weights are not those that an open run was trained with."""
    if run.experiment.system.folders:
        with open_reader(workdir) as manager:
            saved = read_meta(manager, run.step).config.get("weights", {})
        check_weights(workdir, saved, run.experiment.fingerprints())


def check_files(workdir: Path, saved: Mapping[str, str], files: Mapping[str, str]) -> None:
    """Raises CheckpointError if a user's file has another sha256 than the run had saved of it."""
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
    changed = set()
    for override in overrides:
        key, separator, text = override.partition("=")
        *groups, name = key.split(".")
        group: Any = values
        for part in groups:
            group = group.get(part) if isinstance(group, dict) else None
        found = bool(separator) and isinstance(group, dict) and name in group
        require(found, key, text, "no such key of the run's config; write key=value")
        group[name] = text if isinstance(group[name], str) else _json(key, text)
        changed.add(key)
        for phase in values.get("phases", ()):  # an override holds in every phase
            phase["changes"].pop(key, None)
    try:
        return make_experiment(values)
    except ConfigError as error:
        if error.key in changed:
            raise
        raise CheckpointError(
            f"{workdir / CONFIG_FILE}, which ecdit {_version(workdir)} wrote, is no config of ecdit "
            f"{ecdit.__version__}: {error}"
        ) from None


def each_image_alone(run: Run) -> Run:
    """Returns the run with groups of one image in sampling, so that no image depends on its neighbours."""
    return dataclasses.replace(run, system=image_groups(run.system))


def _version(workdir: Path) -> str:
    """Returns the version of ecdit that started a run last, or that exported a folder, as these record it."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        return str(json.loads((workdir / OVERRIDES_FILE).read_text())[-1]["versions"]["ecdit"])
    with contextlib.suppress(WeightsError, LookupError):
        return read_metadata(workdir)["ecdit"]
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
    sampler = make_sampler(run.system, sampling, run.mesh, with_experts, with_gates)
    return sample_images(sampler, run.params, run.tokenize, prompts, repeats, sampling)


def _json(key: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise ConfigError(key, text, "must be written as JSON: a number, true, false or a list") from None
