import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ecdit.components import TextWidths
from ecdit.models.dit import DiT, kept_tokens
from ecdit.models.layers import REMAT_POLICIES
from ecdit.models.routing import expert_capacity
from ecdit.models.routing_metrics import coverage, router_grad_norm
from ecdit.patches import patchify, unpatchify
from tests.models import dit_oracle
from tests.models.helpers import (
    CONFIG,
    TEXT_WIDTH,
    close,
    config,
    dit,
    float32_all,
    forward,
    inputs,
    jit,
    normal,
    replace_leaf,
)

BATCH, KEPT, ALL = 4, CONFIG.num_kept, CONFIG.num_tokens
FFNS = ["dense", "token_choice", "expert_choice"]
NORMS = ["sandwich", "none", "expert"]


def random(*shape, seed=0):
    return normal(np.random.default_rng(seed), *shape)


def velocity(changes=None, params=None, config=CONFIG, group_size=KEPT):
    """The velocity [B, N, p] of random inputs with some of them changed."""
    values = inputs(config, BATCH)._replace(**(changes or {}))
    params = dit(config).params if params is None else params
    return np.asarray(forward(config, group_size)(params, values)[0])


def with_text(**changes):
    return {"text": inputs(CONFIG, BATCH).text._replace(**changes)}


def with_patches(where, seed=7):
    """Latents whose patches `where` [B, N] are replaced by others."""
    patches = np.asarray(patchify(inputs(CONFIG, BATCH).latents, CONFIG.patch_size))
    patches = np.where(where[..., None], random(*patches.shape, seed=seed), patches)
    return {"latents": np.asarray(unpatchify(patches, CONFIG.patch_size, CONFIG.latent_channels))}


def is_kept():
    mask = np.zeros((BATCH, ALL), bool)
    np.put_along_axis(mask, inputs(CONFIG, BATCH).kept, True, axis=1)
    return mask


@functools.cache
def drawn():
    """Parameters as training draws them, and what they make of random inputs."""

    def draw(values):
        model = DiT(config(depth=4), TextWidths(TEXT_WIDTH, TEXT_WIDTH), nnx.Rngs(0))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param)), model.forward(*values, KEPT)[0]

    with nnx.use_eager_sharding(False):
        return jax.tree.map(np.asarray, jit(draw)(inputs(CONFIG, BATCH)))


# The whole model

# Heads of 8, since in those of 4 each axis has one pair, which turns at frequency 1 whatever rope_theta is.
LARGE = {"width": 32, "rope_theta": 30.0, "depth": 4, "absolute_positions": True, "num_shared_experts": 1}
LARGE |= {"prediction": "data"}
# Options, tokens of a group, and whether tokens are masked. All but the last share programs with tests below.
WHOLE = {
    "masked": ({}, KEPT, True),
    "unmasked": ({}, ALL, False),
    "groups_of_two_images": ({}, 2 * KEPT, True),
    "dense": ({"ffn": "dense"}, KEPT, True),
    "no_table": ({"block_table": False}, KEPT, True),
    "sandwich": ({"moe_output_norm": "sandwich"}, KEPT, True),
    "no_norm": ({"moe_output_norm": "none"}, KEPT, True),
    "decoupled": ({"router_input": "decoupled", "mask_ratio": 0.0, "extra_blocks": 0}, ALL, False),
    "large": (LARGE, KEPT, True),
}


@pytest.mark.parametrize("case", WHOLE)
def test_the_whole_model_is_that_of_float64_numpy(case):
    """Up to float32's sinusoids, which err by 3e-5 at numbers near 1000. Parameters are random: none is zero."""
    changes, group_size, masked = WHOLE[case]
    values = config(**changes)
    params, data = dit(values).params, inputs(values, BATCH, masked=masked)
    out, report = forward(values, group_size)(params, data)
    expected, counts = dit_oracle.velocity(values, params, data, group_size)
    if report is not None:
        np.testing.assert_array_equal(report.experts_per_token, counts)
    close(unpatchify(out, values.patch_size, values.latent_channels), expected, 3e-5)


