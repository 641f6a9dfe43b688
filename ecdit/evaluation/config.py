"""The config of evaluations during training."""

import dataclasses
from typing import Literal

from ecdit.config import require


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Selects the evaluations of the EMA weights during training; each of them compiles one program."""

    every: int  # steps; 0 for never
    loss_images: int  # for the flow loss by time (see evaluation.flow_loss); 0 for no loss
    prompts: str  # a text file with a prompt a line, whose images are drawn with the same noise every time; "" for none
    score: Literal["none", "shapes", "retrieval"]  # as `ecdit.evaluate` computes it
    split: Literal["train", "held_out"]  # of the loss's images and the score's captions
    captions: int  # of the score; shapes: of each kind

    def __post_init__(self):
        for key in ("every", "loss_images"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "must be 0 or more")
        require(self.captions >= 1, "captions", self.captions, "must be 1 or more")
        asked = self.loss_images > 0 or self.prompts != "" or self.score != "none"
        require(
            asked or self.every == 0, "every", self.every, "must be 0: there is no loss, prompts or score to compute"
        )

    def is_due(self, step: int) -> bool:
        """Returns whether `step` is evaluated once it is done."""
        return self.every > 0 and step > 0 and step % self.every == 0
