"""`kid --images=A --reference=B --inception=FOLDER` measures the kernel inception distance of features."""

from absl import flags

from ecdit.commands.feature_flags import both_features, define_feature_flags, feature_sets
from ecdit.errors import UserError
from ecdit.evaluation.kernel_distance import kernel_inception_distance
from ecdit.json_lines import json_text, result_paths, write_results


def define_flags(values: flags.FlagValues) -> None:
    """Adds the flags of this evaluation."""
    define_feature_flags(values)
    flags.DEFINE_integer("subsets", 100, "The number of random subsets.", 1, flag_values=values)
    flags.DEFINE_integer("subset_size", 1000, "The rows of each set in a subset.", 2, flag_values=values)
    flags.DEFINE_integer("seed", 0, "The seed that chooses the subsets.", 0, flag_values=values)


def run(values: flags.FlagValues) -> None:
    """Measures, prints and writes the result."""
    (out,) = result_paths(values, "json", inputs=["features", "reference"])
    named, said = feature_sets(values)
    for each in named:
        if each.images and len(each.images) < values.subset_size:  # before their features are computed
            count = f"{each.name} has {len(each.images)} images"
            raise UserError(f"--subset_size={values.subset_size}: {count}; must be at most their number")
    sets = both_features(named)
    mean, deviation = kernel_inception_distance(sets[0], sets[1], values.subsets, values.subset_size, values.seed)
    result = {
        "kid": mean,
        "std": deviation,
        "subsets": values.subsets,
        "subset_size": values.subset_size,
        "seed": values.seed,
        **said,
        "samples": len(sets[0]),
        "reference_samples": len(sets[1]),
    }
    print(f"KID {mean:.6g}, standard deviation {deviation:.2g} over {values.subsets} subsets of {values.subset_size}")
    if out:
        write_results(out, json_text(result))
