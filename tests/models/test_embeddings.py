import numpy as np
import pytest

from ecdit import functions, patches
from ecdit.models import embeddings
from tests.models.helpers import jit, normal

patchify = jit(patches.patchify, static_argnums=1)
unpatchify = jit(patches.unpatchify, static_argnums=(1, 2))
rope_angles = jit(embeddings.rope_angles, static_argnums=(0, 1, 2))
# [B, N, heads, k], in and out: easier to read by hand than tokens last.
rotate = jit(lambda x, angles: functions.rotate(x.transpose(0, 2, 3, 1), angles).transpose(0, 3, 1, 2))
sinusoid = jit(embeddings.sinusoid, static_argnums=1)


def random(*shape, seed=0):
    return normal(np.random.default_rng(seed), *shape)


def test_patches_are_read_row_by_row():
    x = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    expected = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    np.testing.assert_array_equal(patchify(x, 2), [expected])


def test_channels_are_innermost_in_a_patch():
    x = np.arange(8, dtype=np.float32).reshape(1, 2, 2, 2)  # row, column, channel
    np.testing.assert_array_equal(patchify(x, 2), [[[0, 1, 2, 3, 4, 5, 6, 7]]])


@pytest.mark.parametrize(("side", "patch", "channels"), [(6, 2, 3), (6, 3, 1), (4, 4, 2), (3, 1, 2)])
def test_unpatchify_is_the_inverse(side, patch, channels):
    x = random(2, side, side, channels)
    tokens = patchify(x, patch)
    assert tokens.shape == (2, (side // patch) ** 2, patch * patch * channels)
    np.testing.assert_array_equal(unpatchify(tokens, patch, channels), x)


def test_sinusoid_by_hand():
    # Width 4: frequencies 1 and 10 000 ** -0.5 = 0.01.
    expected = [[1, 1, 0, 0], [np.cos(3), np.cos(0.03), np.sin(3), np.sin(0.03)]]
    np.testing.assert_allclose(sinusoid(np.array([0.0, 3.0], np.float32), 4), expected, atol=1e-6)


def test_sinusoid_tells_the_times_of_a_sampler_apart():
    codes = np.asarray(sinusoid(np.linspace(0, 1000, 51, dtype=np.float32), 256))
    distances = np.linalg.norm(codes[:, None] - codes[None], axis=-1) + 1e9 * np.eye(51)
    assert distances.min() > 1
    np.testing.assert_allclose(np.linalg.norm(codes, axis=1), np.full(51, 128**0.5), rtol=1e-4)


def test_grid_positions_by_hand():
    # Width 8: cosines and sines of the row at frequencies 1 and 0.01, then those of the column.
    zero, one = [1, 1, 0, 0], [np.cos(1), np.cos(0.01), np.sin(1), np.sin(0.01)]
    expected = [zero + zero, zero + one, one + zero, one + one]
    np.testing.assert_allclose(jit(embeddings.grid_positions, static_argnums=(0, 1))(2, 8), expected, atol=1e-6)


def test_rope_angles_by_hand():
    # Head width 8: two frequencies an axis, 1 and 100 ** -0.5; tokens (0, 0), (0, 1), (1, 0), (1, 1).
    expected = [[0, 0, 0, 0], [0, 0, 1, 0.1], [1, 0.1, 0, 0], [1, 0.1, 1, 0.1]]
    np.testing.assert_allclose(rope_angles(2, 8, 100.0), expected, rtol=1e-6)


def test_rotation_by_hand():
    # The pairs are (1, 3) and (2, 4): the first is turned by 90 degrees, the second not.
    x = np.array([1, 2, 3, 4], np.float32).reshape(1, 1, 1, 4)
    angles = np.array([np.pi / 2, 0], np.float32).reshape(1, 1, 2)
    np.testing.assert_allclose(rotate(x, angles).reshape(4), [-3, 2, 1, 4], atol=1e-6)


def test_rows_turn_one_half_of_a_head_and_columns_the_other():
    angles = rope_angles(4, 8, 100.0)
    head = np.broadcast_to(random(8), (1, 16, 1, 8))
    turned = np.asarray(rotate(head, np.asarray(angles)[None]))[0, :, 0].reshape(4, 4, 8)
    by_row, by_column = [0, 1, 4, 5], [2, 3, 6, 7]
    np.testing.assert_array_equal(turned[:, :, by_row], np.broadcast_to(turned[:, :1, by_row], (4, 4, 4)))
    np.testing.assert_array_equal(turned[:, :, by_column], np.broadcast_to(turned[:1, :, by_column], (4, 4, 4)))
    assert (np.abs(np.diff(turned[..., by_row], axis=0)) > 1e-4).all()
    assert (np.abs(np.diff(turned[..., by_column], axis=1)) > 1e-4).all()


def test_scores_depend_on_the_difference_of_positions_only():
    grid, width = 5, 8
    angles = np.asarray(rope_angles(grid, width, 100.0))[None]
    query, key = (np.broadcast_to(random(width, seed=seed), (1, grid**2, 1, width)) for seed in (0, 1))
    turned_query, turned_key = (np.asarray(rotate(x, angles), np.float64)[0, :, 0] for x in (query, key))
    scores = turned_query @ turned_key.T
    by_difference = {}
    for i in range(grid**2):
        for j in range(grid**2):
            by_difference.setdefault((j // grid - i // grid, j % grid - i % grid), []).append(scores[i, j])
    assert len(by_difference) == (2 * grid - 1) ** 2
    means = {difference: np.mean(values) for difference, values in by_difference.items()}
    assert max(np.ptp(values) for values in by_difference.values()) < 1e-5
    assert means[0, 0] == pytest.approx(random(width, seed=0) @ random(width, seed=1), rel=1e-5)
    assert len({round(mean, 3) for mean in means.values()}) > 70  # of 81: differences are told apart, signs too


def test_rotation_is_float32_and_keeps_the_dtype():
    x, angles = random(1, 4, 2, 8).astype("bfloat16"), np.asarray(rope_angles(2, 8, 1e4))[None]
    turned = rotate(x, angles)
    assert turned.dtype == x.dtype
    exact = rotate(x.astype(np.float32), angles)
    np.testing.assert_array_equal(turned, np.asarray(exact).astype("bfloat16"))


def test_tokens_are_taken_and_put_back_by_index():
    x, gaps = random(2, 5, 3), np.full((2, 5, 3), 7, np.float32)
    index = np.array([[4, 0, 2], [1, 2, 3]], np.int32)
    taken = jit(embeddings.take_tokens)(x, index)
    np.testing.assert_array_equal(taken, [x[0, [4, 0, 2]], x[1, [1, 2, 3]]])
    put = np.asarray(jit(embeddings.put_tokens)(taken, index, gaps))
    for row, missing in enumerate([[1, 3], [0, 4]]):
        np.testing.assert_array_equal(put[row, missing], gaps[row, missing])
        np.testing.assert_array_equal(put[row, index[row]], x[row, index[row]])
