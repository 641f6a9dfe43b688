"""Tests parameters and operations of the paper's family against the paper's table and numbers worked out by hand."""

import json

import pytest

from ecdit.config import ConfigError
from ecdit.encoders.vae_flops import VAE_PARAMS, vae_part
from ecdit.errors import UserError
from ecdit.experiment import make_experiment
from ecdit.planning.counts import count, report, table_params
from tests.runs import ROOT, base_install, command, config_file, run, tiny


def experiment(name, **changes):
    values = config_file("ec_dit").get_config(name)
    with values.unlocked():
        for key, value in changes.items():
            values.update_from_flattened_dict({key.replace("__", "."): value})
    return make_experiment(values)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("XL-dense", 1.47),
        ("XXL-dense", 2.35),
        ("3XL-dense", 4.50),
        ("M-dense", 8.03),
        ("XL-32E", 6.08),
        ("XXL-32E", 13.47),
        ("3XL-32E", 32.15),
        ("M-64E", 97.21),
    ],
)
def test_the_rule_behind_table_1_gives_its_totals_to_the_last_digit(name, billions):
    assert round(table_params(experiment(name).system) / 1e9, 2) == billions


def test_the_table_says_nothing_of_options_beyond_the_paper():
    with pytest.raises(ConfigError, match=r"config\.model\.num_shared_experts = 1: Table 1 has 0"):
        table_params(experiment("XL-8E", model__num_shared_experts=1).system)


@pytest.mark.parametrize(("name", "billions"), [("XL", 1.36), ("XXL", 2.12), ("3XL", 3.95), ("M", 6.90)])
def test_this_model_s_own_totals(name, billions):
    """About: the numbers were estimated without tables, biases and embeddings."""
    counts = count(experiment(f"{name}-dense"))
    assert counts.total_params / 1e9 == pytest.approx(billions, rel=4e-3)
    assert counts.activated_params == counts.denoiser_params
    assert counts.total_params == counts.denoiser_params + counts.text_params + 83_653_863


def test_the_largest_model():
    counts = count(experiment("M-64E"))
    assert counts.total_params / 1e9 == pytest.approx(96.3, abs=0.05)
    width, sparse_layers = 3072, 19
    experts = sparse_layers * 64 * 8 * width**2
    # Of 64 experts, a token meets two on average.
    assert counts.denoiser_params - counts.activated_params == experts * 62 // 64
    dense = count(experiment("M-64E", model__ffn="dense"))
    assert counts.denoiser_params == dense.denoiser_params + sparse_layers * (63 * 8 * width**2 + 64 * width)
    assert counts.text_params == 32 * (12 * 1280**2 + 13 * 1280) + (32128 + 128 + 2) * 1280


def test_parameters_of_a_tiny_model_by_hand():
    """Width 32, two pairs and two blocks, 4 experts; biases, tables and norms included."""
    counts = count(tiny())
    attention = 4 * 32**2 + 2 * 16
    cross, table, ffn = attention, 6 * 32, 2 * 32 * 128
    blocks = 6 * (attention + cross + table) + 4 * ffn + 2 * (32 * 4 + 4 * ffn)
    embeddings = (192 * 32 + 32) + (256 * 32 + 32) + (32 * 32 + 32) + (1024 * 32 + 32) + 3 * (32**2 + 32)
    modulation = 6 * (32**2 + 32) + 2 * (32**2 + 32)
    assert counts.denoiser_params == blocks + embeddings + modulation + 32 + (32 * 192 + 192)
    assert counts.denoiser_params - counts.activated_params == 2 * 4 * ffn // 2
    assert counts.vae_params == 0
    assert "vae" not in counts.flops_per_image
    assert counts.encoding_flops_per_image == 0


