"""Tests the paper's config, made small, by the real commands: latents, bfloat16, groups of images, four devices."""

import json

import pytest

from ecdit.config import ConfigError
from ecdit.experiment import check_mesh, make_experiment
from ecdit.partitioning import abstract_mesh
from ecdit.planning.compiler import find_target
from tests.forking import run_forked
from tests.runs import ROOT, command, config_file, run

SMALL = {
    "model.width": 64,
    "model.depth": 4,
    "model.heads": 1,
    "model.kv_heads": 1,
    "model.latent_size": 8,
    "model.group": "64",  # eight masked images of eight tokens, as 1024 are of 128
    "text.frozen_random_ok": True,
    "text.vocab_size": 512,
    "text.width": 32,
    "text.layers": 1,
    "text.heads": 2,
    "data.image_size": 64,
    "data.vocab_size": 512,
    "data.num_threads": 1,
    "train.batch_size": 64,
    "train.log_every": 1,
    "sampling.batch_size": 8,
    "runtime.distributed": False,
    "runtime.compilation_cache": "",
}


def small_values(name, **changes):
    values = config_file("ec_dit").get_config(name)
    values.update_from_flattened_dict(SMALL | {key.replace("__", "."): value for key, value in changes.items()})
    return values


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("latents")


@pytest.mark.slow
def test_it_trains_on_latents_and_resumes_on_another_mesh(tmp_path, data, cpu_env):
    flags = [f"--config.{key}={value}" for key, value in {**SMALL, "data.directory": data}.items()]
    arguments = [f"--config={ROOT}/configs/ec_dit.py:XL-8E", f"--workdir={tmp_path}/run", *flags]
    first = run(command("train", *arguments, "--config.train.num_steps=3"), cpu_env(4))
    assert first.returncode == 0, first.stderr
    again = run(command("train", *arguments, "--config.train.num_steps=5", "--config.mesh.expert=2"), cpu_env(2))
    assert again.returncode == 0, again.stderr
    assert "resumed from step 3" in again.stdout
    assert "samples" not in again.stdout  # there is no autoencoder to draw them with
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(line["bad_steps"] == 0 and len(line["router_grad_norm"]) == 2 for line in lines)
    # Velocities of 0 against noise - latents, both of variance 1.
    assert lines[0]["flow_loss"] == pytest.approx(2, rel=0.05)
    refused = run_forked(
        command("sample", f"--workdir={tmp_path}/run", "--prompt=x", f"--out={tmp_path}/out"), cpu_env()
    )
    assert refused.returncode == 2
    assert "error: config.autoencoder = 'latents': the run has latents alone: it cannot draw images" in refused.stderr


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("data.latent_channels", {"data__latent_channels": 0}),
        ("data.latent_channels", {"model__latent_channels": 4}),
        ("train.images_every", {"train__images_every": 100}),
        ("data.image_size", {"data__image_size": 128}),
    ],
)
def test_latents_must_be_what_the_model_takes(key, changes):
    with pytest.raises(ConfigError) as error:
        make_experiment(small_values("XL-8E", **changes))
    assert error.value.key == key


@pytest.mark.parametrize("row", config_file("ec_dit_plans").PLANS, ids=lambda row: f"{row[0]}-{row[1]}")
def test_every_slice_of_the_table_runs_its_config(row):
    """Experts' halves are exchanged where two chips share an expert's matrices, and only there."""
    name, slice_name, *changes = row
    values = config_file("ec_dit").get_config(name)
    values.update_from_flattened_dict(changes[0] if changes else {})
    experiment = make_experiment(values)
    mesh = abstract_mesh(experiment.mesh, find_target(slice_name).num_devices)
    check_mesh(experiment, mesh)
    if experiment.model.ffn != "dense":
        assert (experiment.model.expert_products == "halves") == (mesh.shape["fsdp"] == 2)


@pytest.mark.parametrize(("devices", "fsdp"), [(64, 1), (256, 4)])
def test_on_another_slice_m_64e_says_what_to_set(devices, fsdp):
    values = config_file("ec_dit").get_config("M-64E")
    experiment = make_experiment(values)
    says = f'config.model.expert_products = .halves.: must be .*: "halves" needs mesh.fsdp = 2, not {fsdp}'
    with pytest.raises(ConfigError, match=says):
        check_mesh(experiment, abstract_mesh(experiment.mesh, devices))
    values.model.expert_products = "scattered"
    experiment = make_experiment(values)
    check_mesh(experiment, abstract_mesh(experiment.mesh, devices))
