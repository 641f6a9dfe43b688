"""The loss on fixed triples, of a network whose error is known at every time."""

import collections

import jax
import numpy as np
import pytest

from ecdit.data import DataError
from ecdit.data.prepared import open_prepared, prepare
from ecdit.evaluation.flow_loss import (
    BINS,
    batch_size,
    fixed_rows,
    losses_by_image,
    losses_by_time,
    make_loss_program,
)
from ecdit.partitioning import make_mesh
from tests.data.example import make_config, module
from tests.knowing import PIXEL, KnowingSystem
from tests.runs import tiny

COUNT = 6  # images, in batches of four


def computed(count, about, losses_of=losses_by_time, **changes):
    """The losses of `count` images by time, of a network that is wrong by 2 t, and what it was given."""
    experiment = tiny(mesh__data=1, **changes)
    system, mesh = KnowingSystem(experiment), make_mesh(experiment.mesh, jax.devices()[:1])
    program = make_loss_program(system, mesh, about, "train")
    rows = {
        "image": np.full((count, 32, 32, 3), PIXEL, np.uint8),
        "tokens": np.ones((count, experiment.data.caption_length), np.int32),
        "size_crop": np.arange(count * 4, dtype=np.float32).reshape(count, 4),
    }
    losses = losses_of(program, system.params(error=2.0), rows)
    return losses, system.taken()


@pytest.fixture(scope="module")
def found():
    return computed(COUNT, 4)


def test_the_loss_of_a_bin_is_the_mean_over_all_images(found):
    """Batches have 4 and 2 images; the two that fill up the second one are the first two again, and do not count."""
    losses, given = found
    assert len(given["time"]) == BINS * 8
    image = given["size_crop"][:, 0] / 4
    for bin_ in range(BINS):
        times = {}
        for i, time in zip(image, given["time"], strict=True):
            if bin_ <= time * BINS < bin_ + 1:
                times.setdefault(i, []).append(time)
        assert sorted(times) == list(range(COUNT)), "each image meets each bin"
        assert all(len(set(seen)) == 1 for seen in times.values()), "at one time"
        np.testing.assert_allclose(losses[bin_], np.mean([(2 * seen[0]) ** 2 for seen in times.values()]), rtol=1e-4)


def test_the_loss_does_not_depend_on_the_batch():
    """Of 24 images two or three meet a bin at once. Each image's losses are its own."""
    found = [computed(24, about, losses_by_image)[0] for about in (24, 5)]
    assert found[0].shape == (24, BINS)
    assert len(np.unique(found[0])) == 24 * BINS
    np.testing.assert_allclose(*found, rtol=1e-5)
    np.testing.assert_allclose(computed(24, 24)[0], found[0].mean(axis=0), rtol=1e-5)


def test_the_target_of_predicted_data_is_that_of_training(found):
    """Near the data the network's velocity is too small, and the target as well: its error stays 2 t."""
    predicted, given = computed(COUNT, 4, model__prediction="data")
    assert given["time"].min() < 0.04
    np.testing.assert_allclose(predicted, found[0], rtol=1e-4)


def test_images_of_a_batch_are_at_different_times(found):
    _, given = found
    batches = given["time"].reshape(-1, 4)
    assert (np.ptp(batches, axis=1) > 0.15).all()


def test_noise_differs_by_image_and_bin(found):
    _, given = found
    flat = given["latents"].reshape(len(given["latents"]), -1)
    assert len(np.unique(flat.round(5), axis=0)) == BINS * COUNT


def test_no_token_is_dropped(found):
    assert not found[1]["dropped"].any()


def test_rows_are_the_same_every_time_whole_and_with_their_captions(emoji_data):
    config = tiny(data__directory=str(emoji_data), data__caption_dropout=0.9, data__crop_padding=2).data
    prepared = open_prepared(config)
    rows, again = (fixed_rows(prepared, 12, "train") for _ in range(2))
    for name, values in rows.items():
        assert len(values) == 12
        np.testing.assert_array_equal(values, again[name])
    assert len(np.unique(rows["tokens"], axis=0)) == 12  # none is the empty caption, which several would be
    assert (rows["size_crop"][:, 2:] == 0).all()


@pytest.mark.parametrize("held_out", [0.0, 0.4])
def test_a_split_has_no_more_rows_than_records(held_out, tmp_path):
    task = "grey_parted" if held_out else "grey_whole"
    changes = {"module": module(tmp_path, task, "36"), "task": task, "prepare": {"held_out": held_out}}
    config = make_config(tmp_path / "data", **changes)
    prepared = prepare(config, say=lambda _: None)
    (part,) = prepared.stored
    if held_out:
        assert 0 < part.manifest.num_held_out < 36
        assert len(fixed_rows(prepared, 10_000)["tokens"]) == part.manifest.num_held_out
    else:
        with pytest.raises(DataError, match="no record in the split held_out"):
            fixed_rows(prepared, 10_000)


def test_parts_of_a_mixture_give_each_held_out_record_once(tmp_path):
    """Nine of ten rows would be of the small part, again and again; the empty one would end the run."""
    more = """
add_task("grey_large", Counted(300))
add_task("grey_tiny", Counted(1))
add_mixture("greys", [("grey_small", 0.9), ("grey_large", 0.05), ("grey_tiny", 0.05)])
"""
    where = module(tmp_path, "grey_small", "30", more)
    changes = {"prepare": {"held_out": 0.2}, "vocab_size": 400}
    config = make_config(tmp_path / "data", module=where, task="greys", **changes)
    prepared = prepare(config, say=lambda _: None)
    sizes = {part.component.task: part.manifest.num_held_out for part in prepared.stored}
    assert 0 == sizes["grey_tiny"] < sizes["grey_small"] < 10 < 50 < sizes["grey_large"]
    rows = fixed_rows(prepared, 40)
    counts = collections.Counter(tokens.tobytes() for tokens in rows["tokens"])
    assert sum(counts.values()) == 40
    assert max(counts.values()) == 2  # the captions of the small part's records are also in the large one
    fewer = fixed_rows(prepared, 6)
    for name, values in fewer.items():
        np.testing.assert_array_equal(values, rows[name][:6])
    assert len(fixed_rows(prepared, 10_000)["tokens"]) == sum(sizes.values())


@pytest.mark.parametrize(("group", "about", "expected"), [("image", 5, 6), ("image", 6, 6), ("64", 5, 8)])
def test_a_batch_has_whole_groups_on_each_device(group, about, expected):
    """Two devices; a group of 64 tokens is four images of 16, and of the 8 that are kept of each in training eight."""
    experiment = tiny(mesh__data=2, model__sampling_group=group)
    mesh, denoiser = make_mesh(experiment.mesh, jax.devices()[:2]), KnowingSystem(experiment).parts.denoiser
    assert batch_size(denoiser, mesh, about, "sample") == expected
