"""Looks at what a vocabulary leaves of prompts, before images are drawn."""

from collections.abc import Callable, Sequence

import numpy as np

from ecdit.data.text import EOS, PAD
from ecdit.errors import UserError


def check_prompts(tokenize: Callable[[Sequence[str]], np.ndarray], prompts: Sequence[str]) -> list[str]:
    """Returns a warning for each prompt that is longer than the captions that the run was trained on.

    Args:
      tokenize: returns int32[n, L], each row ended by EOS unless the text was cut.
      prompts: the prompts.

    Raises:
      UserError: nothing is left of one, so that it would be drawn as the empty caption.
    """
    unique = list(dict.fromkeys(prompts))
    rows, null = tokenize(unique), tokenize([""])[0]
    for prompt, row in zip(unique, rows, strict=True):
        if np.array_equal(row, null):
            raise UserError(f"prompt {prompt!r}: the run's vocabulary has nothing of it; it would be the empty caption")
    cut = [prompt for prompt, row in zip(unique, rows, strict=True) if row[-1] not in (PAD, EOS)]
    return [
        f"prompt {prompt!r}: is cut after {rows.shape[1]} tokens, the rest of it counts for nothing" for prompt in cut
    ]
