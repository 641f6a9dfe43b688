"""`cmmd --images=A --reference=B --clip=FOLDER` measures the CLIP maximum mean discrepancy of embeddings."""

import numpy as np
from absl import flags

from ecdit.commands.feature_flags import both_features, define_feature_flags, feature_sets
from ecdit.errors import UserError
from ecdit.evaluation.kernel_distance import clip_discrepancy
from ecdit.json_lines import json_text, result_paths, write_results


def define_flags(values: flags.FlagValues) -> None:
    """Adds the flags of this evaluation."""
    define_feature_flags(values, network="clip")


def run(values: flags.FlagValues) -> None:
    """Measures, prints and writes the result."""
    (out,) = result_paths(values, "json", inputs=["features", "reference"])
    named, said = feature_sets(values)
    generated, real = both_features(named)
    check_lengths(generated, named[0].name)
    check_lengths(real, named[1].name)
    result = {
        "cmmd": clip_discrepancy(generated, real),
        **said,
        "samples": len(generated),
        "reference_samples": len(real),
    }
    print(f"CMMD {result['cmmd']:.6g}, {result['samples']} samples against {result['reference_samples']}")
    if out:
        write_results(out, json_text(result))


def check_lengths(embeddings: np.ndarray, name: str) -> None:
    """Raises UserError unless all embeddings have length 1 to within 1e-2, for which the kernel's width is chosen."""
    lengths = np.linalg.norm(embeddings, axis=1)
    wrong = np.flatnonzero(np.abs(lengths - 1) > 1e-2)
    if len(wrong):
        raise UserError(
            f"{name}: row {wrong[0]} has length {lengths[wrong[0]]:.4g}; CLIP embeddings must have length 1"
        )
