"""How the parameters of a network are named and laid out in files."""

import dataclasses
import re
from collections.abc import Sequence

# The axes of a tensor in the order of the parameter's: files hold matrices as [out, in] and convolutions as [out, in,
# height, width].
TRANSPOSED = {2: (1, 0), 4: (2, 3, 1, 0)}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Names of tensors, by regular expressions of `re.sub`, applied one after the other."""

    # From a parameter's dotted path to the tensor's name, in which "{layer}" stands for the number of a stacked layer.
    # Before them the last part of the path, `kernel` or `scale`, becomes `weight`.
    names: tuple[tuple[str, str], ...]
    # From names that other versions of the libraries have written to the present ones.
    renamed: tuple[tuple[str, str], ...]
    unused: tuple[str, ...]  # tensors that may be in a folder and are not this network's

    def tensor_name(self, path: Sequence[object]) -> str:
        """Returns the name of a parameter's tensor; of one that is stacked, with "{layer}" in it."""
        name = re.sub(r"\.(kernel|scale)$", ".weight", ".".join(map(str, path)))
        for pattern, replacement in self.names:
            name = re.sub(pattern, replacement, name)
        return name

    def present_name(self, name: str) -> str:
        """Returns the present name of a tensor in a file."""
        for pattern, replacement in self.renamed:
            name = re.sub(pattern, replacement, name)
        return name

    def is_unused(self, name: str) -> bool:
        """Returns whether a tensor, by its present name, may be there without being a parameter."""
        return any(re.search(pattern, name) for pattern in self.unused)


def tensor_axes(path: Sequence[object], ndim: int) -> tuple[int, ...]:
    """Returns which axis of the tensor each axis of a parameter is, without that of stacked layers."""
    return TRANSPOSED[ndim] if path[-1] == "kernel" else tuple(range(ndim))
