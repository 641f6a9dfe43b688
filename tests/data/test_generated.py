"""Tests generated rows: they are the same on every host, and their captions are true."""

import dataclasses

import numpy as np
import pytest

from ecdit.config import ConfigError
from ecdit.data.generated import GENERATED
from ecdit.data.loader import make_loader
from ecdit.data.prepared import prepare, sample_captions, sample_targets
from tests.data.example import make_config
from tests.runs import config_file

PLAIN = {"flip_probability": 0.0, "crop_padding": 0, "caption_dropout": 0.0}
CONFIGS = {
    "shapes": make_config(task="shapes", **PLAIN),
    "shapes_textured": make_config(task="shapes_textured", **PLAIN),
    "random_latents": make_config(task="random_latents", image_size=64, latent_channels=5, **PLAIN),
}


@pytest.mark.parametrize("name", GENERATED)
def test_a_row_is_a_function_of_seed_split_and_row(name):
    source, config = GENERATED[name], CONFIGS[name]
    one = source.example(config, "train", 3, 10**9)
    again = source.example(config, "train", 3, 10**9)
    np.testing.assert_array_equal(one.content, again.content)
    assert one.captions == again.captions == source.captions(config, "train", 3, 10**9)
    for other in ((4, "train", 10**9), (3, "held_out", 10**9), (3, "train", 10**9 + 1)):
        seed, split, row = other
        assert (source.example(config, split, seed, row).content != one.content).any()
    assert source.captions(config, "held_out", 3, 7) == source.example(config, "held_out", 3, 7).captions


@pytest.mark.parametrize("name", GENERATED)
def test_the_fingerprint_follows_what_decides_the_rows(name):
    source, config = GENERATED[name], CONFIGS[name]
    assert source.fingerprint(config) == source.fingerprint(dataclasses.replace(config, caption_length=5))
    assert source.fingerprint(config) != source.fingerprint(dataclasses.replace(config, image_size=40))


def test_random_latents_are_moments_with_next_to_no_variance(tmp_path):
    config = dataclasses.replace(CONFIGS["random_latents"], directory=str(tmp_path))
    assert sample_targets(prepare(config, say=lambda _: None), 2) == [None, None]
    batch = next(make_loader(config, 0, 64, 0, range(64)))
    assert set(batch) == {"latents", "tokens", "size_crop"}
    assert (batch["latents"].shape, batch["latents"].dtype) == ((64, 8, 8, 10), np.float16)
    mean, log_variance = np.split(batch["latents"].astype(np.float64), 2, axis=-1)
    assert abs(mean.mean()) < 0.03  # 20 480 numbers
    assert abs(mean.std() - 1) < 0.02
    assert (log_variance == -30).all()
    np.testing.assert_array_equal(batch["size_crop"], [[64, 64, 0, 0]] * 64)


def test_the_shapes_config_cuts_no_caption(tmp_path):
    values = config_file("shapes").get_config()
    values.data.directory = str(tmp_path)
    from ecdit.experiment import make_experiment

    config = dataclasses.replace(make_experiment(values).data, caption_dropout=0.0)
    prepared = prepare(config, say=lambda _: None)
    captions = sample_captions(prepared, 500)
    assert captions[:2] == [GENERATED["shapes"].captions(config, "train", 0, row)["caption"] for row in (0, 1)]
    for row, target in enumerate(sample_targets(prepared, 2)):
        np.testing.assert_array_equal(target, GENERATED["shapes"].example(config, "train", 0, row).content)
    tokens = next(make_loader(config, 0, 500, 0, range(500)))["tokens"]
    assert (tokens[:, -1] == 0).all()  # padding follows the end of every caption


@pytest.mark.parametrize("key", ["flip_probability", "crop_padding"])
def test_shapes_are_not_augmented(key):
    config = dataclasses.replace(CONFIGS["shapes"], **{key: 1})
    with pytest.raises(ConfigError, match=rf"data\.{key} = 1: must be 0 with shapes"):
        GENERATED["shapes"].example(config, "train", 0, 0)


@pytest.mark.parametrize("change", [{"flip_probability": 0.5}, {"crop_padding": 1}, {"image_size": 60}])
def test_latents_are_not_augmented(change):
    with pytest.raises(ConfigError) as error:
        dataclasses.replace(CONFIGS["random_latents"], **change)
    assert {error.value.key: error.value.value} == change
