import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from ecdit.partitioning import MeshConfig, make_mesh, param_shardings
from ecdit.pretrained.config_json import WeightsError
from ecdit.pretrained.safetensors_folder import SafetensorsFolder, variant_of, weight_files
from ecdit.pretrained.t5_encoder import T5Config, T5Encoder
from ecdit.pretrained.weights import fingerprint, load, load_folder
from launch.local import _free_port
from tests.pretrained.folders import NETWORKS, T5, T5_JSON, clip, t5, tensors, write_folder

CUBE = MeshConfig(slices=1, data=2, fsdp=2, expert=1, tensor=2)


class Counting:
    """Counts what is read of a folder: values, and the largest piece."""

    def __init__(self, tensors):
        self.inner, self.values, self.bytes, self.read_at = tensors, {}, [], []
        self.names, self.shape, self.dtype = self.inner.names, self.inner.shape, self.inner.dtype
        self.chunk = self.inner.chunk

    def read(self, name, index):
        piece = self.inner.read(name, index)
        self.values[name] = self.values.get(name, 0) + piece.size
        self.bytes.append(piece.nbytes)
        self.read_at.append((name, index))
        return piece


def folder_of(network, path, **kwargs):
    make, layout, config = NETWORKS[network]
    model = make()
    return model, layout, write_folder(path, tensors(model, layout), config, **kwargs)


def same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("files", [1, 3])
def test_what_is_written_is_read(network, files, tmp_path):
    model, layout, folder = folder_of(network, tmp_path, files=files)
    loaded = load_folder(model.abstract, layout, folder, mesh=None)
    same(loaded.params, model.params)
    assert loaded.not_numbers == {}


@pytest.mark.parametrize("network", NETWORKS)
def test_parameters_are_created_where_the_mesh_wants_them(network, tmp_path):
    model, layout, folder = folder_of(network, tmp_path)
    mesh = make_mesh(CUBE)
    params = load_folder(model.abstract, layout, folder, mesh).params
    same(params, model.params)
    shardings = param_shardings(model.abstract, mesh)
    assert jax.tree.all(jax.tree.map(lambda p, s: p.sharding.is_equivalent_to(s, p.ndim), params, shardings))
    if network == "t5":
        kernel = params["block"]["attention"]["q"]["kernel"]
        assert kernel.addressable_shards[0].data.shape == (3, 16, 8)


@pytest.mark.parametrize("network", NETWORKS)
def test_every_value_is_read_once_in_small_pieces(network, tmp_path, monkeypatch):
    """Also values that several devices hold."""
    monkeypatch.setattr("ecdit.pretrained.weights.PIECE_BYTES", 256)
    model, layout, folder = folder_of(network, tmp_path)
    counting = Counting(SafetensorsFolder(folder))
    same(load(model.abstract, layout, counting, make_mesh(CUBE)).params, model.params)
    assert counting.values == {name: value.size for name, value in tensors(model, layout).items()}
    longest_row = max(value[0].nbytes for value in tensors(model, layout).values())
    assert max(counting.bytes) <= max(256, longest_row)


PART = """
import sys

import jax

from ecdit.pretrained.safetensors_folder import SafetensorsFolder
from ecdit.pretrained.weights import load
from ecdit.partitioning import MeshConfig, make_mesh
from tests.pretrained.folders import NETWORKS
from tests.pretrained.test_weights import Counting

jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", num_processes=2, process_id=int(sys.argv[2]))
make, layout, _ = NETWORKS["t5"]
model, counting = make(), Counting(SafetensorsFolder(sys.argv[3]))
mesh = make_mesh(MeshConfig(slices=1, data=1, fsdp=2, expert=1, tensor=1))
load(model.abstract, layout, counting, mesh)
print("READ", counting.values["shared.weight"], counting.values["encoder.block.1.layer.1.DenseReluDense.wo.weight"])
"""


def test_a_host_reads_its_part_alone(tmp_path, cpu_env):
    """Two hosts of one device each, and matrices that are split over the width: each reads half of one."""
    _, _, folder = folder_of("t5", tmp_path)
    port = str(_free_port())
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PART, port, str(process), str(folder)],
            cwd=Path(__file__).parents[2], env=cpu_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for process in range(2)
    ]  # fmt: skip
    for child in children:
        out, error = child.communicate(timeout=120)
        assert child.returncode == 0, error
        assert f"READ {32 * 32 // 2} {32 * 64 // 2}" in out


