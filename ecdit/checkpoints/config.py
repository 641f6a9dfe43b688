"""The config of checkpoints: when a run saves, which checkpoints it keeps, and from which weights it starts."""

import dataclasses
from typing import Literal

from ecdit.config import require


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Says when to save, which checkpoints to keep, and from which weights to start."""

    every: int  # steps between checkpoints; the last step is always saved
    keep: int  # newest checkpoints to keep
    keep_every: int  # also keeps checkpoints at multiples of this step forever; 0 for none
    init_from: str  # workdir of a run with whose EMA weights to start at step 0; "" for a fresh start
    # When restored arrays are compared with their checksums: before the first step, during the first steps, or never.
    verify: Literal["always", "background", "never"]
    max_failed_saves: int  # failed saves in a row that a run tolerates

    def __post_init__(self):
        require(self.every >= 1, "every", self.every, "must be 1 or more")
        require(self.keep >= 1, "keep", self.keep, "must be 1 or more")
        fits = self.keep_every >= 0 and self.keep_every % self.every == 0
        require(fits, "keep_every", self.keep_every, f"must be 0, or a multiple of checkpoint.every, {self.every}")
        require(self.max_failed_saves >= 0, "max_failed_saves", self.max_failed_saves, "must be 0 or more")
