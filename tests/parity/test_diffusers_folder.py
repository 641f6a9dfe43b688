"""Exports runs for PyTorch and samples them in processes that have no JAX, with the noise of our sampler."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from ecdit.config import to_dict
from ecdit.data.tokenizer import files_of
from ecdit.data.tokens import hash_files
from ecdit.diffusion.flow import sample_keys, sample_noise
from ecdit.encoders.autoencoder import to_bytes
from ecdit.runs.diffusers_folder import export_diffusers
from ecdit.runs.kept_tokenizer import keep_tokenizer, kept_files
from ecdit.runs.model_card import PROMPT, model_card
from ecdit.runs.trained_run import open_run
from ecdit.sampling.sampler import guided_velocity, solve
from ecdit.system import make_system
from tests.parity.networks import ORDER, report
from tests.parity.networks import draw as draw_weights
from tests.pretrained.folders import CLIP_JSON
from tests.pretrained.towers import CLIP_TOKENS, POSITIONS, write_clip, write_t5, write_vae
from tests.runs import keep_small_tokenizer, random_params, save_ema, tiny

TOLERANCE = 1e-3  # of the range of an image's values, [-1, 1]
PROMPTS = [PROMPT, "tiger", "the owl's moon &amp; cake"]
SAMPLING = {"sampling__num_steps": 3, "sampling__guidance__scale": 3.0}


def save_run(workdir, changes):
    """A workdir with random EMA weights, as training leaves it."""
    experiment = tiny(data__directory=str(workdir / "nowhere"), **SAMPLING | changes)
    if experiment.text.public:
        folders = [folder for folder in (experiment.data.tokenizer, experiment.data.second_tokenizer) if folder]
        sides = ("first/", "second/") if len(folders) > 1 else ("",)
        files = {}
        for folder, side in zip(folders, sides, strict=True):
            files |= {f"{side}{name}": path.read_bytes() for name, path in files_of(Path(folder)).items()}
        keep_tokenizer(files, workdir)
        vocabulary = hash_files(kept_files(workdir))
    else:
        vocabulary = keep_small_tokenizer(workdir)
    config = to_dict(experiment)
    (workdir / "config.json").write_text(json.dumps(config))
    ema = random_params(make_system(experiment.system))
    save_ema(workdir, ema, 7, config | {"weights": experiment.fingerprints()}, vocabulary=vocabulary)
    return workdir


def draw(run, noise, prompts=PROMPTS):
    """Our latents and images, float32, for the noise, by the run's own sampling."""
    sampling, tokenize = run.experiment.sampling, run.tokenize

    @jax.jit
    def sample(params, tokens, null_tokens, noise):
        model = run.system.bind(params)
        velocity = guided_velocity(model, sampling, model.text(tokens), model.text(null_tokens))
        latents, _ = solve(sampling, velocity, noise, jax.random.split(jax.random.key(0), len(noise)))
        return latents, model.autoencoder.decode(latents)

    params = jax.tree.map(np.asarray, run.params)  # on one device, by which three images divide
    return sample(params, tokenize(prompts), tokenize([""]), noise)


# As the fixture `torch` does: torchvision, which transformers imports, misses its operators beside PyTorch's CPU build.
SCRIPT_BEGINS = """
import torch
operators = torch.library.Library("torchvision", "FRAGMENT")
for operator in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, operator):
        operators.define(f"{operator}() -> Tensor")
"""
SCRIPT_ENDS = """
assert not any(name == "jax" or name.startswith(("jax.", "ecdit")) for name in sys.modules), "JAX was imported"
"""
BY_PIPELINE = """
import sys
import numpy as np, torch
from diffusers import DiffusionPipeline
{imports}
pipeline = DiffusionPipeline.from_pretrained(".", custom_pipeline="./pipeline.py", trust_remote_code=True{towers})
pipeline.set_progress_bar_config(disable=True)
networks = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
assert {{part.dtype for part in networks}} == {{torch.float32}}
noise = torch.tensor(np.load("../noise.npy")).permute(0, 3, 1, 2)
found = [pipeline({prompts!r}, latents=noise, output_type=kind).images for kind in ("latent", "np")]
np.savez("../found.npz", latents=found[0].permute(0, 2, 3, 1), images=found[1])
"""