MEMORY = """
import sys, threading, time
from pathlib import Path

from flax import nnx

from ecdit.partitioning import MeshConfig, make_mesh
from ecdit.pretrained.t5_encoder import T5_LAYOUT, T5Config, T5Encoder
from ecdit.pretrained.weights import load_folder
from tests.models.helpers import Model

peak, done = [0], threading.Event()

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

def abstract(config):
    with nnx.use_eager_sharding(False):
        return nnx.split(nnx.eval_shape(lambda: T5Encoder(config, 8, nnx.Rngs(0))), nnx.Param)[1]

mesh = make_mesh(MeshConfig(slices=1, data=1, fsdp=4, expert=1, tensor=2))
small, large = (T5Config(*eval(sizes)) for sizes in sys.argv[1:3])
load_folder(abstract(small), T5_LAYOUT, Path(sys.argv[3]), mesh)  # what is compiled and imported is not weights
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
params = load_folder(abstract(large), T5_LAYOUT, Path(sys.argv[4]), mesh).params
done.set()
thread.join()
print("PEAK", peak[0] - before)
"""


def test_memory_is_the_share_and_about_one_tensor(tmp_path, cpu_env):
    """Eight devices in one process, whose share is all; layers are stacked, and stored in another dtype."""
    sizes = [
        (32, 32, 64, 2, 4, 8, 8, 16, "relu", 1e-6, "bfloat16"),
        (24576, 2048, 4096, 4, 8, 64, 8, 16, "relu", 1e-6, "bfloat16"),
    ]
    folders, share, largest = [], 0, 0
    for number, fields in enumerate(sizes):
        with nnx.use_eager_sharding(False):
            abstract = nnx.state(nnx.eval_shape(lambda: T5Encoder(T5Config(*fields), 8, nnx.Rngs(0))), nnx.Param)  # noqa: B023
        weights = {}
        for path, leaf in jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(abstract))[0]:
            name, shape = NETWORKS["t5"][1].tensor_name([key.key for key in path]), leaf.shape
            layers = shape[0] if "{layer}" in name else 1
            shape = shape[1:] if "{layer}" in name else shape
            shape = shape[::-1] if path[-1].key == "kernel" else shape
            for layer in range(layers):
                weights[name.format(layer=layer)] = np.ones(shape, np.float16)
        folders.append(write_folder(tmp_path / str(number), weights, T5_JSON))
        share = sum(value.nbytes for value in weights.values())
        largest = max(value.nbytes for value in weights.values())
    child = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(repr, sizes), *map(str, folders)],
        cwd=Path(__file__).parents[2], env=cpu_env(8), capture_output=True, text=True,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    peak = int(child.stdout.split("PEAK ")[1])
    assert share <= peak <= share + 1.3 * largest, f"peak {peak / 2**20:.0f} MiB"


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_weights_are_converted_to_the_network_s_dtype(stored, tmp_path):
    model = t5(dataclasses.replace(T5, dtype="bfloat16"))
    weights = {name: value.astype(stored) for name, value in tensors(t5(), NETWORKS["t5"][1]).items()}
    params = load_folder(model.abstract, NETWORKS["t5"][1], write_folder(tmp_path, weights, T5_JSON), None).params
    assert params["shared"].dtype == jnp.bfloat16
    expected = weights["shared.weight"].astype(np.float32).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(params["shared"]), expected)


def test_a_shared_matrix_may_be_stored_under_both_names(tmp_path):
    model, layout, folder = folder_of("t5", tmp_path)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"encoder.embed_tokens.weight": weights["shared.weight"]}, folder / "model.safetensors")
    same(load_folder(model.abstract, layout, folder, None).params, model.params)
    weights["encoder.embed_tokens.weight"] = weights.pop("shared.weight")
    save_file(weights | {"decoder.final_layer_norm.weight": np.ones(3, np.float32)}, folder / "model.safetensors")
    same(load_folder(model.abstract, layout, folder, None).params, model.params)


