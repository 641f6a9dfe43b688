"""Names the folders that every host of a run reads: public weights, their tokenizers, and prepared data."""

from pathlib import Path

from ecdit.data.generated import GENERATED
from ecdit.data.tokenizer import files_of, folders_sha256
from ecdit.experiment import Experiment
from launch.job import DATA


def folders_of(experiment: Experiment) -> dict[str, tuple[str, ...]]:
    """Returns the folders by the key of the config that names them: several where phases have different ones."""
    found: dict[str, dict[str, None]] = {}
    for phase in experiment.resolved_phases():
        text, data, one = phase.experiment.text, phase.experiment.data, phase.experiment
        stored = data.task not in GENERATED or bool(data.module)
        named = {
            "text.weights": text.weights if text.public else "",
            "text.second_weights": text.second_weights,
            "vae.weights": one.vae.weights if one.autoencoder == "vae" else "",
            "data.tokenizer": data.tokenizer if data.tokenizer_folders else "",
            "data.second_tokenizer": data.second_tokenizer,
            DATA: data.directory if stored else "",
        }
        for key, path in named.items():
            if path:
                found.setdefault(key, {})[path] = None
    return {key: tuple(paths) for key, paths in found.items()}


def tokenizer_files(experiment: Experiment) -> dict[str, str]:
    """Returns the key of the config by the path of every file of a tokenizer: they are small enough to be copied.

    Folders at absolute paths are left out, because these may be on every host already.

    Raises:
      DataError: a folder is missing, or has no tokenizer.
    """
    data = experiment.data
    if data.tokenizer_folders:
        folders_sha256(data.tokenizer_folders)  # raises
    keys = dict(zip(data.tokenizer_folders, ("data.tokenizer", "data.second_tokenizer"), strict=False))
    found = {
        str(path): key
        for folder, key in keys.items()
        if not Path(folder).is_absolute()
        for path in files_of(Path(folder)).values()
    }
    return found | ({data.tokenizer: "data.tokenizer"} if data.tokenizer.endswith(".model") else {})
