import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecdit.models import routing as rules
from ecdit.models.moe import MixtureOfExperts
from ecdit.models.routing import expert_capacity
from tests.models.helpers import Model, config, jit, normal

expert_choice = jit(rules.expert_choice, static_argnames="capacity")
token_choice = jit(rules.token_choice, static_argnames=("capacity", "num_choices"))
experts_per_token = jit(rules.experts_per_token, static_argnums=1)
gates_per_token = jit(rules.gates_per_token, static_argnums=1)
renormalize_gates = jit(rules.renormalize_gates, static_argnums=(1, 2))

# Affinities of four tokens (rows) to three experts.
AFFINITY = [[0.6, 0.3, 0.1], [0.5, 0.28, 0.22], [0.2, 0.1, 0.7], [0.4, 0.25, 0.35]]
# First choices are experts 0, 0, 0, 1; token 3 likes its second choice, expert 0, better than token 2 its first.
CHOICES = [[0.7, 0.2, 0.1], [0.6, 0.1, 0.3], [0.4, 0.35, 0.25], [0.45, 0.5, 0.05]]


def logits_of(*groups):
    """Router logits [G, S, E] whose softmax is the given affinities."""
    return np.log(np.array(groups, np.float32))


def random_logits(*shape, seed=0):
    return normal(np.random.default_rng(seed), *shape)


def placements(routing):
    """{(group, expert, token): gate} of the slots that took a token."""
    index, gate, taken = (np.asarray(x) for x in routing[:3])
    return {(g, e, int(index[g, e, c])): float(gate[g, e, c]) for g, e, c in np.argwhere(taken)}


@pytest.mark.parametrize(
    ("group_size", "experts", "factor", "capacity"),
    [
        (1024, 32, 2.0, 64),
        (10, 4, 1.0, 3),  # 2.5 is rounded up
        (16, 64, 2.0, 1),  # 0.5: never 0
        (16, 64, 1e-12, 1),
        (4, 2, 2.0, 4),  # all
        (5, 3, 3.0, 5),
        (10, 1, 1.1, 10),  # never more than the group has
        (100, 10, 1.1, 11),  # 100 * 1.1 / 10 is 11.000000000000002 in binary
        (10, 11, 1.1, 1),
    ],
)
def test_capacity_by_hand(group_size, experts, factor, capacity):
    assert expert_capacity(group_size, experts, factor) == capacity


def test_capacity_is_the_rounded_up_decimal():
    for group_size in (1, 7, 64, 100, 1024):
        for experts in (1, 3, 8, 64):
            for factor in ("0.3", "1", "1.1", "1.25", "2", "2.2"):
                exact = math.ceil(group_size * Fraction(factor) / experts)
                assert expert_capacity(group_size, experts, float(factor)) == min(max(exact, 1), group_size)


def test_expert_choice_by_hand():
    routing = expert_choice(logits_of(AFFINITY, AFFINITY[::-1]), capacity=2)
    np.testing.assert_array_equal(routing.index, [[[0, 1], [0, 1], [2, 3]], [[3, 2], [3, 2], [1, 0]]])
    # The gate is the affinity as it is: those of token 0 sum to 0.9, those of token 3 to 0.35.
    gate = [[0.6, 0.5], [0.3, 0.28], [0.7, 0.35]]
    np.testing.assert_allclose(routing.gate, [gate, gate], rtol=1e-6)
    assert np.asarray(routing.taken).all()
    np.testing.assert_array_equal(experts_per_token(routing, 4), [[2, 2, 1, 1], [1, 1, 2, 2]])


def test_gates_per_token_by_hand():
    """Each expert takes its two best of four tokens; the second group has the tokens in reverse."""
    gates = gates_per_token(expert_choice(logits_of(AFFINITY, AFFINITY[::-1]), capacity=2), 4)
    expected = np.array([[0.6, 0.3, 0], [0.5, 0.28, 0], [0, 0, 0.7], [0, 0, 0.35]])
    np.testing.assert_allclose(gates, [expected, expected[::-1]], rtol=1e-6)


