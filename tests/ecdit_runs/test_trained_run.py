"""Tests runs opened for sampling: their config and overrides, and that only the EMA weights are read."""

import json
import re
import shutil
import sys

import jax
import numpy as np
import pytest

import ecdit
from ecdit.checkpoints import restore
from ecdit.checkpoints.arrays import FORMAT, DamagedError
from ecdit.checkpoints.compatibility import check_resume
from ecdit.checkpoints.restore import CheckpointError, Meta
from ecdit.config import ConfigError, changeable, flatten, to_dict
from ecdit.errors import UserError
from ecdit.partitioning import make_mesh
from ecdit.runs import trained_run
from ecdit.runs.trained_run import mesh_of_devices, open_run, prepare_to_open, saved_experiment
from ecdit.runs.training_run import train
from ecdit.system import make_system
from tests.checkpoints.damage import flip_array
from tests.runs import keep_small_tokenizer, run, save_ema, tiny

# Fields that alter how a model runs, or is sampled, not what it learns.
HOW = (
    "attention",
    "projections",
    "dispatch",
    "expert_products",
    "remat",
    "scan_unroll",
    "sampling_group",
    "packed_length",
    "packed_attention",
)
WHERE = ("weights", "second_weights", "frozen_random_ok")  # a folder's contents are compared, not its place
# What decides which numbers a run computes; all other keys say how, where and how long.
FIXED = {
    "seed",
    "denoiser",
    "autoencoder",
    *(f"model.{key}" for key in to_dict(tiny().model) if key not in HOW),
    *(f"text.{key}" for key in to_dict(tiny().text) if key not in (*HOW, *WHERE)),
    *(f"flow.{key}" for key in to_dict(tiny().flow)),
    *(f"optimizer.{key}" for key in to_dict(tiny().optimizer)),
    *("data.task", "data.image_size", "data.latent_channels", "data.caption_length", "data.vocab_size"),
    *(
        "data.module",
        "data.text_states",
        "data.latents",
        "data.captions.caption",
    ),
    *(f"data.prepare.{key}" for key in flatten(to_dict(tiny().data.prepare))),
    *("data.caption_dropout", "data.flip_probability", "data.crop_padding"),
    *("vae.encode", "vae.posterior", "vae.dtype"),
    *("train.batch_size", "train.ema_decay", "train.spike_factor"),
}


def meta_of(values):
    return Meta(FORMAT, values, 0, "data", {}, {}, "", {}, "")


def resume(saved, fingerprint):
    check_resume(saved, to_dict(tiny()), changeable(tiny(), "resume"), fingerprint, 7)


@pytest.mark.parametrize("key", sorted(flatten(to_dict(tiny())).keys() - {"phases"}))
def test_a_changed_key_refuses_to_resume_by_name_or_may_change(key):
    values = to_dict(tiny())
    *groups, name = key.split(".")
    group = values
    for part in groups:
        group = group[part]
    group[name] = "another value"
    if key not in FIXED:
        resume(meta_of(values), "data")
        return
    with pytest.raises(CheckpointError, match="another value") as error:
        resume(meta_of(values), "data")
    named = [line for line in str(error.value).splitlines() if "saved" in line]
    assert len(named) == 1
    assert named[0].startswith(f"  config.{key}: saved 'another value', now ")


def test_other_data_is_refused():
    with pytest.raises(CheckpointError, match="prepared data: saved fingerprint data, now other"):
        resume(meta_of(to_dict(tiny())), "other")


def test_a_key_that_this_version_added_or_removed_is_named():
    older, newer = to_dict(tiny()), to_dict(tiny())
    del older["model"]["width"]
    newer["model"]["depht"] = 3
    with pytest.raises(CheckpointError, match=r"config\.model\.width: saved None, now 32"):
        resume(meta_of(older), "data")
    with pytest.raises(CheckpointError, match=r"config\.model\.depht: saved 3, now None"):
        resume(meta_of(newer), "data")


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_dict(tiny())))
    return tmp_path


def test_overrides_take_json_and_keep_strings(workdir):
    overrides = [
        "model.sampling_group=128",
        "sampling.guidance.scale=1",
        "model.block_table=false",
        "autoencoder=identity",
    ]
    experiment = saved_experiment(workdir, overrides)
    assert experiment.model.sampling_group == "128"
    assert (experiment.sampling.guidance.scale, experiment.model.block_table) == (1.0, False)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("sampling.num_steps", "sampling.num_steps"),  # no value
        ("sampling.steps=3", "sampling.steps"),
        ("sampling.num_steps=many", "sampling.num_steps"),
        ("sampling.num_steps=2.5", "sampling.num_steps"),
        ("sampling.guidance=3", "sampling.guidance"),
        ("nothing.at.all=3", "nothing.at.all"),
        ("seed.x=3", "seed.x"),  # below a number
        ("model.block_table.x=3", "model.block_table.x"),
        ("autoencoder.identity=3", "autoencoder.identity"),  # below a string that contains it
    ],
)
def test_overrides_that_cannot_be_are_refused_by_their_key(workdir, override, key):
    with pytest.raises(ConfigError) as error:
        saved_experiment(workdir, [override])
    assert error.value.key == key


