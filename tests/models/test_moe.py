import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ecdit.models.layers import layer_norm
from ecdit.models.moe import FeedForward, MixtureOfExperts, scatter
from ecdit.models.moe import capacity as layer_capacity
from ecdit.models.routing import Routing, expert_capacity
from tests.models import oracle
from tests.models.helpers import Model, close, config, jit, normal

WIDTH, HIDDEN, EXPERTS, GROUPS, SIZE = 8, 16, 4, 3, 6


def moe(**changes):
    values = {"width": WIDTH, "heads": 1, "kv_heads": 1, "num_experts": EXPERTS, "moe_output_norm": "none"} | changes
    return Model(lambda rngs: MixtureOfExperts(config(**values), rngs))


def run(layer, params, x, group_size=None):
    """The branch's output and its report, for x [B, N, d] in groups of one image or `group_size`."""
    return jit(lambda params, x: layer(params)(x, group_size or x.shape[1]))(params, x)


def tokens(groups=GROUPS, size=SIZE, width=WIDTH, seed=0):
    return normal(np.random.default_rng(seed), groups, size, width)


def feed_forward(up, down, x):
    model = Model(lambda rngs: FeedForward(up.shape[0], up.shape[1], rngs))
    return jit(lambda x: model({"up": up, "down": down})(x))(x)


def oracle_layer(params, ffn, capacity, norm):
    return oracle.Layer(
        *(params[name].astype(np.float64) for name in ("router", "up", "down")), ffn, capacity, norm == "expert"
    )


@pytest.mark.parametrize("ffn", ["expert_choice", "token_choice"])
@pytest.mark.parametrize("norm", [False, True])
def test_the_oracle_knows_its_derivative(ffn, norm):
    """Central differences of float64 are good to eight digits where no routing decision is near a tie."""
    layer, x = oracle_layer(moe().params, ffn, 3, "expert" if norm else "none"), tokens().astype(np.float64)
    rng = np.random.default_rng(1)
    d_out, d_balance = rng.normal(size=x.shape), rng.normal(size=GROUPS) * (ffn == "token_choice")
    assert oracle.margin(layer, x) > 1e-4

    def value(values):
        output = oracle.forward(layer._replace(**{k: v for k, v in values.items() if k != "x"}), values["x"])
        return (output.out * d_out).sum() + (output.balance_loss * d_balance).sum()

    point = {"x": x, "router": layer.router, "up": layer.up, "down": layer.down}
    gradient = oracle.backward(layer, x, d_out, d_balance)
    for name in point:
        direction = rng.normal(size=point[name].shape)
        ends = [value(point | {name: point[name] + sign * 1e-6 * direction}) for sign in (1, -1)]
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx((gradient[name] * direction).sum(), rel=1e-7)


@pytest.mark.parametrize("ffn", ["expert_choice", "token_choice"])
@pytest.mark.parametrize("norm", ["none", "expert"])
@pytest.mark.parametrize("dispatch", ["gather", "one_hot"])
def test_values_and_gradients_are_those_of_float64_numpy(ffn, norm, dispatch):
    layer, x = moe(ffn=ffn, moe_output_norm=norm, dispatch=dispatch), tokens()
    rng = np.random.default_rng(1)
    d_out, d_balance = normal(rng, *x.shape), normal(rng, GROUPS)
    expected_layer = oracle_layer(layer.params, ffn, 3, norm)  # 3 slots: 6 tokens, 2 experts a token, 4 experts
    assert oracle.margin(expected_layer, x.astype(np.float64)) > 1e-4  # float32 decides as float64

    def loss(params, x):
        out, report = layer(params)(x, SIZE)
        return (out * d_out).sum() + (report.balance_loss * d_balance).sum(), (out, report)

    gradients, (out, report) = jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(layer.params, x)
    expected = oracle.forward(expected_layer, x.astype(np.float64))
    np.testing.assert_array_equal(report.experts_per_token, expected.counts)
    close(out, expected.out, 2e-6)
    if ffn == "token_choice":
        assert expected.drop_rate.any()
        close((report.balance_loss, report.drop_rate), (expected.balance_loss, expected.drop_rate), 1e-6)
    else:
        d_balance = np.zeros(GROUPS)
    expected_gradients = oracle.backward(expected_layer, x.astype(np.float64), d_out, d_balance)
    close({**gradients[0], "x": gradients[1]}, expected_gradients, 3e-6)