def test_the_zeros_among_gates_are_the_tokens_that_were_not_taken():
    """Expert 1's affinity for every token is exp(-200), which is 0 in float32; token 3 is masked, and nobody's."""
    logits = np.tile(np.array([200.0, 0.0], np.float32), (1, 4, 1))
    routing = expert_choice(logits, capacity=4, token_mask=np.array([[True, True, True, False]]))
    assert (np.asarray(routing.gate)[0, 1] == 0).all()
    gates = np.asarray(gates_per_token(routing, 4))
    np.testing.assert_array_equal(gates > 0, [[[True, True]] * 3 + [[False, False]]])
    np.testing.assert_array_equal((gates > 0).sum(axis=-1), experts_per_token(routing, 4))


def test_experts_can_crowd_on_a_token_and_leave_others_alone():
    routing = expert_choice(logits_of(AFFINITY), capacity=1)
    assert list(placements(routing)) == [(0, 0, 0), (0, 1, 0), (0, 2, 2)]
    np.testing.assert_array_equal(experts_per_token(routing, 4), [[2, 0, 1, 0]])


def test_a_zero_router_sends_the_first_tokens_to_every_expert():
    routing = expert_choice(np.zeros((2, 7, 4), np.float32), capacity=3)
    np.testing.assert_array_equal(routing.index, np.broadcast_to(np.arange(3), (2, 4, 3)))
    np.testing.assert_array_equal(routing.gate, np.full((2, 4, 3), 0.25))


@pytest.mark.parametrize("rule", [expert_choice, token_choice])
def test_ties_go_to_the_lowest_index(rule):
    # Tokens 1, 3 and 4 are equal and expert 0's best; two of them find a slot.
    tied, other = [0.5, 0.3, 0.2], [0.1, 0.3, 0.6]
    routing = rule(logits_of([other, tied, other, tied, tied]), capacity=2)
    np.testing.assert_array_equal(routing.index[0, 0], [1, 3])


@pytest.mark.parametrize("rule", [expert_choice, token_choice])
@pytest.mark.parametrize("capacity", [0, 4])
def test_impossible_capacities_are_refused(rule, capacity):
    with pytest.raises(ValueError, match=rf"capacity = {capacity}: must be in 1\.\.3"):
        rule(np.zeros((1, 3, 2), np.float32), capacity=capacity)


@pytest.mark.parametrize("num_choices", [0, 4])
def test_impossible_numbers_of_choices_are_refused(num_choices):
    with pytest.raises(ValueError, match=rf"num_choices = {num_choices}: must be in 1\.\.3"):
        token_choice(np.zeros((1, 2, 3), np.float32), capacity=1, num_choices=num_choices)


def test_groups_are_routed_alone():
    logits = random_logits(3, 8, 4)
    for rule in (expert_choice, token_choice):
        together = rule(logits, capacity=3)
        for g in range(3):
            alone = rule(logits[g : g + 1], capacity=3)
            jax.tree.map(lambda a, b, g=g: np.testing.assert_array_equal(a[g], b[0]), together, alone)


@pytest.mark.parametrize("rule", [expert_choice, token_choice])
def test_routing_is_float32_whatever_the_dtype_of_the_logits(rule):
    logits = random_logits(2, 8, 4).astype(jnp.bfloat16)
    narrow, wide = rule(logits, capacity=3), rule(logits.astype(np.float32), capacity=3)
    assert narrow.gate.dtype == narrow.balance_loss.dtype == narrow.drop_rate.dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, narrow, wide)


@pytest.mark.parametrize("ffn", ["expert_choice", "token_choice"])
def test_the_router_of_a_bfloat16_layer_computes_in_float32(ffn):
    layer = Model(lambda rngs: MixtureOfExperts(config(ffn=ffn, width=32, num_experts=8), rngs))
    x = random_logits(2, 64, 32).astype(jnp.bfloat16)
    route = jit(lambda x: (lambda moe: moe.route(moe.router_logits(x, None)))(layer(layer.params)))
    narrow, wide = route(x), route(x.astype(np.float32))
    assert narrow.gate.dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, narrow, wide)
    # Else the test would say nothing: logits that were rounded to bfloat16 send tokens elsewhere.
    logits = x.astype(np.float32) @ layer.params["router"].astype(jnp.bfloat16).astype(np.float32)
    rule = expert_choice if ffn == "expert_choice" else token_choice
    rounded = rule(logits.astype(jnp.bfloat16), capacity=wide.index.shape[-1])
    assert (rounded.index != wide.index).any()