# On some CPUs the images, of values from 0 to 1, differ by 1e-6 once PyTorch has moved the weights.
# Without an accelerator, too, the sequential one keeps weights on the device "meta" unless their module is at work.
OFFLOADED = """
import sys
import accelerate
import numpy as np, torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(".", custom_pipeline="./pipeline.py", trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)

def draw():
    return pipeline({prompts!r}, generator=torch.Generator().manual_seed(0), output_type="np").images

def offload_each_module():
    # As enable_sequential_cpu_offload, whose name "cpu:0" PyTorch takes for another device than "cpu".
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            accelerate.cpu_offload(module, torch.device("cpu"), offload_buffers=len(module._parameters) > 0)

expected = draw()
pipeline.enable_model_cpu_offload(device="cpu")
for _ in range(2):
    np.testing.assert_allclose(draw(), expected, rtol=0, atol=1e-5)
pipeline.remove_all_hooks()
pipeline._all_hooks = []
offload_each_module()
assert pipeline.transformer.device.type == "meta"
for _ in range(2):
    np.testing.assert_allclose(draw(), expected, rtol=0, atol=1e-5)
"""


def run_script(text, folder):
    """Runs a script in a folder, in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX", "XLA", "PYTHON"))}
    cache = {"HF_HOME": str(folder.parent / "huggingface"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT_BEGINS + text + SCRIPT_ENDS],
        cwd=folder,
        env=kept | cache,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def scripts(folder):
    """The scripts of the folder's README."""
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)


def export(tmp_path, changes, with_towers=False):
    """Exports a run; returns it opened to sample, the folder, the noise that the processes find, and our images."""
    return export_run(tmp_path, save_run(tmp_path / "run", changes), with_towers)


def export_run(tmp_path, workdir, with_towers=False, prompts=PROMPTS):
    run = open_run(workdir)
    folder = tmp_path / "exported"
    export_diffusers(run, folder, 100_000, model_card(run, workdir, "Tiny", with_towers), with_towers)
    noise = sample_noise(sample_keys(0, prompts, [0] * len(prompts)), run.system.config.latent_shape)
    np.save(tmp_path / "noise.npy", noise)
    return folder, *(np.asarray(x) for x in draw(run, noise, prompts))


def compare(record_property, name, found, expected, near_ties=0):
    """Counts images that differ: near-ties of top-k, which rounding decides, can change so many."""
    spread = np.ptp(expected)
    errors = np.abs(found - expected).reshape(len(expected), -1).max(1) / spread
    beyond = (errors > TOLERANCE).sum()
    report(record_property, name, f"{len(errors)} images, {beyond} beyond 1e-3", errors.max())
    assert beyond <= near_ties


def check_pipeline(record_property, name, folder, latents, images, imports="", towers="", prompts=PROMPTS, near_ties=0):
    run_script(BY_PIPELINE.format(imports=imports, towers=towers, prompts=prompts), folder)
    found = np.load(folder.parent / "found.npz")
    compare(record_property, f"export's latents, {name}", found["latents"], latents, near_ties)
    compare(record_property, f"export's images, {name}", found["images"], np.clip((images + 1) / 2, 0, 1), near_ties)


def test_the_script_of_the_readme(torch, diffusers, tmp_path):
    """Its noise is ours in place of what it draws; a value of 0 to 255 on the edge may be rounded to its neighbour."""
    folder, _, images = export(tmp_path, {})
    alone, by_pipeline = scripts(folder)
    assert len(alone.split("torch.set_grad_enabled(False)")[1].strip().splitlines()) <= 10
    alone = alone.replace(
        "torch.randn(1, 3, 32, 32)", "torch.tensor(numpy.load('../noise.npy')[:1]).permute(0, 3, 1, 2)"
    )
    run_script(f"import numpy\n{alone}", folder)
    found = np.asarray(Image.open(folder / "sample.png")).astype(int)
    expected = np.asarray(to_bytes(jnp.asarray(images)))[0]
    assert np.abs(found - expected).max() <= 1
    assert (found != expected).mean() < 0.01
    (folder / "sample.png").unlink()
    run_script(f"import sys\n{by_pipeline}", folder)
    with Image.open(folder / "sample.png") as image:
        assert image.size == (32, 32)


