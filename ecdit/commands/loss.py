"""`loss --workdir=runs/emoji` computes the flow loss of held-out images by time, with EMA and raw weights."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from ecdit.checkpoints.restore import restore_ema
from ecdit.components import Mode
from ecdit.data.generated import Split
from ecdit.data.manifest import SPLITS
from ecdit.evaluation.flow_loss import BINS, SEED, fixed_rows, losses_by_time, make_loss_program
from ecdit.json_lines import json_text, result_paths, write_results
from ecdit.runs.trained_run import open_data, open_run
from ecdit.sampling.prompts import DATA_PLACES, check_changes
from ecdit.storage import as_path
from ecdit.system import System


def define_flags(values: flags.FlagValues) -> None:
    """Adds the flags of this evaluation."""
    flags.DEFINE_string("workdir", None, "The run.", required=True, flag_values=values)
    flags.DEFINE_integer("step", None, "Of the checkpoint; by default the newest.", flag_values=values)
    flags.DEFINE_integer("images", 256, "How many, always the same ones.", 1, flag_values=values)
    flags.DEFINE_enum("split", "held_out", SPLITS, "Images that training never read, or its own.", flag_values=values)
    flags.DEFINE_integer("batch_size", 64, "Images at a time, about.", 1, flag_values=values)
    changes = "KEY=VALUE changes where data or public weights are: data.directory, or a folder's key."
    flags.DEFINE_multi_string("set", [], changes, flag_values=values)
    flags.DEFINE_string("json", None, "File for the result.", flag_values=values)


def run(values: flags.FlagValues) -> None:
    """Evaluates, prints the result and writes it."""
    (out,) = result_paths(values, "json")
    check_changes(values.set, DATA_PLACES, sampling=False)
    result = loss(as_path(values.workdir), values.step, values.images, values.split, values.batch_size, values.set)
    if out:
        write_results(out, json_text(result))


def loss(
    workdir: Path, step: int | None, images: int, split: Split, about: int, changes: Sequence[str] = ()
) -> dict[str, Any]:
    """Computes the loss of `images` images by bin of time; prints a table and returns it.

    Raises:
      DataError: the run's data has no such record, or has changed since training.
    """
    start = time.monotonic()
    run = open_run(workdir, changes, step, draw=False, load=True)
    rows = fixed_rows(open_data(run, workdir), images, split)
    raw, _ = restore_ema(workdir, run.system, run.mesh, run.step, part="params")
    raw |= run.system.loaded(run.params)
    found = []
    for mode in modes(run.system):
        program = make_loss_program(run.system, run.mesh, about, mode)
        for weights, params in (("ema", run.params), ("raw", raw)):
            by_time = losses_by_time(program, params, rows)
            row = {"weights": weights, "groups": group_of(run.system, mode), "mean": float(by_time.mean())}
            found.append({**row, "by_time": by_time.tolist(), "batch_size": program.batch_size})
    result = {
        "step": run.step,
        "split": split,
        "images": len(rows["size_crop"]),
        "time_bins": BINS,
        "seed": SEED,
        "losses": found,
        "seconds": round(time.monotonic() - start, 1),
    }
    print(table(result))
    return result


def modes(system: System) -> tuple[Mode, ...]:
    """Returns the modes under which a model's images may compete for experts in different groups."""
    return ("sample",) if group_of(system, "train") == group_of(system, "sample") else ("sample", "train")


def group_of(system: System, mode: Mode) -> str:
    """Returns the group of tokens that compete for experts, as the config writes it; "none" without experts."""
    if not system.parts.denoiser.counts_experts():
        return "none"
    return str(getattr(system.config.model, "group" if mode == "train" else "sampling_group", "none"))


def table(result: dict[str, Any]) -> str:
    """Returns the losses as a table in Markdown, a row for each kind of weights and groups."""
    ends = [f"{i / BINS:.1f}-{(i + 1) / BINS:.1f}" for i in range(BINS)]
    lines = [
        f"step {result['step']}, {result['images']} images of the split {result['split']}; "
        "flow loss by time (1 is noise)",
        f"| weights | groups | mean | {' | '.join(ends)} |",
        "|" + "---|" * (3 + BINS),
    ]
    for row in result["losses"]:
        cells = " | ".join(f"{value:.4f}" for value in (row["mean"], *row["by_time"]))
        lines.append(f"| {row['weights']} | {row['groups']} | {cells} |")
    return "\n".join(lines)
