"""Tests the Fréchet distance by hand and against pytorch-fid's formula, and moments of any shards."""

import io
import re

import numpy as np
import pytest

from ecdit.errors import UserError
from ecdit.evaluation import moments as moments_module
from ecdit.evaluation.frechet import distance_of_moments, frechet_distance
from ecdit.evaluation.moments import Moments, moments, read_moments, write_moments


def pytorch_fid(features_a, features_b):
    """calculate_frechet_distance of pytorch-fid 0.3.0, where sqrtm does not fail."""
    sqrtm = pytest.importorskip("scipy.linalg").sqrtm
    a, b = (np.cov(features, rowvar=False) for features in (features_a, features_b))
    offset = features_a.mean(axis=0) - features_b.mean(axis=0)
    root = sqrtm(a.dot(b))
    assert np.isfinite(root).all()
    return offset.dot(offset) + np.trace(a) + np.trace(b) - 2 * np.trace(root.real)


def test_one_dimension_by_hand():
    """Means 1 and 5, variances 2 and 8: 4^2 + (sqrt 2 - sqrt 8)^2 = 18."""
    assert frechet_distance(np.array([[0.0], [2.0]]), np.array([[3.0], [7.0]])) == pytest.approx(18, abs=1e-12)


def test_covariances_that_do_not_commute_by_hand():
    """A = diag(4, 1) and B, diag(4, 1) turned by 45 degrees. tr sqrt(A B) = sqrt(tr A B + 2 sqrt(det A B)) in 2-D."""
    a, b = np.diag([4.0, 1.0]), np.array([[2.5, 1.5], [1.5, 2.5]])
    expected = 10 - 2 * np.sqrt(np.trace(a @ b) + 2 * 4)
    zero = np.zeros(2)
    assert distance_of_moments(Moments(zero, a), Moments(zero, b)) == pytest.approx(expected, abs=1e-12)
    assert expected == pytest.approx(0.94461, abs=1e-5)


def features(seed, rows, dimensions, decay=0.0, scale=1.0):
    random = np.random.default_rng(seed)
    spread = scale * np.exp(-decay * np.arange(dimensions) / dimensions)
    mixed = np.linalg.qr(random.normal(size=(dimensions, dimensions)))[0]
    return (random.normal(size=(rows, dimensions)) * spread[None]) @ mixed + random.normal(size=dimensions)[None] / 4


@pytest.mark.parametrize(
    ("rows_a", "rows_b", "dimensions", "decay"),
    [
        (300, 400, 32, 0),
        (300, 400, 64, 8),
        (70, 70, 64, 0),
        (64, 64, 64, 0),  # of rank 63
        (20, 30, 64, 0),
        (20, 400, 64, 0),
        (400, 20, 64, 0),
        (20, 20, 64, 3),
        (2, 2, 8, 0),
    ],
)
def test_it_agrees_with_pytorch_fid(rows_a, rows_b, dimensions, decay):
    """Fewer samples than dimensions too, where sqrtm's own rounding is about 1e-8 for each empty dimension."""
    a, b = features(0, rows_a, dimensions, decay), features(1, rows_b, dimensions, decay, scale=1.3)
    np.testing.assert_allclose(frechet_distance(a, b), pytorch_fid(a, b), rtol=1e-6, atol=1e-5)


def test_orthogonal_sets_of_low_rank_have_no_root_in_common():
    """Then the distance is that of the means and both traces, to the last digits: noise would take 1e-8 a dimension."""
    a, b = np.zeros((10, 40)), np.zeros((10, 40))
    a[:, :20], b[:, 20:] = features(0, 10, 20), features(1, 10, 20)
    axes = np.linalg.qr(np.random.default_rng(2).normal(size=(40, 40)))[0]
    a, b = a @ axes, b @ axes
    traces = np.trace(np.cov(a, rowvar=False)) + np.trace(np.cov(b, rowvar=False))
    expected = np.square(a.mean(axis=0) - b.mean(axis=0)).sum() + traces
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-13)