def test_a_trained_run(torch, diffusers, tmp_path, record_property):
    """Of the user's own, ECDIT_TRAINED_RUN: as many steps and as much guidance as it says. Emoji's names are captions.

    Trained routers have near-ties as random ones have not, so two of 24 images may differ; they are counted.
    """
    workdir = os.environ.get("ECDIT_TRAINED_RUN")
    if not workdir:
        pytest.skip("ECDIT_TRAINED_RUN names no run")
    names = "red heart, tiger, owl, hot dog, moon cake, fire engine, ship, umbrella, key, snowflake, rocket, pizza"
    prompts = [f"{beginning}{name}" for beginning in ("", "blue ") for name in names.split(", ")]
    exported = export_run(tmp_path, Path(workdir).absolute(), prompts=prompts)
    check_pipeline(record_property, "trained", *exported, prompts=prompts, near_ties=2)


def test_the_script_of_a_run_on_latents_alone(torch, diffusers, tmp_path):
    workdir = save_run(
        tmp_path / "run", {"autoencoder": "latents", "data__latent_channels": 3, "data__image_size": 256}
    )
    run, folder = open_run(workdir, draw=False), tmp_path / "exported"
    export_diffusers(run, folder, 10**9, model_card(run, workdir, "Tiny", False), False)
    (script,) = scripts(folder)
    run_script(f"import sys\n{script}assert latents.shape == (1, 3, 32, 32)\nassert latents.std() > 0\n", folder)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("token choice, Heun", {"model__ffn": "token_choice", "sampling__solver": "heun"}),
        (
            "dense, multistep, renormalised guidance in an interval, shifted times",
            {
                "model__ffn": "dense",
                "sampling__solver": "multistep",
                "sampling__guidance__mode": "renormalized",
                "sampling__guidance__interval_low": 0.5,
                "sampling__time_shift": 2.0,
            },
        ),
        ("expert choice among an image's two passes", {"model__sampling_group": "32"}),
    ],
)
def test_the_pipeline(torch, diffusers, tmp_path, name, changes, record_property):
    check_pipeline(record_property, name, *export(tmp_path, changes))


PUBLIC = {
    "text__frozen": True,
    "autoencoder": "vae",
    "vae__encode": "online",
    "model__latent_size": 8,
    "model__latent_channels": 4,
    "model__patch_size": 2,
    "data__image_size": 64,
}


def towers(clip, t5, vae):
    """The changes of a config with these folders, and a projected pooled state."""
    return PUBLIC | {
        "text__weights": str(clip),
        "text__second_weights": str(t5),
        "text__clip_states": "penultimate",
        "text__clip_projection": True,
        "data__tokenizer": str(clip),
        "data__second_tokenizer": str(t5),
        "vae__weights": str(vae),
    }


def test_a_pipeline_whose_weights_are_offloaded_draws_the_same(torch, diffusers, accelerate, tmp_path):
    """Of a run with all its own networks, and of one with two public text encoders and an autoencoder."""
    (tmp_path / "own").mkdir()
    run_script(OFFLOADED.format(prompts=PROMPTS), export(tmp_path / "own", {})[0])
    clip, t5, vae = write_clip(tmp_path / "clip"), write_t5(tmp_path / "t5"), write_vae(tmp_path / "vae")
    folder, *_ = export(tmp_path, towers(clip, t5, vae), with_towers=True)
    run_script(OFFLOADED.format(prompts=PROMPTS), folder)


def test_public_towers_in_the_folder(torch, diffusers, tmp_path, record_property):
    """CLIP's penultimate states with a projected pooled state, beside T5's, and an autoencoder."""
    clip, t5, vae = write_clip(tmp_path / "clip"), write_t5(tmp_path / "t5"), write_vae(tmp_path / "vae")
    folder, latents, images = export(tmp_path, towers(clip, t5, vae), with_towers=True)
    for moved in (clip, t5, vae):
        moved.rename(moved.with_name(f"{moved.name}_gone"))
    check_pipeline(record_property, "CLIP, T5 and autoencoder in the folder", folder, latents, images)


