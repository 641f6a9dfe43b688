"""Maps a network's parameters to the names and axes of tensors in files."""

import dataclasses
import re
from collections.abc import Sequence

# The tensor's axis for each axis of a parameter, by its number of axes. Files hold matrices as [out, in] and
# convolutions as [out, in, height, width].
TRANSPOSED = {2: (1, 0), 4: (2, 3, 1, 0)}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Rules for the names of tensors: regular expressions for `re.sub`, applied in order."""

    # From a parameter's dotted path to the tensor's name, in which "{layer}" stands for the number of a stacked layer.
    # The last part of the path, `kernel` or `scale`, becomes `weight` before they apply.
    names: tuple[tuple[str, str], ...]
    # From names that other versions of the libraries write to the current names.
    renamed: tuple[tuple[str, str], ...]
    unused: tuple[str, ...]  # tensors in a folder that this network does not use

    def tensor_name(self, path: Sequence[object]) -> str:
        """Returns the name of a parameter's tensor, with "{layer}" in it if the parameter is stacked."""
        name = re.sub(r"\.(kernel|scale)$", ".weight", ".".join(map(str, path)))
        for pattern, replacement in self.names:
            name = re.sub(pattern, replacement, name)
        return name

    def present_name(self, name: str) -> str:
        """Returns the current name of a tensor in a file."""
        for pattern, replacement in self.renamed:
            name = re.sub(pattern, replacement, name)
        return name

    def is_unused(self, name: str) -> bool:
        """Returns whether a tensor, by its current name, may be in a file without being a parameter."""
        return any(re.search(pattern, name) for pattern in self.unused)


def tensor_axes(path: Sequence[object], ndim: int) -> tuple[int, ...]:
    """Returns the tensor's axis for each axis of a parameter, without the axis of stacked layers."""
    return TRANSPOSED[ndim] if path[-1] == "kernel" else tuple(range(ndim))
