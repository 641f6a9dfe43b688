"""`precision-recall --images=A --reference=B --inception=FOLDER` measures precision and recall of features."""

from absl import flags

from ecdit.commands.feature_flags import both_features, define_feature_flags, feature_sets
from ecdit.evaluation.precision_recall import NEIGHBOURS, precision_recall
from ecdit.json_lines import json_text, result_paths, write_results


def define_flags(values: flags.FlagValues) -> None:
    """Adds the flags of this evaluation."""
    define_feature_flags(values)
    flags.DEFINE_integer("neighbours", NEIGHBOURS, "The neighbour to which a ball reaches.", 1, flag_values=values)


def run(values: flags.FlagValues) -> None:
    """Measures, prints and writes the result."""
    (out,) = result_paths(values, "json", inputs=["features", "reference"])
    named, said = feature_sets(values)
    sets = both_features(named)
    precision, recall = precision_recall(sets[0], sets[1], values.neighbours)
    result = {
        "precision": precision,
        "recall": recall,
        "neighbours": values.neighbours,
        **said,
        "samples": len(sets[0]),
        "reference_samples": len(sets[1]),
    }
    print(f"precision {precision:.4f}, recall {recall:.4f}, {values.neighbours} neighbours")
    if out:
        write_results(out, json_text(result))
