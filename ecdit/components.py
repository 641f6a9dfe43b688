"""What a text-to-image model is made of, and what each part takes and gives."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float


class TextStates(NamedTuple):
    """An encoded caption."""

    states: Float[Array, "B L t"]
    mask: Bool[Array, "B L"]  # False on padding; never False for a whole row
    pooled: Float[Array, "B t"]
