"""Runs whose autoencoder is a public one, of a folder: prepared and online latents, counts, and what is refused."""

import dataclasses
import math
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from safetensors.numpy import load_file

from ecdit.components import total_flops
from ecdit.config import ConfigError
from ecdit.data import DataError
from ecdit.data.images import decode_stored
from ecdit.data.latents import LatentsColumn
from ecdit.data.loader import make_loader
from ecdit.data.manifest import task_directory
from ecdit.data.memory import PROCESS_BYTES
from ecdit.data.prepared import open_prepared, prepare, prepare_captions, prepare_column
from ecdit.data.record import Record
from ecdit.data.shares import Share
from ecdit.encoders.autoencoder import to_unit
from ecdit.encoders.vae_flops import VaeSizes, vae_params
from ecdit.evaluation.flow_loss import fixed_rows, losses_by_time, make_loss_program
from ecdit.partitioning import MeshConfig, make_mesh
from ecdit.planning.counts import count, report
from ecdit.system import make_system
from ecdit.training.optimizer import make_optimizer
from ecdit.training.state import abstract_state, state_shardings
from ecdit.training.step import abstract_batch, make_train_step
from tests.data.example import module, png
from tests.data.test_preparation import files
from tests.models.helpers import jit
from tests.pretrained.folders import NETWORKS, tensors, write_folder
from tests.pretrained.towers import write_vae
from tests.runs import random_params, tiny

QUIET = lambda _: None  # noqa: E731
SIDE, LATENT, CHANNELS = 32, 4, 4


def public(folder, data, encode="prepared", **changes):
    """A tiny experiment on the images of `data`, with the autoencoder of a folder."""
    prepared = encode == "prepared"
    named = {"autoencoder": "vae", "vae__weights": str(folder), "vae__encode": encode, "vae__dtype": "float32"}
    sizes = {"model__latent_size": LATENT, "model__latent_channels": CHANNELS, "model__patch_size": 2}
    reads = {"data__latent_channels": CHANNELS if prepared else 0, "data__latents": "small" if prepared else ""}
    return tiny(**{**named, **sizes, **reads, "data__image_size": SIDE, "data__vocab_size": 300, **data, **changes})


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae") / "vae")


@pytest.fixture(scope="module")
def data(tmp_path_factory, vae):
    """36 grey images in four parts, with their latents."""
    place = tmp_path_factory.mktemp("grey")
    named = {
        "data__module": module(place, "grey", "36"),
        "data__task": "grey",
        "data__directory": str(place / "data"),
    }
    experiment = public(vae, named)
    prepare_captions(experiment.data, 1, QUIET)
    with pytest.raises(DataError, match=r"has no column latents-small: run python -m ecdit\.prepare .* --what=latents"):
        open_prepared(experiment.data)
    said = []
    prepare_column(experiment.data, experiment.latents_column(), 1, said.append)
    assert "column latents-small: 36 images in " in said[-1]
    assert "images/s" in said[-1]
    prepare_column(experiment.data, experiment.latents_column(), 1, said.append)
    assert said[-1].endswith("column latents-small: is there")
    return named


def test_latents_in_shares_are_those_of_one_process(vae, data, tmp_path):
    """Batches lie within a shard, so it does not matter which process encodes it."""
    shutil.copytree(data["data__directory"], tmp_path / "data")
    experiment = public(vae, {**data, "data__directory": str(tmp_path / "data")})
    column = task_directory(experiment.data) / "columns/latents-small"
    shutil.rmtree(column)
    for index in (1, 0):
        prepare_column(experiment.data, experiment.latents_column(), 1, QUIET, share=Share(index, 2))
        assert not column.exists()
    prepare_column(experiment.data, experiment.latents_column(), 1, QUIET)
    alone = task_directory(public(vae, data).data) / "columns/latents-small"
    assert files(column) == files(alone)


def test_fewer_processes_run_where_their_weights_would_not_fit(vae, data, tmp_path, monkeypatch):
    shutil.copytree(data["data__directory"], tmp_path / "data")
    experiment = public(vae, {**data, "data__directory": str(tmp_path / "data")})
    column = experiment.latents_column()
    shutil.rmtree(task_directory(experiment.data) / "columns" / column.name)
    held = sum(values.nbytes for values in load_file(vae / "model.safetensors").values())
    assert column.process_bytes > PROCESS_BYTES + jax.local_device_count() * held  # and room to compute in
    monkeypatch.setattr("ecdit.data.columns.free_bytes", lambda: 2 * column.process_bytes - 1)
    monkeypatch.setattr("ecdit.data.columns.ProcessPoolExecutor", None)
    said = []
    prepare_column(experiment.data, column, 3, said.append)
    each, free = column.process_bytes / 1e9, (2 * column.process_bytes - 1) / 1e9
    assert said[0] == (
        f"latents-small: 1 of 3 processes: each takes about {each:.1f} GB, and {free:.1f} GB of memory are free"
    )
    assert "column latents-small: 36 images in " in said[1]


