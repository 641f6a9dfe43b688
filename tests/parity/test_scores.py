"""Compares the networks of scores: CLIP's images and captions with transformers', Inception with pytorch-fid's."""

import jax
import numpy as np
import pytest

from ecdit.pretrained.clip_text import CLIP_TEXT_LAYOUT, ClipText, read_clip_text
from ecdit.pretrained.clip_vision import (
    CLIP_VISION_LAYOUT,
    DEVIATION,
    MEAN,
    ClipVision,
    ClipVisionConfig,
    cosines,
    normalise,
    read_clip_vision,
)
from ecdit.pretrained.inception import INCEPTION_LAYOUT, Inception, InceptionConfig
from tests.parity.networks import ORDER, draw, loaded, parameter_count, relative_error, report

TOLERANCE = 1e-4  # of the spread of the output


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize(("batch", "size", "patch"), [(1, 32, 8), (3, 30, 7), (5, 45, 9)], ids=ORDER)
def test_clip_scores(torch, transformers, tmp_path, activation, batch, size, patch, record_property):
    text = {"vocab_size": 99, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
    vision = {"hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 5}
    config = transformers.CLIPConfig(
        text_config=text | {"num_attention_heads": 4, "hidden_act": activation, "eos_token_id": 2},
        vision_config=vision | {"image_size": size, "patch_size": patch, "hidden_act": activation},
        projection_dim=20,
    )
    theirs = draw(torch, transformers.CLIPModel(config))
    theirs.save_pretrained(tmp_path)
    rng = np.random.default_rng(size)
    images = rng.uniform(0, 1, (batch, size, size, 3)).astype(np.float32)
    tokens = rng.integers(1, 98, (batch, 13)).astype(np.int32)
    tokens[:, -1] = 98
    normalised = ((images - np.array(MEAN)) / np.array(DEVIATION)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.tensor(tokens, dtype=torch.int64),
            pixel_values=torch.tensor(normalised.transpose(0, 3, 1, 2)),
        )
        features = expected.vision_model_output.pooler_output  # projected, in transformers 5
        scores = expected.logits_per_image.diagonal() / theirs.logit_scale.exp()
    vision_config = read_clip_vision(tmp_path, "float32")
    text_config = read_clip_text(tmp_path, projection=True, states="last", dtype="float32")
    image_features = loaded(lambda rngs: ClipVision(vision_config, rngs), CLIP_VISION_LAYOUT, tmp_path)(
        normalise(images)
    )
    pooled = loaded(lambda rngs: ClipText(text_config, 13, rngs), CLIP_TEXT_LAYOUT, tmp_path)(tokens).pooled
    shape = f"{batch} x {size} x {size}, patches of {patch}"
    error = relative_error(image_features, features)
    report(record_property, f"CLIP image features, {activation}", shape, error)
    assert error <= TOLERANCE
    # A cosine spans [-1, 1] whatever the few pairs here give.
    error = np.abs(np.asarray(cosines(image_features, pooled)) - scores.numpy()).max() / 2
    report(record_property, f"CLIP score, {activation}", shape, error)
    assert error <= TOLERANCE


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 299, 299), (2, 75, 101), (3, 128, 96)], ids=ORDER)
def test_inception(torch, inception, batch, height, width, record_property):
    theirs, folder = inception
    images = np.random.default_rng(height).uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)
    features = []
    theirs.avgpool.register_forward_hook(lambda module, given, output: features.append(output.flatten(1)))
    with torch.no_grad():
        logits = theirs(torch.tensor(images.transpose(0, 3, 1, 2)))
    ours = loaded(lambda rngs: Inception(InceptionConfig(True, "float32"), rngs), INCEPTION_LAYOUT, folder)
    given = jax.jit(lambda network, images: network(images))(ours, images)
    for name, actual, expected in (("pool3", given[0], features[0]), ("logits", given[1], logits)):
        error = relative_error(actual, expected)
        report(record_property, f"Inception, {name}", f"{batch} x {height} x {width}", error)
        assert error <= TOLERANCE


def test_features_need_no_logits(inception):
    theirs, folder = inception
    count = sum(value.numel() for name, value in theirs.named_parameters())
    config = InceptionConfig(True, "float32")
    # The statistics of norms are no parameters of PyTorch's, but are of ours: two numbers a channel, as the scale and
    # the bias are.
    statistics = sum(value.numel() for name, value in theirs.state_dict().items() if "running" in name)
    assert parameter_count(lambda rngs: Inception(config, rngs)) == count + statistics
    without = loaded(lambda rngs: Inception(InceptionConfig(False, "float32"), rngs), INCEPTION_LAYOUT, folder)
    assert without.fc is None


def test_parameter_count_of_open_clip_s_largest():
    """ViT-bigG/14's image encoder has 1.84e9 parameters; by hand from its sizes."""
    width, mlp, layers, projected = 1664, 8192, 48, 1280
    config = ClipVisionConfig(224, 14, width, mlp, layers, 16, projected, "gelu", 1e-5, "bfloat16")
    block = 4 * (width * width + width) + 2 * width * mlp + mlp + width + 4 * width
    expected = layers * block + 14 * 14 * 3 * width + (16 * 16 + 1) * width + width + 4 * width + width * projected
    assert parameter_count(lambda rngs: ClipVision(config, rngs)) == expected
