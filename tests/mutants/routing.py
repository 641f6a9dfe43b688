"""Mutants of the routing rules: which expert takes which token, its gate, and the report."""

from tests.mutants.mutant import Mutant

_FILE = "ecdit/models/routing.py"


def _tests(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/models/test_routing.py::{name}" for name in names)


MUTANTS = (
    Mutant(
        _FILE,
        "affinity = jax.nn.softmax(router_logits.astype(jnp.float32), axis=-1)  # over E",
        "affinity = jax.nn.softmax(router_logits.astype(jnp.float32), axis=1)  # over E",
        _tests("test_expert_choice_by_hand"),
        "each expert's affinities sum to 1 over the tokens, in place of each token's over the experts",
    ),
    Mutant(
        _FILE,
        "max(math.ceil(group_size * capacity_factor / num_experts - 1e-9), 1)",
        "max(math.floor(group_size * capacity_factor / num_experts), 1)",
        _tests("test_capacity_by_hand"),
    ),
    Mutant(
        _FILE,
        "capacity_factor / num_experts - 1e-9)",
        "capacity_factor / num_experts)",
        _tests("test_capacity_by_hand"),
        "a slot more for some factors, and shapes that another version does not have",
    ),
    Mutant(
        _FILE,
        "affinity = jnp.where(token_mask[:, None, :], affinity, -jnp.inf)",
        "affinity = jnp.where(token_mask[:, None, :], affinity, 0.0)",
        _tests("test_padding_is_never_taken_and_changes_nothing"),
    ),
    Mutant(
        _FILE,
        "return Routing(index, jnp.where(taken, gate, 0.0), taken, nothing, nothing)",
        "return Routing(index, gate, taken, nothing, nothing)",
        _tests("test_padding_is_never_taken_and_changes_nothing", "test_a_group_of_padding_takes_nothing"),
        "the gate of an empty slot is minus infinity",
    ),
    Mutant(
        _FILE,
        "gate, index = jax.lax.top_k(affinity, capacity)",
        "gate, index = jax.lax.top_k(jax.lax.stop_gradient(affinity), capacity)",
        _tests("test_gradients_flow_through_selected_gates_and_the_softmax"),
        "the router never learns",
    ),
    Mutant(
        _FILE,
        "chosen_gate = chosen_affinity / chosen_affinity.sum(axis=-1, keepdims=True)",
        "chosen_gate = chosen_affinity / affinity.sum(axis=-1, keepdims=True)",
        _tests("test_token_choice_by_hand"),
        "the gates are not renormalised over a token's choices",
    ),
    Mutant(
        _FILE,
        "priority = chosen_affinity - jnp.arange(num_choices, dtype=jnp.float32)[None, None, :]",
        "priority = chosen_affinity + jnp.arange(num_choices, dtype=jnp.float32)[None, None, :]",
        _tests("test_token_choice_by_hand", "test_scores_not_positions_decide_who_is_dropped"),
        "second choices are placed before first ones",
    ),
    Mutant(
        _FILE,
        "first_share = choice[:, :, 0].sum(axis=1)",
        "first_share = choice.sum(axis=(1, 2))",
        _tests("test_balance_loss_is_one_when_balanced_and_the_number_of_experts_at_worst"),
    ),
    Mutant(
        _FILE,
        "balance_loss = num_experts * (first_share * mean_affinity).sum(axis=-1)",
        "balance_loss = (first_share * mean_affinity).sum(axis=-1)",
        _tests("test_balance_loss_is_one_when_balanced_and_the_number_of_experts_at_worst"),
    ),
    Mutant(
        _FILE,
        "tokens = jnp.maximum(mask.sum(axis=1), 1.0)  # (G,)",
        "tokens = jnp.full(num_groups, group_size, jnp.float32)  # (G,)",
        _tests("test_padding_is_never_taken_and_changes_nothing"),
        "padding counts in the balance loss",
    ),
    Mutant(
        _FILE,
        "drop_rate = 1.0 - taken.sum(axis=(1, 2)).astype(jnp.float32) / (tokens * num_choices)",
        "drop_rate = 1.0 - taken.sum(axis=(1, 2)).astype(jnp.float32) / tokens",
        _tests("test_token_choice_by_hand", "test_room_for_all_drops_nothing"),
    ),
    Mutant(
        _FILE,
        "total = jnp.zeros(group_size, jnp.float32).at[index].add(gate)",
        "total = jnp.zeros(group_size, jnp.float32).at[index].set(gate)",
        _tests("test_renormalized_gates_by_hand"),
        "a token's gates are divided by one of them, not by their sum",
    ),
    Mutant(
        _FILE,
        ".at[index].add(taken.astype(jnp.int32))",
        ".at[index].add(jnp.ones_like(index))",
        _tests("test_padding_is_never_taken_and_changes_nothing", "test_token_choice_by_hand"),
        "empty slots count as experts of token 0",
    ),
)
