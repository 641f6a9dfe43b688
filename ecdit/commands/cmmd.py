"""`cmmd --images=A --reference=B --clip=FOLDER` measures the CLIP maximum mean discrepancy of embeddings."""

from pathlib import Path

import numpy as np
from absl import flags

from ecdit.commands.feature_flags import define_feature_flags, feature_sets
from ecdit.errors import UserError
from ecdit.evaluation.kernel_distance import clip_discrepancy
from ecdit.json_lines import check_results, json_text, write_results


def define_flags(values: flags.FlagValues) -> None:
    """Adds the flags of this evaluation."""
    define_feature_flags(values, network="clip")


def run(values: flags.FlagValues) -> None:
    """Measures, prints and writes the result."""
    out = Path(values.json) if values.json else None
    check_results(out)
    named, said = feature_sets(values)
    generated, real = (each.features() for each in named)
    check_lengths(generated, named[0].name)
    check_lengths(real, named[1].name)
    result = {
        "cmmd": clip_discrepancy(generated, real),
        **said,
        "samples": len(generated),
        "reference_samples": len(real),
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
