"""`shapes --workdir=runs/shapes` samples captions of the shapes data, and judges the images from their pixels."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from ecdit.config import to_dict
from ecdit.data.generated import Split
from ecdit.data.manifest import SPLITS
from ecdit.evaluation.retrieval import check_protocol_changes, protocol
from ecdit.evaluation.run_scores import score_shapes
from ecdit.json_lines import json_text, result_paths, write_results
from ecdit.runs.trained_run import each_image_alone, open_run, sample_run
from ecdit.sampling.prompts import PLACES
from ecdit.storage import as_path


def define_flags(values: flags.FlagValues) -> None:
    """Adds the flags of this evaluation."""
    flags.DEFINE_string("workdir", None, "The run.", required=True, flag_values=values)
    flags.DEFINE_integer("step", None, "The checkpoint's step; by default the newest.", flag_values=values)
    captions = "The number of captions of each kind, always the same ones."
    flags.DEFINE_integer("captions", 50, captions, 1, flag_values=values)
    split = "The captions' split: train, or held_out, whose combinations training never has."
    flags.DEFINE_enum("split", "train", SPLITS, split, flag_values=values)
    flags.DEFINE_integer("seed", 0, "The seed of the samples' noise.", flag_values=values)
    changes = "KEY=VALUE changes the protocol's sampling, as sampling.num_steps=50, or where weights are."
    flags.DEFINE_multi_string("set", [], changes, flag_values=values)
    flags.DEFINE_string("json", None, "File for the result.", flag_values=values)


def run(values: flags.FlagValues) -> None:
    """Evaluates, prints the result and writes it."""
    (out,) = result_paths(values, "json")
    check_protocol_changes(values.set, PLACES)
    result = shapes(as_path(values.workdir), values.step, values.captions, values.split, values.seed, values.set)
    if out:
        write_results(out, json_text(result))


def shapes(
    workdir: Path, step: int | None, captions: int, split: Split, seed: int, changes: Sequence[str] = ()
) -> dict[str, Any]:
    """Samples `captions` captions of each kind; prints and returns the share of images that the judge accepts."""
    start = time.monotonic()
    run = each_image_alone(open_run(workdir, changes, step))
    data = run.experiment.data
    sampling = protocol(run.experiment.sampling, seed, changes)
    draw = lambda texts: sample_run(run, texts, [0] * len(texts), sampling)  # noqa: E731
    result = {
        **score_shapes(data, captions, split, draw),
        "split": split,
        "captions_of_a_kind": captions,
        "step": run.step,
        "seconds": round(time.monotonic() - start, 1),
        "protocol": {"weights": "ema", "group": "image", **to_dict(sampling)},
    }
    kinds = ", ".join(f"{kind} {share:.1%}" for kind, share in result["kinds"].items())
    print(
        f"step {run.step}, {split}: overall {result['overall']:.1%} ({kinds}); {captions} captions of each kind, "
        f"{sampling.solver}, {sampling.num_steps} steps, guidance {sampling.guidance.scale}, seed {sampling.seed}, "
        f"EMA weights; {result['seconds']} s"
    )
    return result
