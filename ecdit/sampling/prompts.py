"""Reads prompts, and looks at what a vocabulary leaves of them, before images are drawn."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ecdit.data.tokenizer import PromptTokens
from ecdit.errors import UserError

PLACES = ("text.weights", "text.second_weights", "vae.weights")  # folders that may have moved; contents are compared
DATA_PLACES = (*PLACES, "data.directory")  # for commands that read the run's data
_SHOWN = 80  # characters of a prompt in a message


def check_changes(changes: Sequence[str], places: Sequence[str] = PLACES, sampling: bool = True) -> None:
    """Raises UserError for a value of --set that is neither one of `places` nor, with `sampling`, a key of `sampling`.

    Other values are as the run was trained.
    """
    for change in changes:
        if not (sampling and change.startswith("sampling.")) and change.partition("=")[0] not in places:
            allowed = ("a key of sampling, or " if sampling else "") + f"one of {', '.join(places)}"
            raise UserError(f"--set={change}: must be {allowed}: other values are as the run was trained")


def shortened(prompt: str) -> str:
    """Returns a prompt in quotes for a message, its beginning alone if it is long."""
    return repr(prompt) if len(prompt) <= _SHOWN else f"{prompt[:_SHOWN]!r}... ({len(prompt)} characters)"


def prompt_lines(file: str, name: str = "--prompts") -> list[str]:
    """Returns the lines of a UTF-8 file, each a prompt; `name` is what a message calls the file.

    Raises:
      UserError: it cannot be read, is empty, or has an empty line (the null caption is no prompt).
    """
    try:
        text = Path(file).read_text(encoding="utf-8-sig")  # an editor's byte order mark is no part of a prompt
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}={file}: {error}") from None
    lines = text.removesuffix("\n").split("\n") if text else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise UserError(f"{name}={file}: line {number} is empty")
    if not lines:
        raise UserError(f"{name}={file}: no prompts")
    return lines


def check_prompts(tokenize: PromptTokens, prompts: Sequence[str]) -> list[str]:
    """Returns a warning for each prompt that is longer than the captions that the run was trained on.

    Args:
      tokenize: how the run's captions were encoded.
      prompts: the prompts.

    Raises:
      UserError: nothing is left of one, so that it would be drawn as the empty caption.
    """
    unique = list(dict.fromkeys(prompts))
    rows, null = tokenize(unique), tokenize([""])[0]
    for prompt, row in zip(unique, rows, strict=True):
        if np.array_equal(row, null):
            raise UserError(f"prompt {prompt!r}: the run's vocabulary has nothing of it; it would be the empty caption")
    return [
        f"prompt {shortened(prompt)}: is cut after {tokenize.length} tokens, the rest of it counts for nothing"
        for prompt in unique
        if tokenize.is_cut(prompt)
    ]
