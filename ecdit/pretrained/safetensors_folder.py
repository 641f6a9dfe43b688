"""Reads slices of tensors from a folder of safetensors files, as diffusers and transformers write it."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ecdit.pretrained.config_json import WeightsError, read_json

STEMS = ("model", "diffusion_pytorch_model")  # file names of transformers and of diffusers
LFS = b"version https://git-lfs"  # begins a file that `git clone` leaves without LFS
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES: Mapping[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,  # these two are not read, but named in errors
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
# Loading a pickle can run any code. PyTorch's restricted reader (weights_only) loads only tensors.
CONVERSION = """python - <<'EOF'
import torch
from safetensors.torch import save_file
weights = torch.load({source!r}, map_location="cpu", weights_only=True)
weights = weights.get("state_dict", weights)
save_file({{name: w.clone().contiguous() for name, w in weights.items() if hasattr(w, "shape")}}, {target!r})
EOF"""


class SafetensorsFolder:
    """Reads tensors by their names in the files. Construction reads only headers.

    Raises:
      WeightsError: there are no safetensors files, or one is missing, truncated or damaged (on construction).
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._files: dict[str, Any] = {}  # open file by tensor
        for path in weight_files(self.folder):
            file = _open(path)
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                if name in self._files:
                    raise WeightsError(f"{path}: the tensor {name} is also in another file of {self.folder}")
                self._files[name] = file

    def __str__(self) -> str:
        return str(self.folder)

    def names(self) -> list[str]:
        """Returns the names of all tensors, sorted."""
        return sorted(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype of a tensor, or object for an unknown dtype."""
        return np.dtype(DTYPES.get(self._files[name].get_slice(name).get_dtype(), object))

    def chunk(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a row."""
        shape = self.shape(name)
        return (1, *shape[1:]) if shape else ()

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Returns a slice of a tensor. Reads only its bytes.

        Raises:
          WeightsError: the tensor has numbers of 8 bits or fewer, which NumPy has not.
        """
        tensor = self._files[name].get_slice(name)
        if tensor.get_dtype().startswith(("F8", "F6", "F4")):
            raise WeightsError(f"{self}: {name} is stored as {tensor.get_dtype()}: must be F16, BF16, F32 or F64")
        return tensor[index]


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files in a folder: those that an index names, or the only one.

    Raises:
      WeightsError: there is no file, there are several without an index or beside it, or the index names a missing
        file.
    """
    if not folder.is_dir():
        raise WeightsError(f"{folder}: the folder does not exist")
    named = [f"{stem}.safetensors{ending}" for stem in STEMS for ending in ("", ".index.json")]
    several = [name for name in named if (folder / name).exists()]
    if len(several) > 1:  # of which diffusers and transformers do not read the same
        raise WeightsError(f"{folder} has weights under several names: {', '.join(several)}. Keep one of them")
    if (index := index_file(folder)) is not None:
        return list(_indexed(index))
    for stem in STEMS:
        if (folder / f"{stem}.safetensors").exists():
            return [folder / f"{stem}.safetensors"]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise WeightsError(f"{folder} has several files and no index: {names}. Keep one, named {STEMS[0]}.safetensors")
    if not found:
        raise WeightsError(_no_weights(folder))
    return found


def index_file(folder: Path) -> Path | None:
    """Returns the index of a folder's weights; None if they are in one file.

    A variant's index, such as model.safetensors.index.fp16.json, counts where it is alone.

    Raises:
      WeightsError: there are indexes of several variants.
    """
    for stem in STEMS:
        if (path := folder / f"{stem}.safetensors.index.json").exists():
            return path
    if any((folder / f"{stem}.safetensors").exists() for stem in STEMS):
        return None
    variants = sorted(path for stem in STEMS for path in folder.glob(f"{stem}.safetensors.index.*.json"))
    if len(variants) > 1:
        names = ", ".join(path.name for path in variants)
        raise WeightsError(f"{folder} has several variants: {names}. Keep the index of one")
    return variants[0] if variants else None


def variant_of(folder: Path) -> str:
    """Returns the variant, such as fp16, by which diffusers and transformers must ask for a folder's weights, or ""."""
    name = (index_file(folder) or weight_files(folder)[0]).name
    stems = "|".join(STEMS)
    found = re.fullmatch(rf"(?:{stems})\.(?:safetensors\.index\.(.+)\.json|(.+)\.safetensors)", name)
    return (found[1] or found[2]) if found else ""


def _no_weights(folder: Path) -> str:
    pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLES)
    if not pickles:
        return f"{folder}: there are no *.safetensors files"
    target = folder / f"{STEMS[0]}.safetensors"
    command = CONVERSION.format(source=str(pickles[0]), target=str(target))
    return (
        f"{folder} has weights only in {pickles[0].name}. It is a pickle, which can run any code, so it is not "
        f"loaded. With PyTorch and safetensors installed, this command converts it:\n{command}"
    )


def _indexed(path: Path) -> Iterator[Path]:
    """Yields the files that an index names."""
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise WeightsError(f"{path}: weight_map must be an object from tensors to file names")
    names = sorted(set(files.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise WeightsError(f"{path} names files outside the folder: {', '.join(outside)}")
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise WeightsError(f"{path} names files that do not exist: {', '.join(missing)}")
    for name in names:
        held = set(_open(path.parent / name).keys())
        absent = [tensor for tensor, file in files.items() if file == name and tensor not in held]
        if absent:
            raise WeightsError(f"{path}: {name} does not hold {', '.join(absent[:8])}")
        yield path.parent / name


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open  # here: a run without public weights needs none of it

    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        if _is_pointer(path):
            raise WeightsError(f"{path} is a pointer of Git LFS, not the file itself: run git lfs pull") from None
        raise WeightsError(f"{path} is no complete safetensors file: {error}") from None


def _is_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(LFS)) == LFS
    except OSError:
        return False
