"""The denoiser and the text tower as the files of `pytorch/` have them: configs, and the names and layout of weights.

Layouts differ: PyTorch's linear layers hold the transpose; equal blocks are stacked here and listed there; and blocks
come in pairs of an odd and an even one here, counted from 1.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from jaxtyping import ArrayLike

from ecdit.errors import UserError
from ecdit.system import PAPERS, SystemConfig, make_system

# Fields of the config's section `model` that change what the denoiser computes,
_COMPUTED = (
    *("latent_size", "latent_channels", "patch_size", "width", "depth", "extra_blocks", "heads", "kv_heads"),
    *("rope_theta", "prediction", "absolute_positions", "ffn_multiplier", "ffn", "even_ffn_multiplier", "num_experts"),
    *("capacity_factor", "token_choice_dropless", "expert_width", "num_shared_experts", "router_input", "gate_norm"),
    *("route_scale", "group", "sampling_group", "moe_output_norm", "block_table"),
)
# and those that choose how it is computed, or how it is trained.
_OTHERS = (
    *("attention", "projections", "dispatch", "expert_products", "remat", "scan_unroll", "dtype"),
    *("balance_loss_weight", "router_z_loss", "router_init_std", "mask_ratio", "gate_init"),
)
_TOWER = ("vocab_size", "width", "layers", "heads", "activation")

_STACKS = ("pairs.odd", "pairs.even", "extra", "blocks")
_LINEAR = ("query", "key", "value", "out", "up", "down", "modulation", "head_modulation")  # kernels without the name


def denoiser_values(config: SystemConfig) -> dict[str, Any]:
    """Returns the fields of `pytorch/ec_dit.py`'s DenoiserConfig.

    Raises:
      UserError: the denoiser is the user's own, or has a field that the file does not know.
    """
    if config.denoiser != PAPERS:
        raise UserError(f'denoiser = "{config.denoiser}": there is a PyTorch file of "{PAPERS}" alone')
    unknown = [field.name for field in fields(config.model) if field.name not in (*_COMPUTED, *_OTHERS)]
    if unknown:
        raise UserError(f"the PyTorch file does not know model.{', model.'.join(unknown)}")
    values = {name: getattr(config.model, name) for name in _COMPUTED}
    widths = make_system(config).parts.text.widths
    return values | {"text_width": widths.states, "pooled_width": widths.pooled}


def tower_values(config: SystemConfig) -> dict[str, Any]:
    """Returns the fields of `pytorch/text_tower.py`'s TextConfig; the text tower must be one that was drawn."""
    return {name: getattr(config.text, name) for name in _TOWER} | {"length": config.caption_length}


def torch_weights(flat: Mapping[str, ArrayLike]) -> dict[str, np.ndarray]:
    """Returns the arrays of a denoiser or a text tower, by their dotted names, as PyTorch's module names them.

    What is returned are views where the arrays are in the host's memory.
    """
    return {name: _layout(kind, array) for old, value in flat.items() for name, kind, array in _listed(old, value)}


def _listed(name: str, value: ArrayLike) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yields the new name, the kind of layout and the array of each block of a stack; of other arrays the one."""
    array = np.asarray(value)
    stack = next((stack for stack in _STACKS if name.startswith(f"{stack}.")), "")
    *parents, leaf = name.removeprefix(f"{stack}.").split(".")
    experts = parents[-1:] == ["experts"]  # their matrices, and the router's, are no linear layers there
    new = ".".join([*parents, leaf if experts else _leaf(leaf)])
    kind = "experts" if experts else leaf
    if not stack:
        yield new, kind, array
        return
    for number, block in enumerate(array):
        place = {"pairs.odd": f"blocks.{2 * number}", "pairs.even": f"blocks.{2 * number + 1}"}
        yield f"{place.get(stack, f'{stack}.{number}')}.{new}", kind, block


def _leaf(leaf: str) -> str:
    if leaf in ("kernel", "scale"):
        return "weight"
    if leaf.endswith("_bias"):
        return f"{leaf.removesuffix('_bias')}.bias"
    return f"{leaf}.weight" if leaf in (*_LINEAR, "tokens") else leaf


def _layout(kind: str, array: np.ndarray) -> np.ndarray:
    if kind == "kernel" or kind in _LINEAR:
        return array.reshape(len(array), -1).T
    return array.reshape(-1) if kind.endswith("modulation_bias") else array