def passed_in(script):
    """The arguments by which a README's script passes the towers, and its imports."""
    towers = re.search(r"trust_remote_code=True(.*)\)\.to\(device\)", script)[1]
    return towers, "".join(line + "\n" for line in script.splitlines() if line.startswith("from "))


@pytest.mark.parametrize("with_towers", [True, False], ids=ORDER[:2])
def test_a_whole_clip_in_float16(torch, transformers, diffusers, tmp_path, with_towers, record_property):
    """As laion's: the text_config of a whole CLIP has another projection_dim, which is not that of the weights.

    transformers loads the files' dtype, in which the run did not compute.
    """
    clip, vae = write_clip(tmp_path / "clip"), write_vae(tmp_path / "vae")
    text = {name: value for name, value in CLIP_JSON.items() if name not in ("model_type", "projection_dim")}
    text |= {"vocab_size": CLIP_TOKENS, "max_position_embeddings": POSITIONS}
    config = transformers.CLIPConfig(
        text_config=text | {"projection_dim": 512},
        vision_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32},
        projection_dim=16,
    )
    (clip / "model.safetensors").unlink()
    variant = None if with_towers else "fp16"
    draw_weights(torch, transformers.CLIPModel(config)).half().save_pretrained(clip, variant=variant)
    changes = PUBLIC | {"text__weights": str(clip), "data__tokenizer": str(clip), "vae__weights": str(vae)}
    changes |= {"text__clip_states": "penultimate", "text__clip_projection": True}
    (vae / "model.safetensors").rename(vae / "diffusion_pytorch_model.safetensors")
    folder, latents, images = export(tmp_path, changes, with_towers)
    towers, imports = ("", "") if with_towers else passed_in(scripts(folder)[0])
    name = f"a whole CLIP in float16, {'in the folder' if with_towers else 'passed'}"
    check_pipeline(record_property, name, folder, latents, images, imports, towers)


IN_FLOAT16 = """
import sys
import numpy as np, torch
from diffusers import DiffusionPipeline
more = {"custom_pipeline": "./pipeline.py", "trust_remote_code": True, "torch_dtype": torch.float16}
pipeline = DiffusionPipeline.from_pretrained(".", **more)
assert pipeline.vae.dtype == pipeline.transformer.dtype == pipeline.text_encoder.dtype == torch.float16
assert np.isfinite(pipeline("tiger", output_type="np").images).all()
"""


def test_an_autoencoder_that_float16_has_no_room_for(torch, diffusers, tmp_path):
    """As SDXL's, whose config says force_upcast: in float16 its activations are infinite, and images black."""
    t5, vae = write_t5(tmp_path / "t5"), write_vae(tmp_path / "vae")
    weights, name = load_file(vae / "model.safetensors"), "decoder.conv_in.weight"
    large = weights[name] * (3e4 / np.abs(weights[name]).max())  # float16 ends at 65504
    save_file(weights | {name: large}, vae / "model.safetensors")
    changes = PUBLIC | {"text__weights": str(t5), "data__tokenizer": str(t5), "vae__weights": str(vae)}
    folder, _, images = export(tmp_path, changes, with_towers=True)
    assert np.isfinite(images).all()
    run_script(IN_FLOAT16, folder)


def test_public_towers_that_are_passed(torch, diffusers, tmp_path, record_property):
    t5, vae = write_t5(tmp_path / "t5"), write_vae(tmp_path / "vae")
    (vae / "model.safetensors").rename(vae / "diffusion_pytorch_model.safetensors")  # as downloads are named
    changes = PUBLIC | {"text__weights": str(t5), "data__tokenizer": str(t5), "vae__weights": str(vae)}
    folder, latents, images = export(tmp_path, changes)
    assert not (folder / "vae").exists()
    (script,) = scripts(folder)
    assert f'vae=AutoencoderKL.from_pretrained("{vae}")' in script
    towers, imports = passed_in(script)
    check_pipeline(record_property, "T5 and autoencoder passed", folder, latents, images, imports, towers)
    with pytest.raises(
        AssertionError, match=r"this folder has no text_encoder: pass text_encoder=transformers\.T5Encoder"
    ):
        run_script(BY_PIPELINE.format(imports="", towers="", prompts=PROMPTS), folder)
