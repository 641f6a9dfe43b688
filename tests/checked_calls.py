"""Checks the calls of functions on arrays against their annotations: shapes, dtypes, and all other types."""

import warnings
from typing import Any

import jax
import jaxtyping
import numpy as np
from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep585DeprecationWarning, BeartypeDecorHintPep3119Exception

# Not the rest of ecdit: its tests put objects of their own in place of its classes.
CHECKED = [
    f"ecdit.{name}"
    for name in (
        "components",
        "functions",
        "patches",
        "partitioning",
        "tuned",
        "models",
        "diffusion",
        "encoders",
        "sampling.grids",
        "sampling.routing_maps",
        "sampling.routing_page",
        "sampling.routing_tables",
        "training",
    )
]
_CONFIG = BeartypeConf(is_pep484_tower=True)  # an int is a float, as for type checkers


def check_calls() -> None:
    """Has the functions of CHECKED checked. Call it before a file with annotated arrays is imported."""
    jaxtyping.Array = jax.Array | np.ndarray  # functions take numpy's arrays as well, as those of jax do
    jaxtyping.install_import_hook(CHECKED, f"{__name__}.{checked.__name__}")


def checked(function: Any) -> Any:
    """Returns the function with its calls checked, if they can be.

    Constructors are not checked: those of configs refuse wrong values by errors of their own, and jax makes dataclasses
    of whatever it maps over. Nor are functions of a protocol's objects, whose class says nothing about it.
    """
    if function.__name__ == "__init__":
        return function
    with warnings.catch_warnings():
        # flax.nnx.State derives from typing.Hashable, of which beartype warns.
        warnings.simplefilter("ignore", BeartypeDecorHintPep585DeprecationWarning)
        try:
            return beartype(function, conf=_CONFIG)
        except BeartypeDecorHintPep3119Exception:
            return function
