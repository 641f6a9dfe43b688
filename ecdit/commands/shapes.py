"""`shapes --workdir=runs/shapes` samples captions of the shapes data, and judges the images from their pixels."""

import collections
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from ecdit.config import require, to_dict
from ecdit.data.generated import GENERATED, Ground, Shapes, Split
from ecdit.data.shape_scenes import KINDS, KINDS_HELD_OUT, ShapesConfig
from ecdit.data.shapes import example
from ecdit.evaluation.json_lines import check_results, json_text, write_results
from ecdit.evaluation.retrieval import protocol
from ecdit.evaluation.shapes_judge import judge
from ecdit.runs.trained_run import each_image_alone, open_run, sample_run
from ecdit.storage import as_path

SPLITS: dict[str, Split] = {"train": "train", "held_out": "held_out"}
SEED = 0x5EED  # the seed of the captions, whose rows a run with another seed does not read


def define_flags(values: flags.FlagValues) -> None:
    """Adds the flags of this evaluation."""
    flags.DEFINE_string("workdir", None, "The run.", required=True, flag_values=values)
    flags.DEFINE_integer("step", None, "The checkpoint's step; by default the newest.", flag_values=values)
    captions = "The number of captions of each kind, always the same ones."
    flags.DEFINE_integer("captions", 50, captions, 1, flag_values=values)
    split = "The captions' split: train, or held_out, whose combinations training never has."
    flags.DEFINE_enum("split", "train", list(SPLITS), split, flag_values=values)
    flags.DEFINE_integer("seed", 0, "The seed of the samples' noise.", flag_values=values)
    flags.DEFINE_string("json", None, "File for the result.", flag_values=values)


def run(values: flags.FlagValues) -> None:
    """Evaluates, prints the result and writes it."""
    out = Path(values.json) if values.json else None
    check_results(out)
    result = shapes(as_path(values.workdir), values.step, values.captions, SPLITS[values.split], values.seed)
    if out:
        write_results(out, json_text(result))


def shapes(workdir: Path, step: int | None, captions: int, split: Split, seed: int) -> dict[str, Any]:
    """Samples `captions` captions of each kind; prints and returns the share of images that the judge accepts."""
    start = time.monotonic()
    run = each_image_alone(open_run(workdir, step=step))
    data = run.experiment.data
    made = GENERATED.get(data.task)
    known = ", ".join(name for name, one in GENERATED.items() if isinstance(one, Shapes))
    require(isinstance(made, Shapes), "data.task", data.task, f"the judge knows {known}")
    assert isinstance(made, Shapes)
    asked = [(kind, *one) for kind, one in wanted(data.image_size, made.ground, split, captions)]
    sampling = protocol(run.experiment.sampling, seed)
    images = sample_run(run, [caption for _, caption, _ in asked], [0] * len(asked), sampling)
    verdicts = [judge(image, metadata).correct for image, (_, _, metadata) in zip(images, asked, strict=True)]
    result = {
        **scores([kind for kind, _, _ in asked], verdicts),
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


def wanted(
    image_size: int, ground: Ground, split: Split, count: int
) -> list[tuple[str, tuple[str, Mapping[str, Any]]]]:
    """Returns the kind, caption and metadata of `count` rows of each kind, the same for every run."""
    kinds = KINDS if split == "train" else KINDS_HELD_OUT
    found = []
    for kind in kinds:
        config = ShapesConfig(image_size, ground, split, (kind,))
        rows = (example(config, SEED, row) for row in range(count))
        found += [(kind, (row.caption, row.metadata)) for row in rows]
    return found


def scores(kinds: Sequence[str], verdicts: Sequence[bool]) -> dict[str, Any]:
    """Returns the share of correct images of each kind, and as `overall` the mean over kinds, as in GenEval."""
    correct = collections.defaultdict(list)
    for kind, verdict in zip(kinds, verdicts, strict=True):
        correct[kind].append(verdict)
    shares = {kind: sum(found) / len(found) for kind, found in correct.items()}
    return {"overall": sum(shares.values()) / len(shares), "kinds": shares}
