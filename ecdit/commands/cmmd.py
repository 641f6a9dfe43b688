"""`cmmd --features=A.npy --reference=B.npy` measures the CLIP maximum mean discrepancy of embeddings."""

from pathlib import Path

import numpy as np
from absl import flags

from ecdit.commands.feature_flags import define_feature_flags
from ecdit.errors import UserError
from ecdit.evaluation.feature_files import read_features
from ecdit.evaluation.json_lines import check_results, json_text, write_results
from ecdit.evaluation.kernel_distance import clip_discrepancy


def define_flags(values: flags.FlagValues) -> None:
    """Adds the flags of this evaluation."""
    define_feature_flags(values)


def run(values: flags.FlagValues) -> None:
    """Measures, prints and writes the result."""
    out = Path(values.json) if values.json else None
    check_results(out)
    sets = {name: read_features(getattr(values, name), f"--{name}") for name in ("features", "reference")}
    for name, found in sets.items():
        check_lengths(found, f"--{name}")
    result = {
        "cmmd": clip_discrepancy(*sets.values()),
        "extractor": values.extractor,
        "samples": len(sets["features"]),
        "reference_samples": len(sets["reference"]),
    }
    if out:
        write_results(out, json_text(result))
    print(f"CMMD {result['cmmd']:.6g}, {result['samples']} samples against {result['reference_samples']}")


def check_lengths(embeddings: np.ndarray, name: str) -> None:
    """Raises UserError unless all embeddings have length 1 to within 1e-2, for which the kernel's width is chosen."""
    lengths = np.linalg.norm(embeddings, axis=1)
    wrong = np.flatnonzero(np.abs(lengths - 1) > 1e-2)
    if len(wrong):
        raise UserError(
            f"{name}: row {wrong[0]} has length {lengths[wrong[0]]:.4g}; CLIP embeddings must have length 1"
        )
