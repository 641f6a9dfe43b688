"""`retrieval --workdir=runs/emoji` samples captions of a run and looks the images up among its data."""

import time
from pathlib import Path

import numpy as np
from absl import flags

from ecdit.config import to_dict
from ecdit.data.images import decode_stored
from ecdit.data.prepared import caption_of, open_prepared, stored_records
from ecdit.evaluation.json_lines import check_results, json_text, write_results
from ecdit.evaluation.retrieval import NUM_CAPTIONS, fixed_choice, protocol, recall, target_ranks
from ecdit.runs.trained_run import each_image_alone, open_run, sample_run
from ecdit.storage import as_path


def define_flags(values: flags.FlagValues) -> None:
    """Adds the flags of this evaluation."""
    flags.DEFINE_string("workdir", None, "The run.", required=True, flag_values=values)
    flags.DEFINE_integer("step", None, "Of the checkpoint; by default the newest.", flag_values=values)
    captions = "How many are sampled, always the same ones; 0 for all."
    flags.DEFINE_integer("captions", NUM_CAPTIONS, captions, 0, flag_values=values)
    flags.DEFINE_string("json", None, "File for the result.", flag_values=values)


def run(values: flags.FlagValues) -> None:
    """Evaluates, prints the result and writes it."""
    out = Path(values.json) if values.json else None
    check_results(out)
    result = retrieval(as_path(values.workdir), values.step, values.captions)
    if out:
        write_results(out, json_text(result))


def retrieval(workdir: Path, step: int | None, count: int) -> dict:
    """Samples `count` training captions, 0 for all; prints and returns how often their images are the nearest."""
    start = time.monotonic()
    run = each_image_alone(open_run(workdir, step=step))
    data = run.experiment.data
    records = list(stored_records(open_prepared(data), "train"))
    chosen = fixed_choice(len(records), count or len(records))
    sampling = protocol(run.experiment.sampling)
    samples = sample_run(run, [caption_of(data, records[i].captions) for i in chosen], [0] * len(chosen), sampling)
    ranks = target_ranks(samples, np.stack([decode_stored(record.image) for record in records]), chosen)
    result = {
        "r_at_1": float(recall(ranks, 1)),
        "r_at_5": float(recall(ranks, 5)),
        "num_images": len(chosen),
        "num_pictures": len(records),
        "step": run.step,
        "seconds": round(time.monotonic() - start, 1),
        "protocol": {
            "weights": "ema",
            "distance": "RMS over pixels, identical images count as right",
            "group": "image",
            **to_dict(sampling),
        },
    }
    print(
        f"step {run.step}: R@1 {result['r_at_1']:.2%}, R@5 {result['r_at_5']:.2%} "
        f"(chance {1 / len(records):.2%} and {5 / len(records):.2%}) over {len(chosen)} training captions, "
        f"the nearest of {len(records)} images; {sampling.solver}, {sampling.num_steps} steps, guidance "
        f"{sampling.guidance.scale}, seed {sampling.seed}, EMA weights; {result['seconds']} s. "
        "This measures fit to the training captions, not generality."
    )
    return result
