"""configs/public_towers.py, made small, through the real commands, on image files and folders with random weights."""

import csv
import json
import subprocess
import time

import jax
import numpy as np
import pytest
from PIL import Image

from ecdit.checkpoints import restore
from ecdit.errors import UserError
from ecdit.experiment import make_experiment
from ecdit.interop.weights import flat_names
from ecdit.partitioning import make_mesh
from ecdit.planning.counts import count
from ecdit.system import make_system
from tests.forking import run_forked
from tests.pretrained.towers import CAPTIONS, write_clip, write_t5, write_vae
from tests.runs import ROOT, TINY, command, config_file
from tests.runs import run as run_command

TASKS = """
from ecdit.data.sources.tables import Table
from ecdit.data.tasks import add_task

add_task("mine", Table("{table}", image="file", captions=("caption",)))
"""
STEPS = 20
SECONDS = 900  # that a command may take


def values(name, folders, **changes):
    """The config with folders of small towers in place of the large ones."""
    config = config_file("public_towers").get_config(name)
    text = folders["t5" if "t5" in name else "clip"]
    smaller = {"text.weights": str(text), "data.tokenizer": str(text), "data.caption_length": 12}
    smaller |= {"vae.weights": str(folders["vae"])}
    config.update_from_flattened_dict(smaller | {key.replace("__", "."): value for key, value in changes.items()})
    return config


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    pytest.importorskip("tokenizers", reason="needs the extra pretrained")
    place = tmp_path_factory.mktemp("weights")
    return {"clip": write_clip(place / "clip"), "t5": write_t5(place / "t5"), "vae": write_vae(place / "vae")}


@pytest.mark.parametrize("name", ["64px", "64px-t5", "64px-sdxl", "256px", "256px-t5-sdxl"])
def test_every_variant_is_an_experiment(name, folders):
    counts = count(make_experiment(values(name, folders)))
    side = int(name.partition("px")[0])
    assert counts.encoding_flops_per_image > 0
    assert counts.flops_per_image["head"]["tokens"] == 2 * {64: 64, 256: 256}[side]
    assert ("t5_encoder" if "t5" in name else "clip_text") in counts.flops_per_image


@pytest.mark.parametrize("name", ["32px", "64px-t6", "64px-t5-t5", ""])
def test_other_names_are_refused(name):
    with pytest.raises(UserError, match=r"the argument must be 64px\|256px\[-t5\]\[-sdxl\]"):
        config_file("public_towers").get_config(name)


@pytest.fixture(scope="module")
def flags(tmp_path_factory, folders):
    """The command line of a run on 48 image files."""
    place = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    with (place / "pairs.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "caption"])
        for n in range(48):
            Image.fromarray(rng.integers(0, 256, (70, 90, 3), np.uint8)).save(place / f"{n}.png")
            table.writerow([f"{n}.png", f"{CAPTIONS[n % len(CAPTIONS)]} {n}"])
    (place / "my_tasks.py").write_text(TASKS.format(table=place / "pairs.csv"))
    groups = ("model", "train", "sampling", "runtime")
    small = {key: value for key, value in TINY.items() if key.split(".")[0] in groups}
    changes = small | {
        "model.patch_size": 2,
        "text.weights": folders["clip"],
        "data.tokenizer": folders["clip"],
        "data.caption_length": 12,
        "vae.weights": folders["vae"],
        "data.module": place / "my_tasks.py",
        "data.directory": place / "data",
        "train.num_steps": STEPS,
        "checkpoint.every": 4,
        "checkpoint.keep": 10,
    }
    named = [f"--config.{key}={value}" for key, value in changes.items()]
    return [f"--config={ROOT}/configs/public_towers.py:64px", *named]


@pytest.fixture(scope="module")
def env(compilation_cache):
    from launch.local import cpu_environment

    return {**cpu_environment(1), "JAX_COMPILATION_CACHE_DIR": str(compilation_cache)}


def run(arguments, env):
    return run_command(arguments, env, SECONDS)


def forked(arguments, env):
    return run_forked(arguments, env, SECONDS)


@pytest.mark.slow
def test_latents_are_prepared_in_shares_once_records_and_tokens_are_there(flags, env, tmp_path):
    prepare = [*command("prepare", *flags), f"--config.data.directory={tmp_path}/data"]
    share = [*prepare, "--what=latents", "--share=0/1"]
    for arguments, code, said in (
        (share, 2, "is not prepared: run python -m ecdit.prepare"),
        ([*prepare, "--share=0/1"], 0, "its 1 parts are done, and 0 of all 1 are left"),
        (share, 2, "is not prepared: run python -m ecdit.prepare"),
        (prepare, 0, "--what=latents prepares the latents"),
        (share, 0, "column latents-sd-vae, share 0/1: 48 images in"),
        ([*prepare, "--what=latents"], 0, "column latents-sd-vae: is there"),
    ):
        ended = forked(arguments, env)
        assert ended.returncode == code, ended.stderr
        assert said in ended.stdout + ended.stderr


@pytest.mark.slow
def test_from_image_files_to_samples_through_a_kill(flags, env, tmp_path):
    refused = forked(command("train", *flags, f"--workdir={tmp_path}/early"), env)
    assert refused.returncode == 2
    assert "has no column latents-sd-vae: run python -m ecdit.prepare --config=... --what=latents" in refused.stderr
    first = forked(command("prepare", *flags), env)
    assert first.returncode == 0, first.stderr
    assert "--what=latents prepares the latents" in first.stdout
    made = run(command("prepare", *flags, "--what=latents", "--workers=2"), env)
    assert made.returncode == 0, made.stderr
    assert "column latents-sd-vae: 48 images in" in made.stdout

    whole = run(command("train", *flags, f"--workdir={tmp_path}/whole"), env)
    assert whole.returncode == 0, whole.stderr
    killed = tmp_path / "killed"
    process = subprocess.Popen(command("train", *flags, f"--workdir={killed}"), env=env, cwd=ROOT)
    deadline = time.monotonic() + SECONDS
    while not (killed / "checkpoints/8/meta").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -9  # it had not ended by itself
    again = run(command("train", *flags, f"--workdir={killed}"), env)
    assert again.returncode == 0, again.stderr
    assert "resumed from step" in again.stdout

    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(line["bad_steps"] == 0 for line in lines)
    experiment = make_experiment(json.loads((killed / "config.json").read_text()))
    system, mesh = make_system(experiment.system), make_mesh(experiment.mesh, jax.devices()[:1])
    both = [restore.restore_ema(workdir, system, mesh)[0] for workdir in (tmp_path / "whole", killed)]
    for (name, a), b in zip(flat_names(both[0]).items(), flat_names(both[1]).values(), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert both[0].keys() == {"denoiser"}  # nothing of the towers is in a checkpoint

    drawn = forked(command("sample", f"--workdir={killed}", "--prompt=a red heart", f"--out={tmp_path}/out"), env)
    assert drawn.returncode == 0, drawn.stderr
    assert np.asarray(Image.open(tmp_path / "out/00000.png")).shape == (64, 64, 3)