def first_batch(experiment):
    return next(make_loader(experiment.data, 0, 16, 0, range(16)))


@pytest.mark.parametrize("posterior", ["sample", "mode"])
def test_prepared_latents_are_those_of_online_encoding(vae, data, posterior):
    experiments = [public(vae, data, encode, vae__posterior=posterior) for encode in ("prepared", "online")]
    keys, encoded = jax.random.split(jax.random.key(1), 16), []
    for experiment in experiments:
        system, batch = make_system(experiment.system), first_batch(experiment)
        shapes = abstract_batch(experiment.system, 16, make_mesh(MeshConfig(1, -1, 1, 1, 1)))
        assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
            name: (x.shape, x.dtype) for name, x in shapes.items()
        }
        loaded = system.load(make_mesh(MeshConfig(1, -1, 1, 1, 1)))
        drawn = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), system.drawn(system.shapes()))
        content = batch["latents"].astype(np.float32) if "latents" in batch else to_unit(batch["image"])
        encode = jit(lambda params, content, system=system: system.bind(params).autoencoder.encode(content, keys))
        encoded.append(np.asarray(encode({**drawn, **loaded}, content)))
    prepared, online = encoded
    assert prepared.shape == (16, LATENT, LATENT, CHANNELS)
    assert online.std() > 0.01
    np.testing.assert_allclose(prepared, online, atol=2e-3 * np.ptp(online))
    if posterior == "sample":
        assert (np.abs(prepared - prepared.mean(axis=0)) > 1e-3).any()  # each image is drawn with its own key


def test_latents_of_other_weights_are_refused(vae, data, tmp_path):
    from ecdit.data.prepared import check_latents

    experiment = public(vae, data)
    check_latents(open_prepared(experiment.data), experiment.latents_column().made_by)
    other = public(write_vae(tmp_path / "other", seed=1), data)
    with pytest.raises(
        DataError, match="latents-small was made from other tokenizer or weights: their fingerprint is "
    ):
        check_latents(open_prepared(other.data), other.latents_column().made_by)
    with pytest.raises(DataError, match="latents-small was made from other tokenizer or weights"):
        prepare_column(other.data, other.latents_column(), 1, QUIET)


def test_what_does_not_fit_is_refused(vae, data, tmp_path):
    with pytest.raises(ConfigError, match=r"vae\.weights = '.*nowhere': there is no .*nowhere/config\.json"):
        public(tmp_path / "nowhere", data)
    with pytest.raises(ConfigError, match=r"model\.latent_channels = 8: the vae autoencoder has 4"):
        public(vae, data, model__latent_channels=8, data__latent_channels=8)
    with pytest.raises(ConfigError, match=r"data\.latent_channels = 4: the autoencoder vae needs images: 0"):
        public(vae, data, "online", data__latent_channels=4)
    with pytest.raises(ConfigError, match=r"data\.latents = '': must name the column"):
        public(vae, data, data__latents="")
    small, layout, values = NETWORKS["vae"]
    shrinks_by_4 = write_folder(tmp_path / "four", tensors(small(), layout), values)
    with pytest.raises(ConfigError, match=r"vae\.encode = 'prepared': must be online: .* by 4, prepared latents by 8"):
        public(shrinks_by_4, data, model__latent_size=8)
    public(shrinks_by_4, data, "online", model__latent_size=8)
    with pytest.raises(ConfigError, match=r"autoencoder = 'identity': must be \"vae\" for --what=latents"):
        tiny().latents_column()


