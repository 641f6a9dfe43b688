"""`frechet --images=A --reference=B --inception=FOLDER` measures the Fréchet distance; FID with Inception."""

import dataclasses

from absl import flags

from ecdit.commands.feature_flags import define_feature_flags, feature_sets, files_first, name_extractors
from ecdit.errors import UserError
from ecdit.evaluation.frechet import distance_of_moments
from ecdit.evaluation.moments import Moments, write_moments
from ecdit.json_lines import json_text, result_paths, write_results


def define_flags(values: flags.FlagValues) -> None:
    """Adds the flags of this evaluation."""
    define_feature_flags(values, "; or one .npz file with mu and sigma")
    flags.DEFINE_string("save", None, "A .npz file for mu and sigma of the generated images.", flag_values=values)
    few = "Compare sets with fewer samples than dimensions, although the distance then mostly measures that lack."
    flags.DEFINE_bool("allow_few_samples", False, few, flag_values=values)


def run(values: flags.FlagValues) -> None:
    """Measures, prints and writes the result."""
    out, save = result_paths(values, "json", "save", inputs=["features", "reference"], local=["save"])
    if save and save.suffix != ".npz":
        raise UserError(f"--save={save}: must end in .npz")
    sets, said = feature_sets(values)
    found: dict[str, Moments] = {}
    extractors: dict[str, str | None] = {each.flag: each.extractor_name for each in sets}
    for each in files_first(sets):
        if each.dimensions and not values.allow_few_samples:
            check_samples(len(each.images), each.dimensions, each.flag)
        if each.images:
            check_extractors(extractors[sets[0].flag], extractors[sets[1].flag], sets[1].name)
        moments = found[each.flag] = each.moments()
        check_extractors(extractors[each.flag], moments.extractor, each.name)
        extractors[each.flag] = moments.extractor or extractors[each.flag]
        if not values.allow_few_samples and moments.count is not None:
            check_samples(moments.count, len(moments.mean), each.flag)
    generated, real = (found[each.flag] for each in sets)
    ours, theirs = (extractors[each.flag] for each in sets)
    check_extractors(ours, theirs, sets[1].name)
    result = {
        "frechet": distance_of_moments(generated, real),
        **said,
        **name_extractors(ours, theirs),
        "dimensions": len(generated.mean),
        "samples": generated.count,
        "reference_samples": real.count,
    }
    print(
        f"Frechet distance {result['frechet']:.6g}, {result['dimensions']} dimensions, "
        f"{result['samples'] or 'unknown'} samples against {result['reference_samples'] or 'unknown'}; "
        f"extractor: {' and '.join(name or 'one that is not named' for name in dict.fromkeys((ours, theirs)))}"
    )
    for extractor, each in zip((ours, theirs), sets, strict=True):
        if extractor is None and ours != theirs:  # such as an npz file of another program
            print(
                f"{each.name} does not say what its features are of; if another extractor or preparation made them, "
                "the distance means nothing"
            )
    if save:
        save.parent.mkdir(parents=True, exist_ok=True)
        write_moments(save, dataclasses.replace(generated, extractor=ours))
    if out:
        write_results(out, json_text(result))


def check_extractors(ours: str | None, theirs: str | None, name: str) -> None:
    """Raises UserError if both extractors are known and are not the same."""
    if ours is not None and theirs is not None and ours != theirs:
        raise UserError(
            f"{name}: its features are of {theirs!r}, the generated images' of {ours!r}; they do not compare"
        )


def check_samples(count: int, dimensions: int, name: str) -> None:
    """Raises UserError if a set has fewer samples than dimensions."""
    if count < dimensions:
        reason = "its covariance would cover only a few directions; --allow_few_samples compares it nevertheless"
        raise UserError(f"--{name}: {count} samples, fewer than the {dimensions} dimensions: {reason}")