@pytest.mark.parametrize("text", [None, "", '{"seed": ', "3"])
def test_a_workdir_without_a_readable_config_is_no_run(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=str(tmp_path)):
        saved_experiment(tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(workdir, what its only item `state` holds): the EMA weights and nothing else of a TrainState."""
    workdir, system = tmp_path_factory.mktemp("ema_only"), make_system(tiny().system)
    rng = np.random.default_rng(0)
    (workdir / "config.json").write_text(json.dumps(to_dict(tiny())))
    shapes = jax.eval_shape(system.init, jax.random.key(0))
    ema = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes)
    save_ema(workdir, ema, step=7, vocabulary=keep_small_tokenizer(workdir))
    return workdir, ema


def test_only_ema_weights_are_read_and_each_is_where_the_mesh_wants_it(saved):
    workdir, ema = saved
    mesh = make_mesh(tiny(mesh__fsdp=2, mesh__expert=2, mesh__tensor=2).mesh)
    system = make_system(tiny().system)
    restored, step = restore.restore_ema(workdir, system, mesh)
    assert step == 7
    jax.tree.map(np.testing.assert_array_equal, restored, ema)
    assert jax.tree.map(lambda x: x.sharding, restored) == system.shardings(mesh)


def test_a_run_of_a_pod_opens_on_the_devices_that_are_here(saved, tmp_path):
    """Its mesh had 16 devices, joined by jax.distributed; here are eight in one process."""
    workdir, ema = shutil.copytree(saved[0], tmp_path / "run"), saved[1]
    sizes = {"mesh__data": 1, "mesh__fsdp": 4, "mesh__expert": 4, "mesh__tensor": 1, "sampling__batch_size": 16}
    (workdir / "config.json").write_text(json.dumps(to_dict(tiny(**sizes, runtime__distributed=True))))
    opened = open_run(workdir)
    assert dict(opened.mesh.shape) == {"slices": 1, "data": 1, "fsdp": 8, "expert": 1, "tensor": 1}
    jax.tree.map(np.testing.assert_array_equal, opened.params, ema)
    assert len(opened.checkpoint) == 64


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("join", [False, True])
def test_processes_join_where_they_are_told_to_however_the_run_was_trained(monkeypatch, trained, join):
    configured = []
    monkeypatch.setattr(trained_run.runtime, "configure", configured.append)
    prepare_to_open(tiny(runtime__distributed=trained), draw=True, join=join)
    assert [runtime.distributed for runtime in configured] == [join]


def test_a_run_keeps_its_mesh_where_it_fits_and_takes_another_where_it_does_not():
    fits = tiny(mesh__data=-1, mesh__expert=2, sampling__batch_size=16)
    assert mesh_of_devices(fits, make_system(fits.system), True).shape["data"] == 4
    odd = tiny(mesh__data=3, sampling__batch_size=3)
    with pytest.raises(ConfigError, match=r"config\.sampling\.batch_size = 3: must be a multiple of the 8 parts"):
        mesh_of_devices(odd, make_system(odd.system), True)
    assert mesh_of_devices(odd, make_system(odd.system), False).shape["fsdp"] == 8


def test_a_config_of_another_version_is_named_with_its_file_and_version(workdir):
    values = json.loads((workdir / "config.json").read_text())
    values["train"]["wandb"] = True
    (workdir / "config.json").write_text(json.dumps(values))
    (workdir / "overrides.json").write_text(json.dumps([{"step": 0, "versions": {"ecdit": "0.3.1"}}]))
    says = (
        f"{workdir}/config.json, which ecdit 0.3.1 wrote, is no config of ecdit {ecdit.__version__}: config.train.wandb"
    )
    with pytest.raises(CheckpointError, match=re.escape(says)):
        saved_experiment(workdir)
    (workdir / "overrides.json").unlink()
    with pytest.raises(CheckpointError, match=re.escape("which ecdit (unknown version) wrote")):
        saved_experiment(workdir)


def test_weights_of_a_step_that_is_named(saved, tmp_path):
    workdir, ema = shutil.copytree(saved[0], tmp_path / "run"), saved[1]
    mesh, system = make_mesh(tiny().mesh), make_system(tiny().system)
    save_ema(workdir, jax.tree.map(np.zeros_like, ema), step=9)
    restored, step = restore.restore_ema(workdir, system, mesh, 7)
    assert step == 7
    jax.tree.map(np.testing.assert_array_equal, restored, ema)
    assert restore.restore_ema(workdir, system, mesh)[1] == 9
    with pytest.raises(CheckpointError, match=f"{workdir}: no checkpoint of step 8; there are 7, 9$"):
        restore.restore_ema(workdir, system, mesh, 8)


OPEN = """
import sys
from pathlib import Path
from ecdit.checkpoints.restore import CheckpointError
from ecdit.runs.training_run import train
from ecdit.runs.trained_run import open_run
try:
    open_run(Path(sys.argv[1]))
except CheckpointError as error:
    print(f"refused: {error}")
"""


def cut_largest_array(state):
    largest = max(state.rglob("*/d/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])


@pytest.mark.parametrize(
    "damage",
    [cut_largest_array, lambda state: (state / "_METADATA").write_text("{"), shutil.rmtree],
    ids=["array", "metadata", "item"],
)
def test_a_damaged_checkpoint_is_refused_by_name(saved, tmp_path, cpu_env, damage):
    """In a process of its own: what the reading library leaves running would fail other tests."""
    shutil.copytree(saved[0], tmp_path / "run")
    damage(tmp_path / "run/checkpoints/7/state")
    opened = run([sys.executable, "-c", OPEN, str(tmp_path / "run")], cpu_env())
    assert f"refused: {tmp_path}/run/checkpoints/7" in opened.stdout, opened.stderr[-2000:]


ENDS = ["denoiser.caption.hidden.bias", "denoiser.pairs.even.experts.up", "text.tokens"]  # the first and last array


@pytest.mark.parametrize("frozen", [(), ("text",)])
def test_a_flipped_bit_of_any_weight_is_noticed(saved, tmp_path, frozen):
    """Of those that the run has trained, and of those that it has frozen."""
    parts = {"ema": {}, "frozen": {}}
    for name, part in saved[1].items():
        parts["frozen" if name in frozen else "ema"][name] = part
    save_ema(tmp_path, parts["ema"], step=7, frozen=parts["frozen"])
    mesh, system = make_mesh(tiny().mesh), make_system(tiny().system)
    for name in ENDS:
        group = "frozen" if name.split(".")[0] in frozen else "ema"
        flip_array(tmp_path / "checkpoints/7", f"{group}.{name}")
        path = f"{group}/{name.replace('.', '/')}"
        with pytest.raises(DamagedError, match=rf"^{tmp_path}/checkpoints/7 is damaged: {path}: not what was saved$"):
            restore.restore_ema(tmp_path, system, mesh)
        flip_array(tmp_path / "checkpoints/7", f"{group}.{name}")
    jax.tree.map(np.testing.assert_array_equal, restore.restore_ema(tmp_path, system, mesh)[0], saved[1])


def test_damaged_weights_are_neither_sampled_from_nor_trained_on(saved, tmp_path, emoji_data):
    """Sampling and evaluation open a run; a new run may start from another one's weights."""
    workdir = shutil.copytree(saved[0], tmp_path / "damaged")
    flip_array(workdir / "checkpoints/7", "ema.denoiser.head.kernel")
    with pytest.raises(DamagedError, match="ema/denoiser/head/kernel: not what was saved"):
        open_run(workdir)
    with pytest.raises(DamagedError, match="ema/denoiser/head/kernel: not what was saved"):
        train(tiny(data__directory=str(emoji_data), checkpoint__init_from=str(workdir)), tmp_path / "run")
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_weights_that_mean_something_else_are_not_trained_on(saved, tmp_path, emoji_data):
    """All names and shapes fit. (The source's vocabulary is not on record here, so it differs too.)"""
    other = to_dict(tiny(model__rope_theta=50.0)) | {"files": {}}
    save_ema(tmp_path / "source", saved[1], step=7, config=other)
    experiment = tiny(data__directory=str(emoji_data), checkpoint__init_from=str(tmp_path / "source"))
    with pytest.raises(CheckpointError) as error:
        train(experiment, tmp_path / "run")
    first, theta, vocabulary, last = str(error.value).splitlines()
    assert first.startswith("checkpoint.init_from names a run whose weights mean something else")
    assert theta == "  config.model.rope_theta: there 50.0, here 10000.0"
    assert vocabulary.startswith("  vocabulary: there , here ")
    assert "--accept_init_differences" in last
    assert not list((tmp_path / "run/checkpoints").iterdir())


@pytest.mark.parametrize("damage", [lambda meta: (meta / "metadata").write_text("{"), shutil.rmtree])
def test_damaged_json_of_a_checkpoint_is_named(saved, tmp_path, damage):
    shutil.copytree(saved[0], tmp_path / "run")
    damage(tmp_path / "run/checkpoints/7/meta")
    with (
        restore.open_reader(tmp_path / "run") as manager,
        pytest.raises(CheckpointError, match=f"{tmp_path}/run/checkpoints.*7"),
    ):
        restore.read_meta(manager, 7)


def test_an_override_holds_in_every_phase(tmp_path):
    """A phase of the config may set the same key."""
    phases = ({"after": 2, "changes": {"sampling.batch_size": 4, "model.mask_ratio": 0.25}},)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(tiny(phases=phases))))
    kept, changed = (
        saved_experiment(tmp_path, some).phase_of(4).experiment for some in ((), ["sampling.batch_size=16"])
    )
    assert (kept.sampling.batch_size, changed.sampling.batch_size) == (4, 16)
    assert changed.model.mask_ratio == 0.25