@pytest.mark.parametrize("rule", [expert_choice, token_choice])
@pytest.mark.parametrize("capacity", [2, 6])
def test_padding_is_never_taken_and_changes_nothing(rule, capacity):
    # Four tokens among three of padding, which every router would prefer.
    real = random_logits(2, 4, 3)
    mask = np.array([[False, True, True, False, True, True, False]] * 2)
    where = np.flatnonzero(mask[0])
    padded = np.zeros((2, 7, 3), np.float32)
    padded[:, :, 0] = 50.0
    padded[:, where] = real
    routing, alone = rule(padded, capacity=capacity, token_mask=mask), rule(real, capacity=min(capacity, 4))
    counts = np.asarray(experts_per_token(routing, 7))
    assert not counts[~mask].any()
    np.testing.assert_array_equal(counts[:, where], experts_per_token(alone, 4))
    expected = {(g, e, int(where[s])): gate for (g, e, s), gate in placements(alone).items()}
    assert placements(routing) == pytest.approx(expected, rel=1e-6)
    assert not np.asarray(routing.gate)[~np.asarray(routing.taken)].any()
    np.testing.assert_allclose(routing.balance_loss, alone.balance_loss, rtol=1e-6)
    np.testing.assert_allclose(routing.drop_rate, alone.drop_rate, atol=1e-6)


@pytest.mark.parametrize("rule", [rules.expert_choice, rules.token_choice])
def test_no_gradient_reaches_padding(rule):
    mask = np.array([[True, False, True, False]])
    weight = random_logits(1, 3, 3)

    def loss(logits):
        routing = rule(logits, capacity=3, token_mask=mask)
        return (routing.gate * weight).sum() + routing.balance_loss.sum()

    gradient = np.asarray(jit(jax.grad(loss))(random_logits(1, 4, 3)))
    assert np.isfinite(gradient).all()
    assert not gradient[~mask].any()
    assert gradient[mask].all()


@pytest.mark.parametrize("rule", [expert_choice, token_choice])
def test_a_group_of_padding_takes_nothing(rule):
    routing = rule(random_logits(1, 4, 3), capacity=2, token_mask=np.zeros((1, 4), bool))
    assert not np.asarray(routing.taken).any()
    assert not np.asarray(routing.gate).any()
    assert np.isfinite(routing.balance_loss).all()


def test_gradients_flow_through_selected_gates_and_the_softmax():
    logits = logits_of(AFFINITY)
    weight = np.array([[[2.0], [3.0], [5.0]]], np.float32)  # of experts 0 and 1 on token 0, and of 2 on token 2
    gradient = jit(jax.grad(lambda logits: (rules.expert_choice(logits, 1).gate * weight).sum()))(logits)[0]
    # d gate_e / d logit_j = gate_e (delta_ej - affinity_j): row 0 from 2 * 0.6 and 3 * 0.3, row 2 from 5 * 0.7.
    row_0 = [0.6 * (2 - 2.1), 0.3 * (3 - 2.1), 0.1 * (0 - 2.1)]
    row_2 = [0.2 * (0 - 3.5), 0.1 * (0 - 3.5), 0.7 * (5 - 3.5)]
    np.testing.assert_allclose(gradient, [row_0, [0, 0, 0], row_2, [0, 0, 0]], rtol=1e-5, atol=1e-7)


def test_token_choice_by_hand():
    routing = token_choice(logits_of(CHOICES), capacity=3)
    # First choices go first, so token 2 gets into expert 0 before token 3; gates are renormalised over the two
    # choices, token 3's also though it lost one.
    expected = {
        (0, 0, 0): 0.7 / 0.9,
        (0, 0, 1): 0.6 / 0.9,
        (0, 0, 2): 0.4 / 0.75,
        (0, 1, 3): 0.5 / 0.95,
        (0, 1, 2): 0.35 / 0.75,
        (0, 1, 0): 0.2 / 0.9,
        (0, 2, 1): 0.3 / 0.9,
    }
    assert placements(routing) == pytest.approx(expected, rel=1e-6)
    assert not np.asarray(routing.gate)[~np.asarray(routing.taken)].any()
    np.testing.assert_allclose(routing.drop_rate, [1 / 8], atol=1e-7)
    # E * sum_e f_e p_e with shares of first choices 3/4, 1/4, 0 and mean affinities 0.5375, 0.2875, 0.175.
    np.testing.assert_allclose(routing.balance_loss, [3 * (0.75 * 0.5375 + 0.25 * 0.2875)], rtol=1e-6)


