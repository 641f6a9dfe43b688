"""Compares AutoencoderKL with diffusers', at random weights."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from ecdit.pretrained.autoencoder_kl import AUTOENCODER_LAYOUT, AutoencoderConfig, AutoencoderKL, read_autoencoder
from ecdit.pretrained.config_json import WeightsError
from ecdit.pretrained.safetensors_folder import SafetensorsFolder
from tests.parity.networks import ORDER, draw, loaded, parameter_count, relative_error, report

TOLERANCE = 1e-4  # of the spread of the output
WIDTHS = (8, 16, 16, 16)
# Latent channels, scale, shift, convolutions around the latents.
KINDS = {
    "SD": (4, 0.18215, None, True),
    "SDXL": (4, 0.13025, None, True),
    "SD3": (16, 1.5305, 0.0609, False),
    "Flux": (16, 0.3611, 0.1159, False),
}


@pytest.fixture
def make_theirs(torch, diffusers):
    def make(kind):
        channels, scale, shift, quant = KINDS[kind]
        return draw(
            torch,
            diffusers.AutoencoderKL(
                block_out_channels=WIDTHS,
                layers_per_block=2 if kind == "SD" else 1,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                latent_channels=channels,
                norm_num_groups=4,
                scaling_factor=scale,
                shift_factor=shift,
                use_quant_conv=quant,
                use_post_quant_conv=quant,
            ),
        )

    return make


def channels_last(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 32, 32), (2, 24, 40), (3, 8, 56)], ids=ORDER)
def test_autoencoder(torch, make_theirs, tmp_path, kind, batch, height, width, record_property):
    theirs = make_theirs(kind)
    theirs.save_pretrained(tmp_path)
    rng = np.random.default_rng(height)
    images = rng.uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)
    _, scale, shift, _ = KINDS[kind]
    latents = rng.normal(size=(batch, height // 8, width // 8, KINDS[kind][0])).astype(np.float32)
    with torch.no_grad():
        posterior = theirs.encode(torch.tensor(images.transpose(0, 3, 1, 2))).latent_dist
        z = torch.tensor(latents.transpose(0, 3, 1, 2)) / scale + (shift or 0.0)
        decoded = channels_last(theirs.decode(z).sample)
    mean, log_variance = channels_last(posterior.mean), channels_last(posterior.logvar)

    ours = {}
    for kept in ("mode", "sample"):
        config = read_autoencoder(tmp_path, kept, "float32")
        ours[kept] = loaded(lambda rngs, c=config: AutoencoderKL(c, rngs), AUTOENCODER_LAYOUT, tmp_path)
    keys = jax.random.split(jax.random.key(0), batch)
    noise = np.stack([jax.random.normal(key, mean.shape[1:]) for key in keys])
    errors = {
        "mean": relative_error(ours["mode"].moments(images)[0], mean),
        "log variance": relative_error(ours["mode"].moments(images)[1], log_variance),
        "encode, mode": relative_error(ours["mode"].encode(images, keys), (mean - (shift or 0)) * scale),
        "encode, sample": relative_error(
            ours["sample"].encode(images, keys), (mean + np.exp(0.5 * log_variance) * noise - (shift or 0)) * scale
        ),
        "decode": relative_error(ours["mode"].decode(latents), decoded),
    }
    for name, error in errors.items():
        report(record_property, f"AutoencoderKL {kind}, {name}", f"{batch} x {height} x {width}", error)
    assert max(errors.values()) <= TOLERANCE, errors


def test_older_names_of_attention(make_theirs, tmp_path):
    from safetensors.torch import load_file, save_file

    make_theirs("SD").save_pretrained(tmp_path)
    config = read_autoencoder(tmp_path, "mode", "float32")
    images = np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    expected = loaded(lambda rngs: AutoencoderKL(config, rngs), AUTOENCODER_LAYOUT, tmp_path).moments(images)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for name, value in load_file(file).items():
        for new, old in older.items():
            name = name.replace(f".{new}.", f".{old}.")
        weights[name] = value
    assert any("proj_attn" in name for name in weights)
    save_file(weights, file)
    renamed = loaded(lambda rngs: AutoencoderKL(config, rngs), AUTOENCODER_LAYOUT, tmp_path).moments(images)
    np.testing.assert_array_equal(renamed[0], expected[0])


def test_parameter_count_of_the_published_size():
    config = AutoencoderConfig((128, 256, 512, 512), 2, 4, 32, True, 0.0, 0.18215, "mode", "float32")
    assert parameter_count(lambda rngs: AutoencoderKL(config, rngs)) == 83_653_863


def test_the_command_for_a_pickle_converts_it(torch, make_theirs, tmp_path):
    """The command of the error is run as it is printed."""
    theirs = make_theirs("SD")
    theirs.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"state_dict": theirs.state_dict(), "global_step": 3}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(WeightsError) as error:
        SafetensorsFolder(tmp_path)
    command = str(error.value).split("converts it:\n")[1]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", command], check=True, env=environment)
    config = read_autoencoder(tmp_path, "mode", "float32")
    ours = loaded(lambda rngs: AutoencoderKL(config, rngs), AUTOENCODER_LAYOUT, tmp_path)
    images = np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        mean = channels_last(theirs.encode(torch.tensor(images.transpose(0, 3, 1, 2))).latent_dist.mean)
    assert relative_error(ours.moments(images)[0], mean) <= TOLERANCE