@pytest.mark.parametrize("ffn", ["expert_choice", "token_choice"])
@pytest.mark.parametrize("norm", ["none", "expert"])
def test_dispatches_agree_in_bfloat16(ffn, norm):
    x = tokens().astype(jnp.bfloat16)
    layers = [moe(ffn=ffn, moe_output_norm=norm, dispatch=dispatch) for dispatch in ("gather", "one_hot")]
    (gathered, report), (multiplied, other_report) = (run(layer, layer.params, x) for layer in layers)
    assert gathered.dtype == multiplied.dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, report, other_report)
    close(gathered, multiplied, 2**-7)
    exact = oracle.forward(oracle_layer(layers[0].params, ffn, 3, norm), x.astype(np.float64))
    np.testing.assert_array_equal(report.experts_per_token, exact.counts)
    close(gathered, exact.out, 2**-5)


def test_scatter_adds_in_float32():
    """bfloat16 has 8 bits: numbers of 1/64 summed in it would stop growing at 4."""
    slots = 512
    gate = np.ones((1, slots, 1), np.float32)
    routing = Routing(np.zeros((1, slots, 1), np.int32), gate, gate > 0, np.zeros(1), np.zeros(1))
    out = jit(lambda y: scatter(y, routing, 2))(jnp.full((slots, 1, 1, 4), 1 / 64, jnp.bfloat16))
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out[0, 0], np.full(4, slots / 64))


def test_one_expert_that_takes_all_is_the_dense_feed_forward():
    layer, x = moe(num_experts=1, capacity_factor=1.0), tokens()
    out, report = run(layer, layer.params, x)
    close(out, feed_forward(layer.params["up"][0], layer.params["down"][0], x), 1e-6)
    assert (np.asarray(report.experts_per_token) == 1).all()


@pytest.mark.parametrize("dispatch", ["gather", "one_hot"])
def test_experts_that_take_all_are_the_softmax_mixture(dispatch):
    layer, x = moe(capacity_factor=float(EXPERTS), dispatch=dispatch), tokens()
    gates = oracle.softmax(x @ layer.params["router"])
    experts = [feed_forward(layer.params["up"][e], layer.params["down"][e], x) for e in range(EXPERTS)]
    expected = sum(gates[..., e, None] * np.asarray(experts[e]) for e in range(EXPERTS))
    out, report = run(layer, layer.params, x)
    close(out, expected, 1e-6)
    assert (np.asarray(report.experts_per_token) == EXPERTS).all()


def test_equal_experts_are_one_feed_forward_times_the_gates():
    layer, x = moe(), tokens()
    up, down = layer.params["up"][:1], layer.params["down"][:1]
    params = layer.params | {"up": np.tile(up, (EXPERTS, 1, 1)), "down": np.tile(down, (EXPERTS, 1, 1))}
    affinity = oracle.softmax(x @ layer.params["router"])
    best = np.argsort(np.argsort(-affinity, axis=1), axis=1) < 3  # each expert's three best tokens
    gates = (affinity * best).sum(axis=2, keepdims=True)
    assert len(np.unique(best.sum(axis=2))) > 2
    close(run(layer, params, x)[0], gates * np.asarray(feed_forward(up[0], down[0], x)), 1e-6)


@pytest.mark.parametrize("ffn", ["expert_choice", "token_choice"])
def test_permuting_tokens_permutes_their_outputs(ffn):
    layer, x = moe(ffn=ffn), tokens()
    order = np.random.default_rng(2).permutation(SIZE)
    out, report = run(layer, layer.params, x)
    shuffled, shuffled_report = run(layer, layer.params, x[:, order])
    close(shuffled, np.asarray(out)[:, order], 1e-6)
    np.testing.assert_array_equal(shuffled_report.experts_per_token, np.asarray(report.experts_per_token)[:, order])


