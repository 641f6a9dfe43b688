"""Tests that processes load the same weights, though only the first one reads whole folders."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ecdit.pretrained.slice_sums import slice_sum
from ecdit.pretrained.weights import fingerprint
from launch.local import _free_port
from tests.pretrained.folders import T5_JSON
from tests.pretrained.test_weights import folder_of

PROCESS = """
import json, os, sys
from pathlib import Path

import jax
import numpy as np

from ecdit.errors import UserError
from ecdit.partitioning import MeshConfig, make_mesh
from ecdit.pretrained import agreement
from ecdit.pretrained.safetensors_folder import SafetensorsFolder
from tests.pretrained.folders import NETWORKS

port, number, root = sys.argv[1:4]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(number))
os.chdir(Path(root, number))  # of one name, folders of different contents
make, layout, _ = NETWORKS["t5"]
abstract, mesh = make().abstract, make_mesh(MeshConfig(slices=1, data=1, fsdp=2, expert=1, tensor=1))
read, inner = [0], SafetensorsFolder.read

def counting(self, name, index):
    piece = inner(self, name, index)
    read[0] += piece.size
    return piece

SafetensorsFolder.read = counting
results = {}
for name in sys.argv[4:]:
    read[0], folder = 0, Path(name)
    try:
        agreement.share_fingerprints([folder])
        params = agreement.load_agreed(abstract, layout, folder, mesh)
        total = sum(float(np.abs(x.addressable_data(0)).sum()) for x in jax.tree.leaves(params))
        results[name] = [agreement.fingerprint_once(folder), read[0], total]
    except UserError as error:
        results[name] = str(error)
print("RESULTS", json.dumps(results))
"""
NORM = "encoder.block.1.layer.1.layer_norm.weight"
WIDE = "encoder.block.1.layer.1.DenseReluDense.wo.weight"  # [32, 64]: each process holds half of the rows


@pytest.fixture(scope="module")
def processes(tmp_path_factory, cpu_env):
    """What two processes say of pairs of folders, by case; and the folders of the first one."""
    root = tmp_path_factory.mktemp("agreement")
    _, _, folder = folder_of("t5", root / "0/same")
    weights = load_file(folder / "model.safetensors")
    weights["decoder.final_layer_norm.weight"] = np.ones(32, np.float32)  # which an encoder does not read

    def case(name, config=None, **changed):
        for number in ("0", "1"):
            (root / number / name).mkdir(parents=True, exist_ok=True)
            save_file(weights | (changed if number == "1" else {}), root / number / name / "model.safetensors")
            (root / number / name / "config.json").write_text(json.dumps(T5_JSON))
        (root / "1" / name / "config.json").write_text(json.dumps(config or T5_JSON))

    def with_one_changed(name, row):
        values = weights[name].copy()
        values[row] = -values[row]
        return {name: values}

    case("same")
    case("replicated", **with_one_changed(NORM, 3))
    case("mine", **with_one_changed(WIDE, (31, 5)))
    case("decoder", **{"decoder.final_layer_norm.weight": np.zeros(32, np.float32)})
    case("half", **{WIDE: weights[WIDE].astype(np.float16)})
    case("config", T5_JSON | {"layer_norm_epsilon": 1e-5})
    case("missing")
    shutil.rmtree(root / "1/missing")
    names = ("same", "replicated", "mine", "decoder", "half", "config", "missing", "same")
    port = str(_free_port())
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, port, str(number), str(root), *names],
            cwd=Path(__file__).parents[2], env=cpu_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    said = []
    for child in children:
        out, error = child.communicate(timeout=120)
        assert child.returncode == 0, error
        said.append(json.loads(out.split("RESULTS ")[1]))
    return said, root / "0"


def test_only_the_first_process_reads_whole_folders(processes):
    """The others read half of each matrix, as these are split over the width, and all of the norms and the bias."""
    (first, second), folders = processes
    sizes = {name: value.size for name, value in load_file(folders / "same/model.safetensors").items()}
    whole = sum(sizes.values())
    replicated = sum(
        size for name, size in sizes.items() if "relative" in name or ("norm" in name and "decoder" not in name)
    )
    matrices = whole - replicated - sizes["decoder.final_layer_norm.weight"]
    share = matrices // 2 + replicated
    assert first["same"][1] - whole == second["same"][1] == share
    assert first["same"][0] == second["same"][0] == fingerprint(folders / "same")


def test_tensors_that_no_process_holds_may_differ(processes):
    (first, second), folders = processes
    assert first["decoder"][0] == second["decoder"][0] == fingerprint(folders / "decoder")


@pytest.mark.parametrize(("case", "tensor"), [("replicated", NORM), ("mine", WIDE)])
def test_a_process_that_has_read_other_weights_is_refused_by_all(case, tensor, processes):
    """One sign differs, in a tensor that each holds or in the half of one that only the second process holds."""
    said, folders = processes
    for one in said:
        head, *lines = one[case].split("\n  ")
        assert head.endswith(f"whose folder has the fingerprint {fingerprint(folders / case)[:12]}:")
        (line,) = lines
        assert line.startswith("process 1 (host ")
        assert line.endswith(f"): {tensor}")


def test_a_process_with_another_config_or_dtype_or_without_the_folder_is_refused_by_all(processes):
    (first, second), _ = processes
    for case in ("config", "half"):
        assert first[case] == second[case]
        assert f"the hosts have other public weights:\n  config or tensors of {case}: process 1" in first[case]
    assert (first["missing"], second["missing"]) == ("process 1 cannot", "missing: the folder does not exist")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_the_sum_of_a_tensor_is_that_of_its_slices_however_it_is_cut(dtype):
    values = np.random.default_rng(0).normal(size=(6, 5, 4)).astype(dtype)
    whole = slice_sum(values, (slice(0, 6), slice(0, 5), slice(0, 4)))
    for rows, columns, depth in ((2, 5, 4), (6, 3, 1), (4, 2, 3)):
        parts = [
            (slice(i, min(i + rows, 6)), slice(j, min(j + columns, 5)), slice(k, min(k + depth, 4)))
            for i in range(0, 6, rows)
            for j in range(0, 5, columns)
            for k in range(0, 4, depth)
        ]
        assert sum(slice_sum(values[part], part) for part in parts) % 2**64 == whole


def test_a_sum_changes_with_any_word_and_with_its_place():
    values, index = np.arange(1, 13, dtype=np.float32).reshape(3, 4), (slice(0, 3), slice(0, 4))
    whole = slice_sum(values, index)
    for place in np.ndindex(3, 4):
        changed = values.copy()
        changed[place] = -changed[place]
        assert slice_sum(changed, index) != whole
    for other in (values[::-1], values[:, ::-1], np.roll(values, 1), values[[1, 0, 2]]):
        assert slice_sum(other, index) != whole
    assert slice_sum(values, (slice(3, 6), slice(0, 4))) != whole
    assert slice_sum(np.float16(1).reshape(()), ()) == 0x3C00
