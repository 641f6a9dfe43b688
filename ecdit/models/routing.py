"""Assigns tokens to experts by expert choice (arXiv 2410.02098, Algorithm 1) or token choice (arXiv 2006.16668).

Axes: G groups, S tokens of a group, E experts, C capacity (slots of an expert in a group), K choices of a token.
Both rules return the same record, so that they share dispatch and combine. Everything here is float32.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Routing(NamedTuple):
    """The slots of every expert. An empty slot has taken False, gate 0, and index 0 or that of a masked token."""

    # The token in the slot, int32. The field hides `tuple.index`, which is not used here.
    index: Int[Array, "G E C"]  # pyright: ignore[reportIncompatibleMethodOverride]
    gate: Float[Array, "G E C"]  # factor of the slot's output, float32
    taken: Bool[Array, "G E C"]
    balance_loss: Float[Array, " G"]  # unweighted; 0 for expert choice, which is balanced by construction
    drop_rate: Float[Array, " G"]  # share of the (token, choice) pairs that found no slot; 0 for expert choice


def expert_capacity(group_size: int, num_experts: int, capacity_factor: float) -> int:
    """Returns C = clip(ceil(S f_c / E), 1, S), the slots of an expert in a group. The effective factor is E C / S."""
    # The subtraction keeps products such as 1.1 * 10, which is 11.000000000000002 in binary, from adding a slot.
    return min(max(math.ceil(group_size * capacity_factor / num_experts - 1e-9), 1), group_size)


def expert_choice(
    router_logits: Float[Array, "G S E"], capacity: int, token_mask: Bool[Array, "G S"] | None = None
) -> Routing:
    """Lets each expert take the `capacity` tokens of a group with its highest softmax affinities.

    Ties go to the lowest index. The gate is the affinity itself, not renormalised. Gradients reach the logits through
    the gates. `token_mask` is for padded tokens: no expert takes a token whose mask is False.

    Raises:
      ValueError: capacity is not in 1..S.
    """
    _check_capacity(capacity, router_logits.shape[1])
    affinity = jax.nn.softmax(router_logits.astype(jnp.float32), axis=-1)  # over E
    affinity = affinity.swapaxes(1, 2)  # (G, E, S)
    if token_mask is not None:
        affinity = jnp.where(token_mask[:, None, :], affinity, -jnp.inf)
    gate, index = jax.lax.top_k(affinity, capacity)
    taken = gate != -jnp.inf  # NaN counts as taken, so that it shows in the output
    nothing = jnp.zeros(router_logits.shape[0], jnp.float32)
    return Routing(index, jnp.where(taken, gate, 0.0), taken, nothing, nothing)


def token_choice(
    router_logits: Float[Array, "G S E"],
    capacity: int,
    token_mask: Bool[Array, "G S"] | None = None,
    num_choices: int = 2,
) -> Routing:
    """Lets each token choose its `num_choices` best experts; an expert takes at most `capacity` of these tokens.

    Gates are renormalised over a token's choices, even if one of them is dropped. All first choices come before second
    ones, and within a choice higher affinities come first. (By position, the bottom of every image would be dropped.)
    The balance loss of a group is E * sum_e f_e p_e, with f_e the share of tokens whose first choice is e and p_e
    the mean affinity (arXiv 2006.16668, Algorithm 1). It is 1 when balanced.

    Raises:
      ValueError: capacity is not in 1..S, or num_choices not in 1..E.
    """
    num_groups, group_size, num_experts = router_logits.shape
    _check_capacity(capacity, group_size)
    if not 1 <= num_choices <= num_experts:
        raise ValueError(f"num_choices = {num_choices}: must be in 1..{num_experts}, the number of experts")
    mask = jnp.ones((num_groups, group_size), bool) if token_mask is None else token_mask
    mask = mask.astype(jnp.float32)
    affinity = jax.nn.softmax(router_logits.astype(jnp.float32), axis=-1)
    chosen_affinity, chosen = jax.lax.top_k(affinity, num_choices)  # (G, S, K)
    chosen_gate = chosen_affinity / chosen_affinity.sum(axis=-1, keepdims=True)
    choice = jax.nn.one_hot(chosen, num_experts, dtype=jnp.float32) * mask[:, :, None, None]  # (G, S, K, E)

    # The k-th choices (from 0) get priorities in (-k, 1 - k], so that no k-th choice comes before a (k-1)-th one.
    priority = chosen_affinity - jnp.arange(num_choices, dtype=jnp.float32)[None, None, :]
    priority = jnp.where(choice > 0, priority[..., None], -jnp.inf).max(axis=2)  # (G, S, E)
    best, index = jax.lax.top_k(jax.lax.stop_gradient(priority).swapaxes(1, 2), capacity)
    taken = best > -jnp.inf
    gates = jnp.einsum("gsk,gske->ges", chosen_gate, choice)
    gate = jnp.where(taken, jnp.take_along_axis(gates, index, axis=2), 0.0)

    tokens = jnp.maximum(mask.sum(axis=1), 1.0)  # (G,)
    first_share = choice[:, :, 0].sum(axis=1) / tokens[:, None]
    mean_affinity = (affinity * mask[..., None]).sum(axis=1) / tokens[:, None]
    balance_loss = num_experts * (first_share * mean_affinity).sum(axis=-1)
    drop_rate = 1.0 - taken.sum(axis=(1, 2)).astype(jnp.float32) / (tokens * num_choices)
    return Routing(jnp.where(taken, index, 0), gate, taken, balance_loss, drop_rate)


def renormalize_gates(routing: Routing, group_size: int, scale: float) -> Routing:
    """Returns the same slots with gates that sum to `scale` for every token that an expert took (arXiv 2604.12163)."""

    def renormalize(gate: Float[Array, "E C"], index: Int[Array, "E C"]) -> Float[Array, "E C"]:
        total = jnp.zeros(group_size, jnp.float32).at[index].add(gate)
        return scale * gate / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[index]

    return routing._replace(gate=jax.vmap(renormalize)(routing.gate, routing.index))


def experts_per_token(routing: Routing, group_size: int) -> Int[Array, "G S"]:
    """Returns how many experts took each token, int32. With 0, the branch's output is exactly 0."""

    def count(index: Int[Array, "E C"], taken: Bool[Array, "E C"]) -> Int[Array, " S"]:
        return jnp.zeros(group_size, jnp.int32).at[index].add(taken.astype(jnp.int32))

    return jax.vmap(count)(routing.index, routing.taken)


def gates_per_token(routing: Routing, group_size: int) -> Float[Array, "G S E"]:
    """Returns every expert's gate for every token, float32: above 0 exactly if the expert took the token.

    A gate that underflowed to 0 is replaced by the smallest normal number.
    """

    def gates(gate: Float[Array, " C"], index: Int[Array, " C"], taken: Bool[Array, " C"]) -> Float[Array, " S"]:
        smallest = jnp.finfo(jnp.float32).tiny
        return jnp.zeros(group_size, jnp.float32).at[index].add(jnp.where(taken, jnp.maximum(gate, smallest), 0.0))

    by_expert = jax.vmap(jax.vmap(gates))(routing.gate, routing.index, routing.taken)  # (G, E, S)
    return by_expert.swapaxes(1, 2)


def _check_capacity(capacity: int, group_size: int) -> None:
    if not 1 <= capacity <= group_size:
        raise ValueError(f"capacity = {capacity}: must be in 1..{group_size}, the tokens of a group")