@pytest.mark.parametrize("remat", ["none", "minimal"])
def test_the_plain_model_is_differentiated_forwards_too(remat):
    """`jax.jvp` along a direction is the gradient's product with it, to the digits that such a sum has in float32."""
    values = config(remat=remat)
    params, data = dit(values).params, inputs(values, BATCH)
    rng = np.random.default_rng(3)
    direction = jax.tree.map(lambda p: normal(rng, *p.shape), params)

    def loss(params):
        return jnp.square(dit(values)(params).forward(*data, KEPT)[0] - 1).mean()

    @jit
    def derivatives(params):
        products = jax.tree.map(jnp.vdot, jax.grad(loss)(params), direction)
        return jax.jvp(loss, (params,), (direction,))[1], jax.tree.reduce(jnp.add, products)

    forwards, backwards = derivatives(params)
    assert forwards == pytest.approx(float(backwards), rel=1e-4)


# At the start


def test_the_velocity_is_zero_at_the_start():
    params, out = drawn()
    assert out.shape == (BATCH, ALL, CONFIG.patch_dim)
    assert out.dtype == np.float32
    assert not out.any()
    for name in ("modulation", "modulation_bias", "head_modulation", "head_modulation_bias"):
        assert not params[name].any()
    blocks = [params["pairs"]["odd"], params["pairs"]["even"], params["extra"]]
    assert not any(block["cross_attention"]["out"].any() for block in blocks)


def test_nothing_starts_at_zero_right_before_a_norm_without_parameters():
    """Such a norm divides by the deviation of what comes in: at zero its gradient is that of epsilon."""
    params, _ = drawn()
    odd, even, extra = params["pairs"]["odd"], params["pairs"]["even"], params["extra"]
    for projection in (
        *(params[name]["out"]["kernel"] for name in ("time", "caption", "size_crop")),
        *(kernel for block in (odd, even, extra) for kernel in block["attention"]["out"]),
        *(kernel for block in (odd, extra) for kernel in block["feed_forward"]["down"]),
        *(kernel for layer in even["experts"]["down"] for kernel in layer),
        params["patches"]["kernel"],
        params["mask_token"],
    ):
        assert projection.any()
        assert projection.std() > 0.01


def test_no_two_blocks_and_no_two_experts_start_equal():
    params, _ = drawn()
    odd, even = params["pairs"]["odd"], params["pairs"]["even"]
    for name in ("up", "down"):
        experts = even["experts"][name].reshape(2 * CONFIG.num_experts, -1)
        assert np.abs(np.corrcoef(experts) - np.eye(len(experts))).max() < 0.25
    kernels = np.concatenate([block["attention"]["query"].reshape(2, -1) for block in (odd, even)])
    assert np.abs(np.corrcoef(kernels) - np.eye(4)).max() < 0.35


def test_the_block_table_starts_with_its_gates_open():
    for block in (*drawn()[0]["pairs"].values(), drawn()[0]["extra"]):
        expected = np.array([0, 0, CONFIG.gate_init, 0, 0, CONFIG.gate_init], np.float32)
        np.testing.assert_array_equal(block["table"], np.broadcast_to(expected[:, None], block["table"].shape))


# Masked tokens


def test_nothing_depends_on_the_content_of_dropped_patches():
    changed = with_patches(~is_kept())
    assert (changed["latents"] != inputs(CONFIG, BATCH).latents).any()
    np.testing.assert_array_equal(velocity(changed), velocity())


def test_everything_depends_on_every_kept_patch():
    """The blocks at the end let the gaps see what was kept."""
    plain = velocity()
    for position in range(KEPT):
        where = np.zeros((BATCH, ALL), bool)
        np.put_along_axis(where, inputs(CONFIG, BATCH).kept[:, position : position + 1], True, axis=1)
        assert (velocity(with_patches(where)) != plain).any(axis=-1).all()