def test_a_set_of_low_rank_beside_a_full_one():
    """Covariances with the same axes, so that the trace is the sum of sqrt(a_i b_i); 54 of 64 a_i are 0."""
    random = np.random.default_rng(0)
    axes = np.linalg.qr(random.normal(size=(64, 64)))[0]
    a, b = np.zeros(64), random.uniform(1, 2, 64)
    a[:10] = random.uniform(1, 2, 10)
    full, low = (Moments(np.zeros(64), (axes * spread[None]) @ axes.T) for spread in (b, a))
    expected = np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert distance_of_moments(low, full) == pytest.approx(expected, rel=1e-12)
    assert distance_of_moments(full, low) == pytest.approx(expected, rel=1e-12)


def test_sets_of_low_rank_that_share_some_axes():
    """Axes 0 to 9 and 5 to 29 of 64: the roots come from the five that both have."""
    random = np.random.default_rng(0)
    axes = np.linalg.qr(random.normal(size=(64, 64)))[0]
    a, b = np.zeros(64), np.zeros(64)
    a[:10], b[5:30] = random.uniform(1, 2, 10), random.uniform(1, 2, 25)
    few, more = (Moments(np.zeros(64), (axes * spread[None]) @ axes.T) for spread in (a, b))
    expected = np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert distance_of_moments(few, more) == pytest.approx(expected, rel=1e-12)
    assert distance_of_moments(more, few) == pytest.approx(expected, rel=1e-12)


def test_a_set_of_low_rank_has_no_distance_from_itself():
    a = features(0, 20, 64)
    assert frechet_distance(a, a[::-1]) == pytest.approx(0, abs=1e-12)


def test_features_that_are_all_one_vector():
    """Both covariances are 0, and so is every root."""
    assert frechet_distance(np.ones((4, 3)), np.zeros((5, 3))) == 3


def test_it_is_symmetric_and_a_shift_adds_its_square():
    a, b = features(0, 100, 16), features(1, 100, 16)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    shifted = a + np.full((1, 16), 0.5)
    assert frechet_distance(a, shifted) == pytest.approx(4, rel=1e-12)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(moments_module, "BLOCK", 8)


@pytest.mark.parametrize("split", [[50], [1, 49], [7, 8, 9, 26], [0, 25, 25], [1] * 50])
def test_moments_are_the_same_bits_however_the_rows_are_split(small_blocks, split):
    rows = features(0, 50, 5).astype(np.float32)
    whole, parts = moments([rows]), moments(np.split(rows, np.cumsum(split)[:-1]))
    np.testing.assert_array_equal(parts.mean, whole.mean)
    np.testing.assert_array_equal(parts.covariance, whole.covariance)
    assert parts.count == whole.count == 50


def test_moments_are_numpy_s(small_blocks):
    rows = features(0, 50, 5)
    found = moments([rows])
    np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(found.covariance, np.cov(rows, rowvar=False), rtol=1e-12, atol=1e-15)


def test_a_small_spread_beside_a_large_mean_is_kept(small_blocks):
    """Sums of squares of 1e6 +- 1e-3 in float64 keep no digit of the variance 1e-6."""
    rows = 1e6 + 1e-3 * np.random.default_rng(0).choice([-1.0, 1.0], (400, 1))
    np.testing.assert_allclose(moments([rows]).covariance, np.cov(rows, rowvar=False).reshape(1, 1), rtol=1e-6)


def test_float16_features_are_added_in_float64():
    rows = np.full((3000, 1), 100, np.float16)
    rows[::2] = 101
    found = moments([rows])
    assert (found.mean[0], found.covariance[0, 0]) == pytest.approx((100.5, 0.25 * 3000 / 2999), rel=1e-12)