def test_all_that_does_not_fit_is_listed_at_once(tmp_path):
    model, layout, folder = folder_of("t5", tmp_path)
    weights = load_file(folder / "model.safetensors")
    q = "encoder.block.1.layer.0.SelfAttention.q.weight"
    o = "encoder.block.2.layer.0.SelfAttention.o.weight"
    del weights["encoder.final_layer_norm.weight"]
    weights |= {"encoder.block.3.layer.0.layer_norm.weight": np.ones(32, np.float32), q: weights[q].T.copy()}
    save_file(weights | {o: weights[o].astype(np.int32)}, folder / "model.safetensors")
    with pytest.raises(WeightsError) as error:
        load_folder(model.abstract, layout, folder, None)
    message = str(error.value)
    assert "missing (1): encoder.final_layer_norm.weight" in message
    assert "unknown (1): encoder.block.3.layer.0.layer_norm.weight" in message
    assert f"misshapen (1): {q} (32, 16) instead of (16, 32)" in message
    assert f"not of 16, 32 or 64-bit floating-point numbers (1): {o} int32" in message


def test_weights_of_8_bits_are_named(tmp_path):
    """safetensors' NumPy writer cannot write them, so the header of a file is edited."""
    model, layout, folder = folder_of("t5", tmp_path)
    file, name = folder / "model.safetensors", "encoder.final_layer_norm.weight"
    save_file(load_file(file) | {name: np.ones(8, np.float32)}, file)
    plain = file.read_bytes()
    edited = plain.replace(b'{"dtype":"F32","shape":[8]', b'{"dtype":"F8_E4M3","shape":[32]')
    length = int.from_bytes(plain[:8], "little") + len(edited) - len(plain)  # of the header
    file.write_bytes(length.to_bytes(8, "little") + edited[8:])
    with pytest.raises(WeightsError, match=rf"floating-point numbers \(1\): {re.escape(name)} float8_e4m3fn"):
        load_folder(model.abstract, layout, folder, None)
    with pytest.raises(WeightsError, match=rf"{re.escape(name)} is stored as F8_E4M3: must be F16, BF16, F32 or F64"):
        fingerprint(folder)


def test_a_long_list_is_cut(tmp_path):
    _, _, folder = folder_of("t5", tmp_path)
    with pytest.raises(WeightsError, match=r"missing \(53\): .* and 43 more"):
        load_folder(clip().abstract, NETWORKS["clip"][1], folder, None)


def test_nans_are_warned_of_and_counted(tmp_path, caplog):
    model, layout, folder = folder_of("t5", tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = "encoder.block.1.layer.1.layer_norm.weight"
    weights["shared.weight"][3, :5] = weights[name][2] = np.nan
    weights[name][4] = -np.inf  # as float16 stores what it has no room for
    save_file(weights, folder / "model.safetensors")
    loaded = load_folder(model.abstract, layout, folder, make_mesh(CUBE))
    assert loaded.not_numbers == {"shared.weight": 5, name: 2}
    assert f"7 weights are NaN or infinite, in {name} (2), shared.weight (5)" in caplog.text
    assert np.isnan(np.asarray(loaded.params["shared"])).sum() == 5


@pytest.mark.parametrize("cut", [3, 100, -1])
def test_a_truncated_file_is_refused(cut, tmp_path):
    _, _, folder = folder_of("t5", tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(WeightsError, match=re.escape(f"{file} is no complete safetensors file")):
        SafetensorsFolder(folder)


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(WeightsError, match=r"model.safetensors is a pointer of Git LFS.*: run git lfs pull"):
        SafetensorsFolder(tmp_path)


def test_an_index_must_name_what_is_there(tmp_path):
    _, _, folder = folder_of("t5", tmp_path, files=3)
    index = folder / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"]
    second = folder / "model-00002-of-00003.safetensors"
    moved = next(name for name, file in files.items() if file == second.name)
    index.write_text(json.dumps({"weight_map": files | {moved: "model-00001-of-00003.safetensors"}}))
    with pytest.raises(WeightsError, match=f"model-00001-of-00003.safetensors does not hold {re.escape(moved)}"):
        SafetensorsFolder(folder)
    index.write_text(json.dumps({"weight_map": files | {moved: "../model.safetensors"}}))
    with pytest.raises(WeightsError, match=r"outside the folder: \.\./model.safetensors"):
        SafetensorsFolder(folder)
    index.write_text(json.dumps({"weight_map": files}))
    second.unlink()
    with pytest.raises(WeightsError, match=r"names files that do not exist: model-00002-of-00003\.safetensors"):
        SafetensorsFolder(folder)
    index.write_text("{")
    with pytest.raises(WeightsError, match="cannot be read as JSON"):
        SafetensorsFolder(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "v1.ckpt", "weights.pkl"])
def test_a_pickle_is_refused_with_the_command_that_converts_it(name, tmp_path):
    """The command is run in tests/parity; that nothing reads the file is seen by its being none."""
    (tmp_path / name).write_bytes(b"no pickle at all")
    with pytest.raises(WeightsError) as error:
        SafetensorsFolder(tmp_path)
    assert "weights_only=True" in str(error.value)
    assert str(tmp_path / name) in str(error.value)
    assert str(tmp_path / "model.safetensors") in str(error.value)


def test_folders_without_a_clear_choice_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="the folder does not exist"):
        SafetensorsFolder(tmp_path / "none")
    with pytest.raises(WeightsError, match=r"there are no \*.safetensors files"):
        SafetensorsFolder(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"w": np.ones(1, np.float32)}, tmp_path / name)
    with pytest.raises(WeightsError, match=r"several files and no index: a.safetensors, b.safetensors"):
        SafetensorsFolder(tmp_path)