def test_latents_must_be_finite_and_images_whole(vae, monkeypatch):
    column = LatentsColumn("small", vae, "float32", SIDE)
    size = np.full(2, SIDE, np.int32)
    wrong = Record("one", png(np.zeros((8, 8, 3), np.uint8)), size, size, {"caption": "a"})
    with pytest.raises(DataError, match=r"one: the image has the shape \(8, 8, 3\), not \(32, 32, 3\)"):
        list(column.values([wrong]))
    assert decode_stored(wrong.image).shape == (8, 8, 3)
    right = dataclasses.replace(wrong, image=png(np.zeros((SIDE, SIDE, 3), np.uint8)))
    nan = lambda *_: lambda images: np.full((len(images), LATENT, LATENT, 2 * CHANNELS), np.nan, np.float16)  # noqa: E731
    monkeypatch.setattr("ecdit.data.latents._encoder", nan)
    with pytest.raises(DataError, match=r"one: its latents are not finite as .* encodes it"):
        list(column.values([right]))


def products(jaxpr):
    """The FLOPs of every product and convolution in a jaxpr."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            yield 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
        if equation.primitive.name == "conv_general_dilated":
            yield 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(equation.invars[1].aval.shape[:3])
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)


def test_parameters_and_work_are_counted(vae, data):
    prepared, online = (public(vae, data, encode) for encode in ("prepared", "online"))
    system = make_system(online.system)
    images = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    traced = jax.make_jaxpr(lambda params, x: system.bind(params).autoencoder.moments(x))(system.shapes(), images)
    work = system.parts.autoencoder.flops(SIDE).flops
    assert work == sum(products(traced.jaxpr))
    with_vae, without = (make_system(one.system) for one in (online, prepared))
    # Frozen: forward once in a step that encodes, and never where latents are prepared.
    assert with_vae.training_flops() - without.training_flops() == work
    assert total_flops(with_vae.forward_flops("sample")) == total_flops(without.forward_flops("sample"))
    counts = {"prepared": count(prepared), "online": count(online)}
    assert counts["prepared"].vae_params == vae_params(VaeSizes((4, 8, 8, 8), 1, CHANNELS, True))
    assert (counts["prepared"].encoding_flops_per_image, counts["online"].encoding_flops_per_image) == (work, 0)
    assert "vae" in counts["online"].flops_per_image
    assert "vae" not in counts["prepared"].flops_per_image
    assert "no step runs it" in report(counts["prepared"])[-1]


def test_a_full_disk_leaves_no_column_and_the_same_command_goes_on(vae, data, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        shutil.copytree(task_directory(public(vae, data).data), disk / "grey")
        shutil.rmtree(disk / "grey/columns/latents-small")
        experiment = public(vae, {**data, "data__directory": str(disk)})
        with (disk / "filler").open("wb") as file:
            file.write(bytes(shutil.disk_usage(disk).free - 8192))
        with pytest.raises((DataError, OSError), match="No space left on device"):
            prepare_column(experiment.data, experiment.latents_column(), 1, QUIET)
        assert not (disk / "grey/columns/latents-small").exists()
        (disk / "filler").unlink()
        said = []
        prepare_column(experiment.data, experiment.latents_column(), 1, said.append)
        assert "column latents-small: 36 images in " in said[-1]
        assert prepare(experiment.data, say=QUIET).fingerprint == open_prepared(public(vae, data).data).fingerprint
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("encode", ["prepared", "online"])
def test_a_step_runs_the_encoder_only_where_it_is_online(vae, data, encode):
    """From shapes alone, as a plan does it; the weights are arguments either way, as the run's images are decoded."""
    experiment = public(vae, data, encode, mesh__fsdp=2)
    mesh, optimizer = make_mesh(experiment.mesh), make_optimizer(experiment.optimizer)
    system = make_system(experiment.system)
    state = abstract_state(system, optimizer, state_shardings(system, optimizer, mesh))
    step = make_train_step(experiment.step_config, system, mesh)
    with jax.set_mesh(mesh):
        text = step.lower(state, abstract_batch(experiment.system, 16, mesh)).as_text()
    assert ("stablehlo.convolution" in text) == (encode == "online")
    assert jax.tree.leaves(state.loaded["autoencoder"])
    assert "autoencoder" not in {**state.params, **state.frozen}


def test_the_loss_of_prepared_latents_is_that_of_online_encoding(vae, data):
    mesh = make_mesh(MeshConfig(1, -1, 1, 1, 1))
    found = []
    for encode in ("online", "prepared"):
        one = public(vae, data, encode)
        system = make_system(one.system)
        rows = fixed_rows(open_prepared(one.data), 8, "train")
        assert ("latents" in rows) == (encode == "prepared")
        params = {**system.drawn(random_params(system)), **system.load(mesh)}
        found.append(losses_by_time(make_loss_program(system, mesh, 8), params, rows))
    np.testing.assert_allclose(found[1], found[0], rtol=0.02)