def test_gaps_hold_the_mask_token():
    params = replace_leaf(dit(CONFIG).params, "mask_token", lambda token: token[::-1])
    assert (velocity(params=params) != velocity()).any(axis=-1).all()
    unmasked = inputs(CONFIG, BATCH, masked=False)
    plain, other = (forward(CONFIG, ALL)(p, unmasked)[0] for p in (dit(CONFIG).params, params))
    np.testing.assert_array_equal(plain, other)


def test_the_order_of_kept_tokens_does_not_matter():
    shuffled = np.random.default_rng(1).permuted(inputs(CONFIG, BATCH).kept, axis=1)
    assert (shuffled != inputs(CONFIG, BATCH).kept).any(axis=1).all()
    close(velocity({"kept": shuffled}), velocity(), 1e-5)


@pytest.mark.parametrize("absolute_positions", [False, True])
def test_keeping_all_tokens_in_any_order_is_not_masking(absolute_positions):
    """It would not be if kept tokens had the positions of their ranks."""
    values = config(absolute_positions=absolute_positions)
    order = np.random.default_rng(1).permuted(np.tile(np.arange(ALL, dtype=np.int32), (BATCH, 1)), axis=1)
    run, data = forward(values, ALL), inputs(values, BATCH, masked=False)
    (expected, report), (shuffled, shuffled_report) = (
        run(dit(values).params, data._replace(kept=kept)) for kept in (None, order)
    )
    close(shuffled, expected, 1e-5)
    counts = np.take_along_axis(np.asarray(report.experts_per_token)[0], order, axis=1)
    np.testing.assert_array_equal(shuffled_report.experts_per_token[0], counts)


def test_tokens_and_gaps_are_told_their_places():
    """Without attention between tokens, equal patches get equal velocities but for their absolute positions."""
    data = inputs(CONFIG, BATCH)._replace(latents=np.ones_like(inputs(CONFIG, BATCH).latents))
    for absolute_positions in (False, True):
        values = config(absolute_positions=absolute_positions, ffn="dense")
        params = dit(values).params
        for block in ("pairs/odd", "pairs/even", "extra"):
            params = replace_leaf(params, f"{block}/attention/out", np.zeros_like)
        out = np.asarray(forward(values, KEPT)(params, data)[0])
        for row, mask in zip(out, is_kept(), strict=True):
            for group in (row[mask], row[~mask]):
                distances = np.abs(group[:, None] - group[None]).max(axis=-1) + np.eye(len(group))
                assert distances.min() > 1e-3 if absolute_positions else (distances - np.eye(len(group))).max() < 1e-5


# Conditions


@pytest.mark.parametrize("number", range(4))
def test_every_micro_condition_changes_the_velocity(number):
    size_crop = inputs(CONFIG, BATCH).size_crop.copy()
    size_crop[:, number] += 100
    assert (velocity({"size_crop": size_crop}) != velocity()).any(axis=-1).all()


@pytest.mark.parametrize(
    "change",
    [
        {"time": np.linspace(0.2, 0.8, BATCH, dtype=np.float32)},
        with_text(pooled=random(BATCH, TEXT_WIDTH, seed=5)),
        with_text(states=random(BATCH, 5, TEXT_WIDTH, seed=5)),
    ],
    ids=["time", "pooled", "states"],
)
def test_every_condition_changes_the_velocity(change):
    assert (np.abs(velocity(change) - velocity()).max(axis=-1) > 1e-3).all()


@pytest.mark.parametrize("name", ["time", "caption", "size_crop"])
def test_the_size_of_an_embedded_condition_does_not_matter(name):
    """Each is normed before their sum: a large one would drown the others."""
    params = dit(CONFIG).params
    for leaf in ("kernel", "bias"):
        params = replace_leaf(params, f"{name}/out/{leaf}", lambda x: 8 * x)
    assert np.abs(velocity(params=params) - velocity()).max() < 1e-3 * np.abs(velocity()).max()


def test_the_padding_of_captions_changes_nothing():
    text = inputs(CONFIG, BATCH).text
    assert not text.mask.all()
    states = np.where(text.mask[..., None], text.states, random(*text.states.shape, seed=5))
    np.testing.assert_array_equal(velocity(with_text(states=states)), velocity())
    assert (velocity(with_text(states=states, mask=np.ones_like(text.mask))) != velocity()).any()