def test_weights_under_several_names_are_refused(tmp_path):
    """transformers reads the file in preference to the index, and diffusers the index."""
    _, _, folder = folder_of("t5", tmp_path, files=3)
    for name in ("model.safetensors", "diffusion_pytorch_model.safetensors"):
        save_file({"w": np.ones(1, np.float32)}, folder / name)
        with pytest.raises(WeightsError, match=rf"several names: .*{re.escape(name)}.*\. Keep one of them"):
            SafetensorsFolder(folder)
        (folder / name).unlink()
    SafetensorsFolder(folder)


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_a_variant_s_index_counts_where_it_is_alone(stem, tmp_path):
    """transformers and diffusers write model.safetensors.index.fp16.json for variant="fp16"."""
    model, layout, folder = folder_of("t5", tmp_path, files=3)
    plain = folder / "model.safetensors.index.json"
    variant = plain.rename(folder / f"{stem}.safetensors.index.fp16.json")
    same(load_folder(model.abstract, layout, folder, None).params, model.params)
    assert variant_of(folder) == "fp16"
    other = folder / f"{stem}.safetensors.index.bf16.json"
    other.write_text(variant.read_text())
    with pytest.raises(WeightsError, match=rf"several variants: {other.name}, {variant.name}\. Keep the index of one"):
        SafetensorsFolder(folder)
    save_file(tensors(model, layout), folder / "model.safetensors")  # the default goes before variants
    assert weight_files(folder) == [folder / "model.safetensors"]
    assert variant_of(folder) == ""
    one = tmp_path / "one"
    one.mkdir()
    for name, expected in ((f"{stem}.bf16.safetensors", "bf16"), ("odd-name.safetensors", "")):
        save_file({"w": np.ones(1, np.float32)}, one / name)
        assert variant_of(one) == expected
        (one / name).unlink()


def test_a_fingerprint_is_of_values_and_config_however_they_are_split(tmp_path, monkeypatch):
    _, _, one = folder_of("t5", tmp_path / "one")
    _, _, three = folder_of("t5", tmp_path / "three", files=3)
    first = fingerprint(one)
    assert first == fingerprint(three)
    monkeypatch.setattr("ecdit.pretrained.weights.PIECE_BYTES", 64)
    assert first == fingerprint(one)
    weights = load_file(one / "model.safetensors")
    for name in weights:
        save_file(weights | {name: weights[name] + 1}, one / "model.safetensors")
        assert fingerprint(one) != first, name
    (three / "config.json").write_text(json.dumps(T5_JSON | {"num_heads": 2}))
    assert fingerprint(three) != first
