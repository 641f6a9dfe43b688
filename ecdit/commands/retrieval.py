"""`retrieval --workdir=runs/emoji` samples captions of a run and searches its data for the nearest images."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from ecdit.config import to_dict
from ecdit.data.emoji_styles import style_and_name
from ecdit.data.generated import Split
from ecdit.data.manifest import SPLITS
from ecdit.evaluation.retrieval import (
    NUM_CAPTIONS,
    chance,
    check_protocol_changes,
    nearest_other_styles,
    protocol,
    recall,
    target_ranks,
)
from ecdit.evaluation.run_scores import load_retrieval
from ecdit.json_lines import json_text, result_paths, write_results
from ecdit.runs.trained_run import each_image_alone, open_data, open_run, sample_run
from ecdit.sampling.grids import save_grid
from ecdit.sampling.prompts import DATA_PLACES
from ecdit.sampling.sampler import SamplingConfig
from ecdit.storage import as_path, make_directory

_DRAWN = 8


def define_flags(values: flags.FlagValues) -> None:
    """Adds the flags of this evaluation."""
    flags.DEFINE_string("workdir", None, "The run.", required=True, flag_values=values)
    flags.DEFINE_integer("step", None, "The checkpoint's step; by default the newest.", flag_values=values)
    captions = "The number of captions to sample, always the same ones; 0 samples all."
    flags.DEFINE_integer("captions", NUM_CAPTIONS, captions, 0, flag_values=values)
    splits = "The captions' split: train, or held_out, which training never reads."
    flags.DEFINE_enum("split", "train", SPLITS, splits, flag_values=values)
    flags.DEFINE_integer("seed", 0, "The seed of the samples' noise.", 0, flag_values=values)
    flags.DEFINE_string("grid", None, "A PNG file for some samples beside their true images.", flag_values=values)
    changes = "KEY=VALUE changes the protocol's sampling, as sampling.num_steps=50, or where data or weights are."
    flags.DEFINE_multi_string("set", [], changes, flag_values=values)
    flags.DEFINE_string("json", None, "File for the result.", flag_values=values)


def run(values: flags.FlagValues) -> None:
    """Evaluates, prints the result and writes it."""
    out, grid = result_paths(values, "json", "grid")
    check_protocol_changes(values.set, DATA_PLACES)
    retrieval(as_path(values.workdir), values.step, values.captions, values.split, values.seed, grid, values.set, out)


def retrieval(
    workdir: Path,
    step: int | None,
    count: int,
    split: Split = "train",
    seed: int = 0,
    grid: Path | None = None,
    changes: Sequence[str] = (),
    out: Path | None = None,
) -> dict:
    """Samples `count` captions of a split (0: all); prints and returns how often the true image is the nearest.

    Samples of training captions are compared with the training images. Samples of held-out captions are compared with
    all images, and with those of their style. `grid` is a PNG file for some samples beside their true images, and `out`
    a file for the result.

    Raises:
      DataError: the run's data has no stored record in the split, or has changed since training.
    """
    start = time.monotonic()
    run = each_image_alone(open_run(workdir, changes, step))
    data = run.experiment.data
    open_data(run, workdir)
    loaded = load_retrieval(data, count, split)
    images, chosen = loaded.images, loaded.chosen
    sampling = protocol(run.experiment.sampling, seed, changes)
    samples = sample_run(run, loaded.captions, [0] * len(chosen), sampling)
    ranks = target_ranks(samples, images, chosen)
    result = {
        "r_at_1": float(recall(ranks, 1)),
        "r_at_5": float(recall(ranks, 5)),
        "num_captions": len(chosen),
        "num_images": len(images),
        "split": split,
        "step": run.step,
        "protocol": {
            "weights": "ema",
            "distance": "RMS over pixels, identical images count as right",
            "group": "image",
            **to_dict(sampling),
        },
    }
    if split == "held_out":
        trained = np.arange(len(images)) >= loaded.num_targets
        result |= compared(samples, images, chosen, loaded.keys, trained)
    result["seconds"] = round(time.monotonic() - start, 1)
    _say(result, sampling)
    if out:
        write_results(out, json_text(result))
    if grid:
        _draw(samples, images[chosen], loaded.captions, grid)
    return result


def compared(
    samples: np.ndarray, images: np.ndarray, chosen: np.ndarray, keys: Sequence[str], trained: np.ndarray
) -> dict:
    """Returns recall among all images and among those of the sample's style, with two baselines.

    The baselines are chance, and a copy of the nearest training image with the same name in another style; captions
    of names that have none do not count for the latter.

    Args:
      samples: samples of the captions of `chosen`, uint8[n, h, w, 3].
      images: all images, uint8[N, h, w, 3].
      chosen: int[n], indices in `images`.
      keys: keys of the images; if they have no styles, the result has only the recall among all and chance.
      trained: bool[N], whether training reads the image.
    """
    known = [style_and_name(key) for key in keys]
    every = np.ones((len(chosen), len(keys)), bool)
    if None in known:
        return {"of_all": _recalls(samples, images, chosen, every)}
    styles, names = (np.unique([one[part] for one in known if one], return_inverse=True)[1] for part in range(2))
    of_style = styles[chosen][:, None] == styles[None]
    result = {
        "of_all": _recalls(samples, images, chosen, every),
        "of_style": _recalls(samples, images, chosen, of_style),
    }
    known_otherwise = np.isin(names[chosen], names[trained])
    asked = chosen[known_otherwise]
    if len(asked):
        copied = nearest_other_styles(images, asked, names, trained)
        others = every[known_otherwise]
        others[np.arange(len(asked)), copied] = False  # a copy would find itself first
        for key, among in (("of_all", others), ("of_style", of_style[known_otherwise] & others)):
            result[key]["other_style"] = _both(target_ranks(images[copied], images, asked, among))
    return result


def _recalls(samples: np.ndarray, images: np.ndarray, chosen: np.ndarray, candidates: np.ndarray) -> dict:
    ranks, sizes = target_ranks(samples, images, chosen, candidates), candidates.sum(axis=1)
    by_chance = {f"r_at_{k}": float(chance(sizes, k)) for k in (1, 5)}
    return {"samples": _both(ranks), "chance": by_chance}


def _both(ranks: np.ndarray) -> dict[str, float]:
    return {f"r_at_{k}": float(recall(ranks, k)) for k in (1, 5)}


def _draw(samples: np.ndarray, images: np.ndarray, captions: Sequence[str], path: Path) -> None:
    """Writes a grid of a few evenly spaced samples, each with its true image to its right."""
    some = np.linspace(0, len(samples) - 1, min(_DRAWN, len(samples))).astype(int)
    pairs = np.stack([samples[some], images[some]], axis=1).reshape(-1, *samples.shape[1:])
    make_directory(path.parent)
    save_grid(pairs, [text for i in some for text in (str(captions[i]), "true image")], path, columns=8)


def _say(result: dict, sampling: SamplingConfig) -> None:
    held_out, total = result["split"] == "held_out", result["num_images"]
    print(
        f"step {result['step']}: R@1 {result['r_at_1']:.2%}, R@5 {result['r_at_5']:.2%} "
        f"(chance {1 / total:.2%} and {5 / total:.2%}) over {result['num_captions']} "
        f"{'held-out' if held_out else 'training'} captions, the nearest of {total} images; {sampling.solver}, "
        f"{sampling.num_steps} steps, guidance {sampling.guidance.scale}, seed {sampling.seed}, EMA weights; "
        f"{result['seconds']} s."
        + ("" if held_out else " This measures fit to the training captions, not generalisation.")
    )
    for key, among in (("of_all", "all images"), ("of_style", "the images of the style")):
        for who, found in result.get(key, {}).items():
            print(f"  of {among}, {who.replace('_', ' ')}: R@1 {found['r_at_1']:.2%}, R@5 {found['r_at_5']:.2%}")