@pytest.mark.parametrize("ffn", ["expert_choice", "token_choice"])
def test_the_order_of_the_experts_does_not_matter(ffn):
    layer, x = moe(ffn=ffn), tokens()
    order = np.array([2, 0, 3, 1])
    params = {name: layer.params[name][order] for name in ("up", "down")}
    params["router"] = layer.params["router"][:, order]
    out, report = run(layer, layer.params, x)
    shuffled, shuffled_report = run(layer, params, x)
    close(shuffled, out, 1e-6)
    np.testing.assert_array_equal(shuffled_report.experts_per_token, report.experts_per_token)


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 3.1])
def test_every_expert_does_the_same_work(factor):
    layer, x = moe(capacity_factor=factor), tokens(2, 10)
    capacity = expert_capacity(10, EXPERTS, factor)
    counts = np.asarray(run(layer, layer.params, x)[1].experts_per_token)
    np.testing.assert_array_equal(counts.sum(axis=1), [EXPERTS * capacity] * 2)
    assert counts.max() <= EXPERTS


@pytest.mark.parametrize("dropless", [False, True])
def test_dropless_token_choice_serves_every_choice(dropless):
    layer, x = moe(ffn="token_choice", token_choice_dropless=dropless), tokens()
    out, report = run(layer, layer.params, x)
    assert (np.asarray(report.experts_per_token) == 2).all() == dropless
    assert (np.asarray(report.drop_rate) < 1e-6).all() == dropless
    everything = oracle_layer(layer.params, "token_choice", SIZE if dropless else 3, "none")
    close(out, oracle.forward(everything, x.astype(np.float64)).out, 2e-6)


def test_token_choice_has_a_slot_for_each_choice_whatever_the_capacity_factor():
    """ceil(2 * 12 / 4) slots: the capacity factor is expert choice's."""
    for factor in (0.5, 1.0, 3.0):
        assert layer_capacity(config(ffn="token_choice", num_experts=4, capacity_factor=factor), 12) == 6


@pytest.mark.parametrize("ffn", ["expert_choice", "token_choice"])
@pytest.mark.parametrize("dispatch", ["gather", "one_hot"])
@pytest.mark.parametrize("norm", ["none", "expert"])
def test_tokens_that_no_expert_took_get_exactly_nothing(ffn, dispatch, norm):
    layer, x = moe(ffn=ffn, dispatch=dispatch, moe_output_norm=norm, capacity_factor=0.6), tokens()
    if ffn == "token_choice":  # all like experts 0 and 1 best, and both prefer the last three tokens
        router = np.zeros((WIDTH, EXPERTS), np.float32)
        router[0] = [2, 1.5, 0, 0]
        x[:, :, 0] = np.linspace(0.1, 0.7, SIZE)
        layer.params = layer.params | {"router": router}

    def loss(x):
        out, report = layer(layer.params)(x, SIZE)
        return (out * tokens(seed=1)).sum(), (out, report)

    gradient, (out, report) = jit(jax.grad(loss, has_aux=True))(x)
    uncovered = np.asarray(report.experts_per_token) == 0
    assert uncovered.any()
    assert (~uncovered).any()
    assert not np.asarray(out)[uncovered].any()
    assert not np.asarray(gradient)[uncovered].any()
    assert np.asarray(out)[~uncovered].all()
    assert np.asarray(gradient)[~uncovered].all()


