"""Writes weights as one safetensors file."""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save

from ecdit.errors import UserError
from ecdit.files import check_writable


def flat_names(params: dict[str, Any]) -> dict[str, Any]:
    """Returns a nested dict of arrays as {'denoiser.pairs.even.experts.up': array}."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {".".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def save_weights(params: dict[str, Any], path: Path, metadata: dict[str, str]) -> None:
    """Writes the arrays under their dotted names. The file appears only when it is complete.

    Raises:
      UserError: `path` cannot be written.
    """
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path.absolute()}: its directory does not exist")
    check_writable(path)
    scratch = path.with_name(path.name + ".tmp")
    try:
        scratch.write_bytes(save({name: np.asarray(array) for name, array in flat_names(params).items()}, metadata))
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
