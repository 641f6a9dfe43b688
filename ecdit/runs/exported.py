"""A run's EMA weights as a folder that is complete by itself: no workdir and no data are needed to sample from it.

Public weights of a text encoder or an autoencoder stay in the folders that the config names; their fingerprints are
compared.

    config.json                   the config of the checkpoint's phase
    model.safetensors             the weights under dotted names; or several shards and model.safetensors.index.json
    tokenizer/                    the tokenizer of the training

Every shard's metadata says which run and step it is from, and has the checksum of each array.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import jax

import ecdit
from ecdit.checkpoints.checksums import checksums
from ecdit.checkpoints.read_errors import CheckpointError
from ecdit.config import to_dict
from ecdit.interop.weights import flat_names, load_folder, read_metadata, save_folder
from ecdit.pretrained.safetensors_folder import weight_files
from ecdit.runs.kept_tokenizer import FOLDER, find_tokenizer, kept_files
from ecdit.runs.trained_run import CONFIG_FILE, Run, check_files, check_weights, prepare_to_open, saved_experiment
from ecdit.system import user_files

SHARD_GB = 5.0  # a shard's size, unless another is asked for
FORMAT = "1"
_KEYS = ("step", "checkpoint", "dataset", "vocabulary", "files", "weights", "config", "checksums")


def export_run(run: Run, folder: Path, shard_bytes: int) -> list[str]:
    """Writes the weights, the config and the tokenizer of an open run; returns the names of the shards.

    Raises:
      UserError: the folder holds something, or cannot be written.
    """
    config = (json.dumps(to_dict(run.experiment), indent=2) + "\n").encode()
    metadata = {
        "ecdit_format": FORMAT,
        "ecdit": ecdit.__version__,
        "step": str(run.step),
        "checkpoint": run.checkpoint,
        "dataset": run.dataset,
        "vocabulary": run.vocabulary,
        "files": json.dumps(user_files(run.experiment.denoiser)),
        "weights": json.dumps(run.experiment.fingerprints()),
        "config": hashlib.sha256(config).hexdigest(),
        "checksums": json.dumps(checksums(flat_names(run.params))),
    }
    files = {f"{FOLDER}/{name}": data for name, data in run.tokenizer.items()}
    return save_folder(run.params, folder, metadata, {CONFIG_FILE: config, **files}, shard_bytes)


def check_exported(folder: Path) -> None:
    """Raises UserError unless a folder has the files of an export."""
    for name in (CONFIG_FILE, FOLDER):
        if not (folder / name).exists():
            raise CheckpointError(
                f"{folder} is no exported folder, it has no {name}: `python -m ecdit.checkpoint export` writes one"
            )
    weight_files(folder)
    if not kept_files(folder):
        raise CheckpointError(f"{folder / FOLDER} is empty: it must hold the tokenizer of the training")


def open_exported(folder: Path, overrides: Sequence[str] = (), join: bool = False) -> Run:
    """Opens an exported folder on the devices that are present, to sample from it.

    Raises:
      UserError: it is no such folder, a file of it is missing, damaged or not the one of the training, or an override
        is refused.
    """
    check_exported(folder)
    experiment = saved_experiment(folder, overrides)
    metadata = read_metadata(folder)
    if metadata.get("ecdit_format") != FORMAT or any(key not in metadata for key in _KEYS):
        raise CheckpointError(f"{folder}: its weights were not written by the export of this version of ecdit")
    if hashlib.sha256((folder / CONFIG_FILE).read_bytes()).hexdigest() != metadata["config"]:
        raise CheckpointError(f"{folder / CONFIG_FILE} is not what was exported: the weights belong to another config")
    check_files(folder, json.loads(metadata["files"]), user_files(experiment.denoiser))
    tokenizer = find_tokenizer(folder, experiment.data, metadata["vocabulary"])
    system, mesh = prepare_to_open(experiment, True, join)
    experiment.system.share_fingerprints()
    check_weights(folder, json.loads(metadata["weights"]), experiment.fingerprints())
    shapes, shardings = (system.drawn(tree) for tree in (system.shapes(), system.shardings(mesh)))
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    params = load_folder(folder, target)
    saved = json.loads(metadata["checksums"])
    wrong = [name for name, found in checksums(flat_names(params)).items() if saved.get(name) != found]
    if wrong:
        raise CheckpointError(f"{folder} is damaged: {', '.join(wrong[:5])}: not what was exported")
    return Run(
        experiment,
        system,
        mesh,
        params | system.load(mesh),
        int(metadata["step"]),
        metadata["checkpoint"],
        metadata["dataset"],
        metadata["vocabulary"],
        tokenizer,
    )