@pytest.mark.parametrize(
    ("shards", "said"),
    [
        ([np.zeros((1, 3))], "1 rows; a covariance needs 2"),
        ([], "0 rows"),
        ([np.zeros(3)], r"shape \[3\]: must be a matrix \[rows, D\]"),
        ([np.zeros((2, 3)), np.zeros((2, 4))], r"shape \[2, 4\]: must be a matrix \[rows, 3\]"),
        ([np.zeros((2, 0))], r"shape \[2, 0\]"),
        ([np.zeros((2, 3)), np.array([[0.0, 1, 2], [0, np.nan, 2]])], r"features\[3, 1\] = nan: must be finite"),
        ([np.array([[0.0, np.inf], [0, 1]])], r"features\[0, 1\] = inf"),
        ([np.array([[0.0, 1], [-1e51, 1]])], r"features\[1, 0\] = -1e\+51: must be finite, at most 1e\+50"),
        ([np.zeros((2, 3), complex)], "dtype complex128: must be real"),
    ],
)
def test_features_without_moments_are_refused(shards, said):
    with pytest.raises(UserError, match=said):
        moments(shards)


def test_sets_of_two_networks_are_refused():
    with pytest.raises(UserError, match="3 and 4 dimensions"):
        frechet_distance(np.eye(3), np.eye(4))


def test_of_another_program_s_file_only_the_moments_are_read(tmp_path):
    """Reference batches of diffusion models hold gigabytes of images, and labels that only pickle could read."""
    mean, covariance = np.arange(3, dtype=">f4"), np.eye(3, dtype=np.float16)
    np.savez(tmp_path / "a.npz", arr_0=np.array([None, {}], object), mu=mean, sigma=covariance)
    read = read_moments(tmp_path / "a.npz")
    assert (read.mean.dtype, read.covariance.dtype) == (np.float64, np.float64)
    np.testing.assert_array_equal(read.mean, [0, 1, 2])
    np.testing.assert_array_equal(read.covariance, np.eye(3))


def test_moments_come_back_from_their_file(tmp_path):
    found = moments([features(0, 50, 5)])
    write_moments(tmp_path / "a.npz", found)
    read = read_moments(tmp_path / "a.npz")
    np.testing.assert_array_equal(read.mean, found.mean)
    np.testing.assert_array_equal(read.covariance, found.covariance)
    assert read.count == 50
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_a_file_of_pytorch_fid_says_no_count(tmp_path):
    rows = features(0, 50, 5)
    np.savez_compressed(tmp_path / "a.npz", mu=rows.mean(axis=0), sigma=np.cov(rows, rowvar=False))
    read = read_moments(tmp_path / "a.npz")
    assert read.count is None
    assert distance_of_moments(read, moments([rows])) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"mu": np.zeros(2)}, "sigma is missing; there is mu"),
        ({"mu": np.zeros(2), "sigma": np.eye(3)}, r"shapes \[2\] and \[3, 3\]"),
        ({"mu": np.array([np.nan, 0]), "sigma": np.eye(2)}, "must be finite"),
        ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, "mu has dtype <U1; it must be real"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0, 1]])}, "not symmetric"),
        ({"mu": np.zeros(2), "sigma": -np.eye(2)}, "a variance below 0"),
        ({"mu": np.zeros(2), "sigma": 1e200 * np.eye(2)}, r"must be finite, at most 1e\+50 and 1e\+100"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"shapes \[0\] and \[0, 0\]"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "count": np.array([5, 6])}, "count = .*: must be a whole number"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "count": np.nan}, "count = nan: must be a whole number"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "count": -5}, "count = -5: must be a whole number"),
    ],
)
def test_files_that_hold_no_moments_are_refused(tmp_path, arrays, said):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path))}/a.npz: .*{said}"):
        read_moments(tmp_path / "a.npz")


def damaged(kind):
    """The bytes of an .npy file, or of a compressed .npz file that is cut or changed."""
    buffer = io.BytesIO()
    if kind == "npy":
        np.save(buffer, np.zeros((3, 3)))
        return buffer.getvalue()
    np.savez_compressed(buffer, mu=np.arange(100.0), sigma=np.eye(100))
    data = bytearray(buffer.getvalue())
    data[60:80] = bytes(20)
    return bytes(data[:50] if kind == "cut" else data)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no archive", *map(damaged, ("npy", "cut", "changed"))])
def test_damaged_files_are_refused(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"a.npz is no npz file"):
        read_moments(tmp_path / "a.npz")