def test_token_choice_activates_two_experts():
    own, paper = (count(experiment(f"XL-16E{rule}")) for rule in ("-token_choice", ""))
    assert own.activated_params == paper.activated_params
    dropless = count(experiment("XL-16E-token_choice", model__token_choice_dropless=True))
    assert dropless.activated_params == own.activated_params
    assert own.denoiser_params == paper.denoiser_params


def test_the_autoencoder_by_its_published_shape():
    """83,653,863 parameters are published; one level's convolutions by hand, side by side with the whole."""
    assert VAE_PARAMS == 83_653_863
    first = 2 * 9 * 256**2 * (3 * 128 + 4 * 128**2)  # all at full size: into the first level, and its four
    whole = vae_part(256)
    assert 0.2 < first / whole.flops < 0.5
    assert whole.tokens == 32 * 32
    pixels = {side: side * side for side in (32, 64, 128, 256)}
    level_1 = 9 * 128 * 128 * pixels[128] + 9 * (128 * 256 + 3 * 256**2) * pixels[128] + 128 * 256 * pixels[128]
    level_2 = 9 * 256**2 * pixels[64] + 9 * (256 * 512 + 3 * 512**2) * pixels[64] + 256 * 512 * pixels[64]
    level_3 = 9 * 512**2 * pixels[32] + 4 * 9 * 512**2 * pixels[32]
    middle = (4 * 9 * 512**2 + 4 * 512**2) * pixels[32] + 2 * pixels[32] ** 2 * 512
    last = (9 * 512 * 8 + 8 * 8) * pixels[32]
    assert whole.flops == first + 2 * (level_1 + level_2 + level_3 + middle + last)


def test_every_name_of_the_family_is_an_experiment():
    names = config_file("ec_dit").names()
    assert len(names) == 4 + 16 + 16
    for name in names:
        built = experiment(name)
        assert built.model.head_dim == 64
        assert built.train.batch_size * built.model.num_kept == 512 * 1024
        assert (built.model.depth, built.model.extra_blocks) == (
            46 if name == "M-dense" else {"XL": 28, "XXL": 38, "3XL": 42, "M": 38}[name.split("-")[0]],
            2,
        )


@pytest.mark.parametrize("name", ["L-8E", "XL", "XL-9E", "XL-dense-token_choice", "XL-8E-dense"])
def test_other_names_are_refused(name):
    with pytest.raises(UserError, match=r"the argument must be XL\|XXL"):
        config_file("ec_dit").get_config(name)


def test_the_command_writes_what_it_counts(tmp_path, cpu_env):
    path = tmp_path / "plan.json"
    arguments = [f"--config={ROOT}/configs/ec_dit.py:XL-32E", f"--json={path}"]
    env = base_install(cpu_env(), tmp_path / "base_install")
    result = run(command("plan", *arguments), env)
    assert result.returncode == 0, result.stderr
    found, expected = json.loads(path.read_text()), count(experiment("XL-32E"))
    assert (found["total_params"], found["activated_params"]) == (expected.total_params, expected.activated_params)
    assert set(found["flops_per_image"]) == {
        *("self_attention", "cross_attention", "ffn", "experts", "router", "conditioning", "head"),
        "text_tower",
    }
    # Stored latents: the autoencoder has made them once, and no step runs it.
    assert found["encoding_flops_per_image"] == vae_part(256).flops
    (line,) = (line for line in result.stdout.splitlines() if "autoencoder takes" in line)
    assert line.endswith("once, when latents are stored; no step runs it.")
    assert found["flops_per_image"]["experts"]["tokens"] == 14 * 128 * 2
    first = (
        "data: random_latents (PLACEHOLDER, random numbers in place of latents); weights at step 0: random text tower"
    )
    printed, *lines = result.stdout.splitlines()
    assert (printed.startswith(first), lines) == (True, report(expected))
    result = run(command("plan", *arguments, "--table-parity"), env)
    assert json.loads(path.read_text())["total_params"] == table_params(experiment("XL-32E").system)
    assert "6.08 B" in result.stdout
