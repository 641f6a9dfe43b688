import re
import shutil

import numpy as np
import pytest
import tensorstore
from flax.serialization import msgpack_serialize

from ecdit.partitioning import MeshConfig, make_mesh
from ecdit.pretrained.config_json import WeightsError
from ecdit.pretrained.t5_encoder import T5_LAYOUT
from ecdit.pretrained.t5x_checkpoint import T5xCheckpoint
from ecdit.pretrained.weights import load
from tests.pretrained.folders import T5, t5, tensors
from tests.pretrained.test_weights import Counting, same

KERNELS = {"q": "attention.query", "k": "attention.key", "v": "attention.value", "o": "attention.out"}


def t5x_arrays(params):
    """T5X's names and axes, of the parameters of our network, which has T5X's axes but for the relative bias."""
    arrays = {
        "token_embedder.embedding": params["shared"],
        "encoder.encoder_norm.scale": params["final_layer_norm"]["scale"],
        "encoder.relpos_bias.rel_embedding": params["relative_attention_bias"].T,
        "decoder.decoder_norm.scale": np.ones(3, np.float32),
    }
    block = params["block"]
    for layer in range(3):
        at = f"encoder.layers_{layer}."
        arrays |= {f"{at}{name}.kernel": block["attention"][ours]["kernel"][layer] for ours, name in KERNELS.items()}
        arrays |= {f"{at}mlp.{name}.kernel": block["mlp"][name]["kernel"][layer] for name in ("wi_0", "wi_1", "wo")}
        arrays[f"{at}pre_attention_layer_norm.scale"] = block["attention_norm"]["scale"][layer]
        arrays[f"{at}pre_mlp_layer_norm.scale"] = block["mlp_norm"]["scale"][layer]
    return arrays


def write_checkpoint(folder, arrays):
    """Large arrays as folders of zarr, small ones inside the msgpack, as T5X writes them."""
    folder.mkdir()
    target = {}
    for name, value in arrays.items():
        *parents, last = name.split(".")
        group = target
        for parent in parents:
            group = group.setdefault(parent, {})
        if value.ndim == 1:
            group[last] = np.ascontiguousarray(value)
            continue
        place = f"target.{name}"
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder / place)}}
        spec |= {"metadata": {"chunks": [8] * value.ndim}, "dtype": "float32", "create": True}
        tensorstore.open(spec, shape=value.shape).result().write(value).result()
        group[last] = {"driver": "zarr", "dtype": "float32", "kvstore": {"driver": "file", "path": f"/their/{place}"}}
    tree = {"version": 3, "optimizer": {"target": target, "state": {"step": np.int32(7), "param_states": {}}}}
    (folder / "checkpoint").write_bytes(msgpack_serialize(tree))
    return folder


@pytest.mark.parametrize("mesh", [None, MeshConfig(slices=1, data=2, fsdp=2, expert=1, tensor=2)])
def test_a_checkpoint_of_t5x_is_read(mesh, tmp_path):
    model = t5()
    checkpoint = T5xCheckpoint(write_checkpoint(tmp_path / "checkpoint_7", t5x_arrays(model.params)))
    assert checkpoint.config("float32", max_distance=16) == T5
    loaded = load(model.abstract, T5_LAYOUT, checkpoint, mesh and make_mesh(mesh))
    same(loaded.params, model.params)


@pytest.mark.parametrize("mesh", [None, MeshConfig(slices=1, data=2, fsdp=2, expert=1, tensor=2)])
def test_every_chunk_is_read_once_and_few_at_a_time(mesh, tmp_path, monkeypatch):
    """zarr reads whole chunks, here of 8 x 8, and a piece has room for four."""
    monkeypatch.setattr("ecdit.pretrained.weights.PIECE_BYTES", 4 * 4 * 8 * 8)
    model = t5()
    counting = Counting(T5xCheckpoint(write_checkpoint(tmp_path / "checkpoint_7", t5x_arrays(model.params))))
    same(load(model.abstract, T5_LAYOUT, counting, mesh and make_mesh(mesh)).params, model.params)
    # Two devices share the one chunk of the relative bias.
    matrices = [one for one in counting.read_at if len(one[1]) == 2 and "relative" not in one[0]]
    assert all(part.start % 8 == 0 for _, index in matrices for part in index)
    assert counting.values == {name: value.size for name, value in tensors(model, T5_LAYOUT).items()}
    assert max(counting.bytes) == 4 * 4 * 8 * 8


def test_what_is_missing_is_named(tmp_path):
    arrays = t5x_arrays(t5().params)
    del arrays["encoder.layers_1.mlp.wo.kernel"]
    folder = write_checkpoint(tmp_path / "checkpoint_7", arrays)
    with pytest.raises(WeightsError, match=r"missing \(1\): encoder.block.1.layer.1.DenseReluDense.wo.weight"):
        load(t5().abstract, T5_LAYOUT, T5xCheckpoint(folder), None)
    shutil.rmtree(folder / "target.token_embedder.embedding")
    with pytest.raises(WeightsError, match=r"the array of token_embedder.embedding cannot be read"):
        T5xCheckpoint(folder)


def test_another_model_s_checkpoint_is_refused(tmp_path):
    folder = write_checkpoint(
        tmp_path / "checkpoint_7", {"encoder.layers.attention.query.kernel": np.ones((3, 4, 4), np.float32)}
    )
    with pytest.raises(WeightsError, match=r"it lacks shared.weight, .*relative_attention_bias"):
        T5xCheckpoint(folder).config("float32")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    no_arrays = msgpack_serialize({"optimizer": {"target": 3}})
    for contents in (None, b"", b"\xc1 no msgpack", b"\x80", no_arrays):
        if contents is not None:
            (tmp_path / "checkpoint").write_bytes(contents)
        with pytest.raises(WeightsError, match=re.escape(f"{tmp_path / 'checkpoint'} is no checkpoint of T5X")):
            T5xCheckpoint(tmp_path)


@pytest.mark.parametrize("kvstore", [3, {"driver": "file"}])
def test_a_specification_without_a_path_is_refused(kvstore, tmp_path):
    tree = {"optimizer": {"target": {"weight": {"driver": "zarr", "kvstore": kvstore}}}}
    (tmp_path / "checkpoint").write_bytes(msgpack_serialize(tree))
    with pytest.raises(WeightsError, match="weight names no array"):
        T5xCheckpoint(tmp_path)