# Images of a batch


def others(image):
    """Inputs in which all of one image, its caption and its conditions is different."""
    first, second = inputs(CONFIG, BATCH), inputs(CONFIG, BATCH, seed=9)
    rows = np.arange(BATCH) == image
    return jax.tree.map(lambda a, b: np.where(rows.reshape(-1, *[1] * (a.ndim - 1)), b, a), first, second)


def test_with_image_groups_no_image_depends_on_its_neighbours():
    plain = velocity()
    for image in range(BATCH):
        changed = velocity(others(image)._asdict())
        kept = np.arange(BATCH) != image
        np.testing.assert_array_equal(changed[kept], plain[kept])
        assert (changed[image] != plain[image]).all(axis=-1).any()


def test_images_of_a_group_compete_and_others_do_not():
    """The control of the test before: groups of two images."""
    plain = velocity(group_size=2 * KEPT)
    for image in range(BATCH):
        changed = velocity(others(image)._asdict(), group_size=2 * KEPT)
        differs = (changed != plain).any(axis=(1, 2))
        np.testing.assert_array_equal(differs, np.arange(BATCH) // 2 == image // 2)


def test_permuting_a_batch_permutes_its_velocities():
    order = np.array([2, 0, 3, 1])
    permuted = jax.tree.map(lambda x: x[order], inputs(CONFIG, BATCH))
    close(velocity(permuted._asdict()), velocity()[order], 1e-5)


# Blocks


@pytest.mark.parametrize("norm", NORMS)
def test_norms_stand_behind_their_branches(norm):
    """Behind a norm the size of a branch does not matter: always for attention and FFN, by config for experts."""
    values = config(moe_output_norm=norm)
    plain = velocity(config=values)
    for path, changes in (
        ("pairs/odd/attention/out", False),
        ("pairs/even/attention/out", False),
        ("pairs/odd/feed_forward/down", False),
        ("extra/feed_forward/down", False),
        ("pairs/even/experts/down", norm == "none"),
        ("pairs/odd/cross_attention/out", True),
    ):
        params = replace_leaf(dit(values).params, path, lambda leaf: 4 * leaf)
        difference = np.abs(velocity(params=params, config=values) - plain).max() / np.abs(plain).max()
        assert difference > 0.01 if changes else difference < 1e-3, path


@pytest.mark.parametrize("norm", NORMS)
def test_the_router_learns(norm):
    values = config(moe_output_norm=norm, extra_blocks=0, mask_ratio=0.0, depth=4)
    params, data = dit(values).params, inputs(values, 2, masked=False)

    def loss(router):
        changed = replace_leaf(params, "pairs/even/experts/router", lambda _: router)
        return jnp.square(dit(values)(changed).forward(*data, ALL)[0] - 1).sum()

    gradient = jit(jax.grad(loss))(params["pairs"]["even"]["experts"]["router"])
    norms = router_grad_norm({"pairs": {"even": {"experts": {"router": gradient}}}})
    assert norms.shape == (2,)
    assert (np.asarray(norms) > 1e-3).all()
    np.testing.assert_allclose(norms, np.linalg.norm(gradient, axis=(1, 2)), rtol=1e-5)


def test_there_is_no_router_to_learn_in_a_dense_model():
    assert router_grad_norm(dit(config(ffn="dense")).params).shape == (0,)


def test_a_decoupled_router_does_not_feel_the_modulation():
    """Shift and scale of the experts' input change what they see, and tokens taken only if it is modulated."""
    for router_input in ("modulated", "decoupled"):
        values = config(router_input=router_input, mask_ratio=0.0, extra_blocks=0)
        params, data = dit(values).params, inputs(values, BATCH, masked=False)
        change = np.zeros((1, 6, CONFIG.width), np.float32)
        change[:, 3:5] = random(1, 2, CONFIG.width)  # shift and scale in front of the FFN
        moved = replace_leaf(params, "pairs/even/table", lambda table, change=change: table + change)
        (out, report), (other, other_report) = (forward(values, ALL)(p, data) for p in (params, moved))
        assert (np.asarray(out) != np.asarray(other)).any()
        same = (np.asarray(report.experts_per_token) == np.asarray(other_report.experts_per_token)).all()
        assert same == (router_input == "decoupled")


def test_even_blocks_of_a_dense_model_can_be_wider():
    params = dit(config(ffn="dense", even_ffn_multiplier=4)).params
    assert params["pairs"]["odd"]["feed_forward"]["up"].shape == (1, 16, 32)
    assert params["pairs"]["even"]["feed_forward"]["up"].shape == (1, 16, 64)
    assert params["extra"]["feed_forward"]["up"].shape == (1, 16, 32)


def test_a_table_of_zeros_is_no_table():
    params = dit(CONFIG).params
    for path in ("pairs/odd/table", "pairs/even/table", "extra/table"):
        plain = velocity(params=params)
        params = replace_leaf(params, path, np.zeros_like)
        assert (velocity(params=params) != plain).any()
    without = config(block_table=False)
    bare = {path: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if "table" not in str(path)}
    structure = jax.tree.structure(dit(without).params)
    close(velocity(params=structure.unflatten(bare.values()), config=without), velocity(params=params), 1e-6)


@pytest.mark.parametrize("ffn", FFNS)
def test_one_field_chooses_the_ffn_of_even_blocks(ffn):
    values = config(ffn=ffn)
    out, report = forward(values, KEPT)(dit(values).params, inputs(values, BATCH))
    assert np.isfinite(out).all()
    params = dit(values).params
    assert ("experts" in params["pairs"]["even"]) == (ffn != "dense")
    assert ("feed_forward" in params["pairs"]["even"]) == (ffn == "dense")
    assert "experts" not in str(jax.tree.structure((params["pairs"]["odd"], params["extra"])))
    if ffn == "dense":
        assert report is None
        return
    assert report.experts_per_token.shape == (1, BATCH, KEPT)
    assert report.balance_loss.shape == report.drop_rate.shape == (1, BATCH)
    assert np.asarray(report.balance_loss).any() == (ffn == "token_choice")


def test_every_sparse_layer_reports_its_balanced_counts():
    values = config(depth=6, capacity_factor=1.5)
    _, report = forward(values, KEPT)(dit(values).params, inputs(values, BATCH))
    counts = np.asarray(report.experts_per_token)
    assert counts.shape == (3, BATCH, KEPT)
    slots = values.num_experts * expert_capacity(KEPT, values.num_experts, values.capacity_factor)
    np.testing.assert_array_equal(counts.sum(axis=2), np.full((3, BATCH), slots))
    assert (counts[0] != counts[1]).any()
    assert (counts[1] != counts[2]).any()


# Numbers


@pytest.mark.parametrize("ffn", FFNS)
def test_bfloat16_stays_near_float32(ffn):
    wide, narrow = config(ffn=ffn), config(ffn=ffn, dtype="bfloat16")
    params = dit(wide).params
    assert float32_all(dit(narrow).params)
    (expected, _), (out, _) = (forward(c, KEPT)(params, inputs(c, BATCH)) for c in (wide, narrow))
    assert out.dtype == jnp.float32
    error = np.linalg.norm(out - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.1  # 0: it would not be bfloat16


def test_the_head_computes_in_float32():
    values = config(dtype="bfloat16")
    x, condition = (
        random(*shape).astype(jnp.bfloat16) for shape in ((BATCH, ALL, CONFIG.width), (BATCH, CONFIG.width))
    )
    head = dit(values)(dit(values).params).predicted
    np.testing.assert_array_equal(head(x, condition), head(x.astype(np.float32), condition))


@functools.cache
def gradients(remat, unroll=1):
    values = config(extra_blocks=0, mask_ratio=0.0, remat=remat, scan_unroll=unroll)
    model, data = dit(values), inputs(values, 2, masked=False)
    return jit(jax.value_and_grad(lambda params: jnp.square(model(params).forward(*data, ALL)[0] - 1).mean()))(
        model.params
    )


@pytest.mark.parametrize("remat", sorted(set(REMAT_POLICIES) - {"none"}))
def test_rematerialisation_changes_neither_values_nor_gradients(remat):
    close(gradients(remat), gradients("none"), 1e-5)


@pytest.mark.parametrize("remat", ["none", "minimal"])
def test_unrolling_changes_neither_values_nor_gradients(remat):
    close(gradients(remat, unroll=2), gradients("none"), 1e-5)


def test_every_parameter_gets_a_gradient():
    _, grads = gradients("none")
    for path, gradient in jax.tree_util.tree_leaves_with_path(grads):
        assert np.asarray(gradient).any(), jax.tree_util.keystr(path)


@pytest.mark.parametrize("mode", ["train", "sample"])
def test_a_prediction_is_of_the_tokens_that_its_keys_keep(mode):
    """Training groups are two images' kept tokens, sampling groups half an image: other experts take a token."""
    values = config(ffn="expert_choice", group=str(2 * KEPT), sampling_group=str(ALL // 2))
    model, data = dit(values), inputs(values, BATCH)._replace(kept=None)
    keys = jax.random.split(jax.random.key(3), BATCH) if mode == "train" else None
    found = jit(lambda params: model(params)(*data[:4], keys, mode))(model.params)
    kept = None if keys is None else jax.vmap(lambda key: kept_tokens(key, values))(keys)
    group = 2 * KEPT if mode == "train" else ALL // 2
    patches, report = forward(values, group)(model.params, data._replace(kept=kept))
    np.testing.assert_array_equal(patchify(found.velocity, values.patch_size), patches)
    if mode == "train":
        np.testing.assert_array_equal(found.loss_weights.sum(axis=1), np.full(BATCH, KEPT))
        np.testing.assert_array_equal(np.take_along_axis(found.loss_weights, kept, axis=1), np.ones((BATCH, KEPT)))
        jax.tree.map(np.testing.assert_array_equal, found.metrics, coverage(report))
    else:
        np.testing.assert_array_equal(found.loss_weights, np.ones((BATCH, ALL)))
        np.testing.assert_array_equal(found.metrics["experts_per_token"], report.experts_per_token)
    assert found.auxiliary_loss == 0


@pytest.mark.parametrize(
    ("mask_ratio", "group", "seen"),
    [
        (0.5, "image", ALL),
        (0.5, str(2 * KEPT), 2 * ALL),
        (0.5, str(KEPT), ALL),
        (0.5, str(KEPT // 2), ALL // 2),
        (0.25, str(3 * ALL // 2), 2 * ALL),  # three quarters of two images' tokens
        (0.25, str(ALL // 4), ALL // 4),  # a third of an image's, which no number of all tokens is
    ],
)
def test_where_nothing_is_dropped_as_many_images_compete_as_in_training(mask_ratio, group, seen):
    model = dit(config(group=group, mask_ratio=mask_ratio))
    assert model(model.params)._group_size("train", ALL) == seen


def test_the_held_out_loss_routes_all_tokens_of_as_many_images_as_training():
    """Of two images 24 tokens are kept in training, and here all 32 are seen."""
    values = config(ffn="expert_choice", group=str(3 * ALL // 2), mask_ratio=0.25)
    model, data = dit(values), inputs(values, BATCH, masked=False)
    found = jit(lambda params: model(params)(*data[:4], None, "train"))(model.params)
    patches, _ = forward(values, 2 * ALL)(model.params, data)
    close(patchify(found.velocity, values.patch_size), patches, 1e-5)


def test_images_of_a_group_are_said_to_belong_together():
    for group, sampling_group, together in ((2 * KEPT, 4 * ALL, (2, 4)), ("image", ALL // 4, (1, 1))):
        model = dit(config(group=str(group), sampling_group=str(sampling_group)))
        bound = model(model.params)
        assert (bound.images_together("train"), bound.images_together("sample")) == together
