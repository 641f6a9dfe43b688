"""The copy of the tokenizer that a run keeps in its workdir, a folder, by which its prompts are encoded.

Weights know one vocabulary, that of their training. The data may move since then, or be prepared again with another
one, whose token ids mean other words: images would be wrong, and nothing would say so. So sampling, evaluation and
export encode by this copy, and compare its hash with the one in the checkpoint.
"""

from collections.abc import Mapping
from pathlib import Path

from ecdit.checkpoints.read_errors import CheckpointError
from ecdit.data.config import DataConfig
from ecdit.data.tokenizer import SIDES, PromptTokens, tokenizer_of
from ecdit.data.tokens import hash_files, tokenizer_files
from ecdit.files import replace_bytes
from ecdit.storage import children, make_directory, reading

FOLDER = "tokenizer"


def keep_tokenizer(files: Mapping[str, bytes], workdir: Path) -> None:
    """Writes a tokenizer's files, by name, into the workdir's folder, unless they are there.

    Raises:
      UserError: one cannot be written.
    """
    folder = workdir / FOLDER
    kept = kept_files(workdir)
    if kept == files:
        return
    for name in kept.keys() - files.keys():  # of a start with another tokenizer, which no checkpoint knows
        (folder / name).unlink(missing_ok=True)
    for name, data in files.items():
        make_directory((folder / name).parent)
        replace_bytes(folder / name, data)


def kept_files(workdir: Path) -> dict[str, bytes]:
    """Returns the files of the tokenizer in a workdir or an exported folder, by name; none if it has no copy."""
    folder = workdir / FOLDER
    with reading(workdir):
        # Names with a dot are what a killed writer has left. Two tokenizers have a folder each.
        found = [path for path in children(folder) if not path.name.startswith(".")]
        inner = [path for side in found if side.name in SIDES for path in children(side) if path.name[0] != "."]
        files = [path for path in (*found, *inner) if path.name not in SIDES]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(files)}


def open_tokenizer(workdir: Path, config: DataConfig) -> PromptTokens:
    """Returns a function that encodes prompts as the captions of a run's training were. Raises as `find_tokenizer`."""
    return encoder(find_tokenizer(workdir, config), config)


def encoder(files: Mapping[str, bytes], config: DataConfig) -> PromptTokens:
    """Returns a function that encodes prompts by a tokenizer's files, padded to the caption length."""
    return PromptTokens(tokenizer_of(files, bool(config.tokenizer_folders)), config.caption_length)


def find_tokenizer(workdir: Path, config: DataConfig, vocabulary: str | None = None) -> dict[str, bytes]:
    """Returns the files, by name, of the tokenizer that captions were encoded with in a run's training.

    Args:
      workdir: of the run, or an exported folder.
      config: of the run's data, whose tokenizer is taken for a run that has no copy because an older ecdit made it.
      vocabulary: the hash that the checkpoint has of its tokenizer; None to leave the comparison for later.

    Raises:
      CheckpointError: there is no tokenizer, or it is not the one of the training.
    """
    place, files = workdir / FOLDER, kept_files(workdir)
    if not files:
        try:
            files = tokenizer_files(config)
        except OSError as error:
            raise CheckpointError(f"{workdir} has no {FOLDER}/, and the run's data is not there: {error}") from None
        place = Path(config.directory)
    if vocabulary is not None and hash_files(files) != vocabulary:
        raise CheckpointError(
            f"the tokenizer in {place} is not the one of the training: its hash is {hash_files(files)[:12]}, and "
            f"{workdir} was trained with {vocabulary[:12] or 'none'}. By another vocabulary prompts mean other words: "
            f"bring that one back to {workdir / FOLDER}/"
        )
    return files