def test_scores_not_positions_decide_who_is_dropped():
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        routing = token_choice(logits_of([CHOICES[i] for i in order]), capacity=1)
        taken = {(e, order[s]) for _, e, s in placements(routing)}
        assert taken == {(0, 0), (1, 3), (2, 1)}
        np.testing.assert_allclose(routing.drop_rate, [5 / 8], atol=1e-7)


def test_room_for_all_drops_nothing():
    routing = token_choice(random_logits(2, 9, 4), capacity=9)
    np.testing.assert_array_equal(experts_per_token(routing, 9), np.full((2, 9), 2))
    np.testing.assert_allclose(routing.drop_rate, [0, 0], atol=1e-7)
    totals = np.zeros((2, 9))
    for (g, _, s), gate in placements(routing).items():
        totals[g, s] += gate
    np.testing.assert_allclose(totals, np.ones((2, 9)), rtol=1e-6)


@pytest.mark.parametrize("num_choices", [1, 2, 3])
def test_every_choice_is_among_the_best(num_choices):
    logits = random_logits(1, 6, 4)
    chosen = np.zeros((6, 4), bool)
    for _, e, s in placements(token_choice(logits, capacity=6, num_choices=num_choices)):
        chosen[s, e] = True
    np.testing.assert_array_equal(chosen, np.argsort(np.argsort(-logits[0], axis=1), axis=1) < num_choices)


def test_balance_loss_is_one_when_balanced_and_the_number_of_experts_at_worst():
    balanced = [[0.6, 0.3, 0.1], [0.1, 0.6, 0.3], [0.3, 0.1, 0.6]]
    collapsed = [[1 - 2e-6, 1e-6, 1e-6]] * 3
    np.testing.assert_allclose(
        token_choice(logits_of(balanced, collapsed), capacity=3).balance_loss, [1.0, 3.0], rtol=1e-5
    )


def test_balance_loss_pushes_the_favourite_down():
    gradient = jit(jax.grad(lambda logits: rules.token_choice(logits, 4).balance_loss.sum()))(logits_of(CHOICES))
    assert (np.asarray(gradient)[..., 0] > 0).all()
    assert (np.asarray(gradient)[..., 2] < 0).all()


def test_expert_choice_is_balanced_by_construction():
    routing = expert_choice(random_logits(3, 8, 4), capacity=3)
    np.testing.assert_array_equal(np.sum(experts_per_token(routing, 8), axis=1), [12, 12, 12])
    assert not np.asarray(routing.balance_loss).any()
    assert not np.asarray(routing.drop_rate).any()


def test_renormalized_gates_by_hand():
    """Experts take tokens (0, 1), (0, 1) and (2, 3): tokens 0 and 1 have two experts, 2 and 3 one."""
    routing = expert_choice(logits_of(AFFINITY), capacity=2)
    np.testing.assert_array_equal(np.sort(routing.index[0]), [[0, 1], [0, 1], [2, 3]])
    gates = renormalize_gates(routing, 4, 2.5)
    by_pair = {(e, int(s)): g for e in range(3) for s, g in zip(gates.index[0, e], gates.gate[0, e], strict=True)}
    expected = {(0, 0): 6 / 9, (0, 1): 50 / 78, (1, 0): 3 / 9, (1, 1): 28 / 78, (2, 2): 1.0, (2, 3): 1.0}
    assert by_pair == pytest.approx({pair: 2.5 * share for pair, share in expected.items()}, rel=1e-5)


def test_renormalized_gates_leave_empty_slots_empty():
    mask = np.array([[True, False, True, False]])
    routing = rules.expert_choice(logits_of(AFFINITY), 3, mask)
    gates = renormalize_gates(routing, 4, 1.0)
    assert not np.asarray(gates.gate)[~np.asarray(routing.taken)].any()
    np.testing.assert_allclose(jnp.zeros(4).at[gates.index[0]].add(gates.gate[0]), [1, 0, 1, 0], rtol=1e-6)