def test_groups_are_consecutive_rows_of_tokens():
    """(B, N) is read row by row: two images of six tokens are a group of twelve, half an image one of three."""
    layer, x = moe(), tokens(4, 6)
    for size in (3, 6, 12, 24):
        out, report = run(layer, layer.params, x, size)
        regrouped, regrouped_report = run(layer, layer.params, x.reshape(-1, size, WIDTH))
        close(out, np.asarray(regrouped).reshape(x.shape), 1e-6)
        counts = np.asarray(regrouped_report.experts_per_token).reshape(4, 6)
        np.testing.assert_array_equal(report.experts_per_token, counts)
        slots = EXPERTS * expert_capacity(size, EXPERTS, 2.0)
        np.testing.assert_array_equal(counts.reshape(-1, size).sum(axis=1), [slots] * (24 // size))


def sandwiched_tangent(margin, norm):
    """Every token has one expert, at gate g = 1 / (1 + 63 exp(-margin)); how its branch moves when g does.

    Returns the normed branch z, its derivative by log g, and g^2 times the variance of the expert's output.
    """
    experts = 64
    layer = moe(num_experts=experts, capacity_factor=1.0, width=experts, moe_output_norm="none")
    x = np.eye(experts, dtype=np.float32)[None]
    router = margin * np.eye(experts, dtype=np.float32)
    params = layer.params | {"router": router, "up": layer.params["up"] * 4}

    def branch(scale):
        out, report = layer(params | {"router": router * scale})(x, experts)
        return (layer_norm(out) if norm else out), report.experts_per_token

    (out, counts), (tangent, _) = jit(lambda: jax.jvp(branch, (1.0,), (1.0,)))()
    np.testing.assert_array_equal(counts, np.ones((1, experts)))
    gate = 1 / (1 + (experts - 1) * np.exp(-margin))
    log_slope = margin * (1 - gate)  # d log g / d scale
    plain = np.asarray(run(layer, params, x)[0], np.float64)
    return np.asarray(out), np.asarray(tangent) / log_slope, plain.var(axis=-1, keepdims=True), gate


def test_without_a_norm_the_branch_is_proportional_to_the_gate():
    out, tangent, _, _ = sandwiched_tangent(0.04, norm=False)
    close(tangent, out, 1e-4)


@pytest.mark.parametrize(("margin", "limit"), [(0.04, 0.02), (8.0, 1e-4)])
def test_a_norm_on_the_branch_nearly_cancels_the_gate(margin, limit):
    """norm(g y) has d / d log g = norm(g y) epsilon / (g^2 var(y) + epsilon): the router hardly feels its gate."""
    out, tangent, variance, gate = sandwiched_tangent(margin, norm=True)
    assert gate == pytest.approx(1 / 64 if margin < 1 else 0.98, rel=0.05)
    share = 1e-6 / (variance + 1e-6)
    assert 0 < share.max() < limit
    if margin < 1:  # beyond, float32 cannot tell it from 0
        close(tangent, out * share, 2e-3)
    assert np.abs(tangent).max() < 2 * limit * np.abs(out).max()


def test_an_expert_norm_keeps_the_router_gradient():
    """norm before gate: the branch stays proportional to it, whatever the size of the expert's output."""
    layer, x = moe(moe_output_norm="expert"), tokens()
    rng = np.random.default_rng(1)
    d_out = normal(rng, *x.shape)

    def router_gradient(params):
        return jax.grad(lambda router: (layer(params | {"router": router})(x, SIZE)[0] * d_out).sum())(params["router"])

    gradient = jit(router_gradient)
    plain = gradient(layer.params)
    assert np.linalg.norm(plain) > 0.1
    close(gradient(layer.params | {"down": 50 * layer.params["down"]}), plain, 1e-3)


def test_init_draws_every_expert_as_if_it_were_alone():
    width, hidden, experts = 32, 64, 16
    values = config(width=width, num_experts=experts, router_init_std=0.006)
    with nnx.use_eager_sharding(False):
        params = jit(lambda: nnx.to_pure_dict(nnx.state(MixtureOfExperts(values, nnx.Rngs(0)))))()
    for name in ("up", "down"):
        kernels = np.asarray(params[name]).reshape(experts, -1)
        assert len(np.unique(kernels[:, 0])) == experts
        assert np.abs(np.corrcoef(kernels) - np.eye(experts)).max() < 0.15
        bound = (6 / (width + hidden)) ** 0.5  # Xavier: uniform, variance 2 / (inputs + outputs)
        assert 0.98 * bound < np.abs(kernels).max(axis=1).min()
        assert np.abs(kernels).max() <= bound
        np.testing.assert_allclose(kernels.std(axis=1), bound / 3**0.5, rtol=0.05)
    np.testing.assert_allclose(np.std(params["router"]), 0.006, rtol=0.1)
    np.testing.assert_allclose(np.mean(params["router"]), 0, atol=1e-3)


# Options beyond the paper


@pytest.mark.parametrize("norm", ["none", "expert"])
def test_shared_experts_work_on_every_token_without_a_gate(norm):
    layer, x = moe(num_shared_experts=3, moe_output_norm=norm), tokens()
    shared = layer.params["shared"]
    assert shared["up"].shape == (WIDTH, 3 * HIDDEN)
    alone = moe(moe_output_norm=norm)
    routed = {name: leaf for name, leaf in layer.params.items() if name != "shared"}
    everyone = np.asarray(feed_forward(shared["up"], shared["down"], x))
    everyone = np.asarray(layer_norm(everyone)) if norm == "expert" else everyone
    out, report = run(layer, layer.params, x)
    expected, expected_report = run(alone, routed, x)
    close(out, np.asarray(expected) + everyone, 1e-6)
    jax.tree.map(np.testing.assert_array_equal, report, expected_report)


def test_experts_have_a_width_of_their_own():
    layer = moe(expert_width=5)
    assert (layer.params["up"].shape, layer.params["down"].shape) == ((EXPERTS, WIDTH, 5), (EXPERTS, 5, WIDTH))
    expected = oracle.forward(oracle_layer(layer.params, "expert_choice", 3, "none"), tokens().astype(np.float64))
    close(run(layer, layer.params, tokens())[0], expected.out, 2e-6)


@pytest.mark.parametrize("ffn", ["expert_choice", "token_choice"])
def test_renormalized_branches_are_means_of_experts_times_the_scale(ffn):
    """With equal experts, a token that any of them took gets what one of them makes, times the scale."""
    layer, x = moe(ffn=ffn, gate_norm="renormalized", route_scale=2.5, capacity_factor=0.6), tokens()
    up, down = layer.params["up"][:1], layer.params["down"][:1]
    params = layer.params | {"up": np.tile(up, (EXPERTS, 1, 1)), "down": np.tile(down, (EXPERTS, 1, 1))}
    out, report = run(layer, params, x)
    taken = np.asarray(report.experts_per_token)[..., None] > 0
    assert ffn == "token_choice" or not taken.all()
    close(out, 2.5 * taken * np.asarray(feed_forward(up[0], down[0], x)), 1e-6)


def test_a_decoupled_router_sees_time_and_unmodulated_tokens():
    layer, x = moe(router_input="decoupled"), tokens()
    plain, time = tokens(seed=5), normal(np.random.default_rng(6), GROUPS, WIDTH)

    def routed(x, plain, time, group_size=SIZE):
        return jit(lambda *values: layer(layer.params)(values[0], group_size, values[1:]))(x, plain, time)

    both = np.concatenate([plain, np.broadcast_to(time[:, None], plain.shape)], axis=-1).astype(np.float64)
    router = np.concatenate([layer.params["router"], layer.params["time_router"]])
    affinity = oracle.softmax(both @ router)
    best = np.argsort(np.argsort(-affinity, axis=1), axis=1) < 3
    out, report = routed(x, plain, time)
    np.testing.assert_array_equal(report.experts_per_token, best.sum(axis=2))
    experts = [feed_forward(layer.params["up"][e], layer.params["down"][e], x) for e in range(EXPERTS)]
    expected = sum((affinity * best)[..., e, None] * np.asarray(experts[e]) for e in range(EXPERTS))
    close(out, expected, 1e-5)
    other = routed(x, plain, time[::-1])[1]
    assert (np.asarray(other.experts_per_token) != np.asarray(report.experts_per_token)).any()


def test_the_z_loss_by_hand():
    """Logits of 0 for E experts: logsumexp is log E."""
    layer, x = moe(), tokens()
    _, report = run(layer, layer.params | {"router": np.zeros_like(layer.params["router"])}, x)
    np.testing.assert_allclose(report.z_loss, np.full(GROUPS, np.log(EXPERTS) ** 2), rtol=1e-6)
    logits = (x @ layer.params["router"]).astype(np.float64)
    expected = (np.log(np.exp(logits).sum(axis=-1)) ** 2).mean(axis=-1)
    np.testing.assert_allclose(run(layer, layer.params, x)[1].z_loss, expected, rtol=1e-5)
