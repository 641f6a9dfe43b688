"""Samples a run's EMA weights: `python -m ecdit.sample --workdir=runs/emoji --prompt="a red heart" --out=images`.

`--weights=FOLDER` in place of `--workdir` takes those that `ecdit.checkpoint export` has written.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from ecdit.command_line import run_command
from ecdit.data.sources.protocol import is_unicode
from ecdit.errors import UserError
from ecdit.files import check_writable, is_remote
from ecdit.multihost import on_first
from ecdit.runs.exported import check_exported, open_exported
from ecdit.runs.kept_tokenizer import open_tokenizer
from ecdit.runs.sample_folder import describe_source, draw_folder
from ecdit.runs.trained_run import Run, open_run, sample_run, saved_experiment
from ecdit.sampling.grids import write_png
from ecdit.sampling.image_folder import check_folder
from ecdit.sampling.layouts import REPEATS, Planned, plan_images, write_after, write_before
from ecdit.sampling.prompt_files import KINDS, Kind, Prompt, choose, read_prompt_file
from ecdit.sampling.prompts import check_changes, check_prompts
from ecdit.sampling.routing_maps import MAX_ROWS, draw_maps
from ecdit.sampling.sampler import network_times
from ecdit.storage import as_path
from ecdit.system import make_system

WORKDIR = flags.DEFINE_string("workdir", None, "The run to sample from.")
WEIGHTS = flags.DEFINE_string("weights", None, "A folder of exported weights to sample from, in place of a run.")
OUT = flags.DEFINE_string("out", None, "Directory for the images, grid.png and manifest.json.", required=True)
PROMPT = flags.DEFINE_string("prompt", None, "One prompt.")
PROMPTS = flags.DEFINE_string(
    "prompts", None, "A text file with one prompt a line, or a benchmark's: docs/sampling.md."
)
FORMAT = flags.DEFINE_enum("format", "auto", ["auto", *KINDS], "What kind of file --prompts is.")
NUM_PROMPTS = flags.DEFINE_integer("num_prompts", 0, "How many of the prompts, chosen at random; 0 for all.", 0)
STEP = flags.DEFINE_integer("step", None, "Of the checkpoint; by default the newest.")
REPEATS_FLAG = flags.DEFINE_integer(
    "repeats", None, "Images of each prompt; by default what the benchmark takes, or 1.", 1
)
EXPERTS = flags.DEFINE_bool("experts", False, "Draw experts.png too: how many experts took each token.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join the other hosts of a pod; each draws a share of the images."
)
SET = flags.DEFINE_multi_string(
    "set",
    [],
    "KEY=VALUE of the run's sampling, such as sampling.num_steps=25, or of a folder of public weights that has moved.",
)


def read_prompts(prompt: str | None, file: str | None, kind: str = "auto") -> tuple[Kind, list[Prompt]]:
    """Returns what kind of prompts --prompt or --prompts are, and the prompts.

    Raises:
      UserError: both or neither, a file that cannot be read, an empty line (the null caption is no prompt).
    """
    if (prompt is None) == (file is None):
        raise UserError("give one of --prompt and --prompts")
    if prompt is not None:
        if not prompt.strip():
            raise UserError(f"--prompt={prompt!r} is empty")
        if not is_unicode(prompt):
            raise UserError(f"--prompt={prompt!r}: is no Unicode text")
        return "lines", [Prompt(prompt)]
    assert file is not None  # as one of them is given
    return read_prompt_file(Path(file), kind)


def source_place() -> Path:
    """Returns the run's workdir or the exported folder.

    Raises:
      UserError: both or neither are given, --step of a folder, which has one, or a folder that is no exported one.
    """
    if (WORKDIR.value is None) == (WEIGHTS.value is None):
        raise UserError("give one of --workdir and --weights")
    if WORKDIR.value is not None:
        return as_path(WORKDIR.value)
    if STEP.value is not None:
        raise UserError(f"--step={STEP.value}: an exported folder holds one step alone")
    assert WEIGHTS.value is not None  # as one of them is given
    if is_remote(WEIGHTS.value):
        raise UserError(f"--weights={WEIGHTS.value}: must be a folder of this machine: copy it here first")
    check_exported(Path(WEIGHTS.value))
    return Path(WEIGHTS.value)


def main(argv: list[str]) -> None:
    """Writes a PNG for each prompt and repeat, where the prompts' benchmark wants it, a grid, and a manifest."""
    del argv
    kind, prompts = read_prompts(PROMPT.value, PROMPTS.value, FORMAT.value)
    prompts = choose(prompts, NUM_PROMPTS.value)
    planned = plan_images(kind, prompts, REPEATS_FLAG.value or REPEATS[kind])
    check_changes(SET.value)
    if is_remote(OUT.value):
        raise UserError(f"--out={OUT.value}: must be a directory of this machine; copy it to the bucket afterwards")
    place, out = source_place(), Path(OUT.value)
    check_writable(out / "grid.png")
    check_folder(out)
    experiment = saved_experiment(place, SET.value)
    if EXPERTS.value and not make_system(experiment.system).parts.denoiser.counts_experts():
        raise UserError(f"--experts: the model of {place} is dense, it has no experts to count")
    texts = [prompt.text for prompt in prompts]
    for warning in check_prompts(open_tokenizer(place, experiment.data), texts):
        print(f"warning: {warning}", flush=True)
    run = open_source(place)
    named = {"folder": WEIGHTS.value} if WEIGHTS.value else {"workdir": WORKDIR.value}
    source = named | describe_source(run, SET.value, kind)

    def draw_after() -> None:
        maps = draw_experts(run, planned) if EXPERTS.value else None

        def write() -> None:
            write_after(out, kind, planned)
            if maps is not None:
                write_png(maps, out / "experts.png")

        on_first(write)

    new = draw_folder(run, out, planned, source, lambda: write_before(out, kind, prompts), draw_after)
    if jax.process_index() == 0:
        had = f", {len(planned) - new} of them from before" if new < len(planned) else ""
        print(f"{len(planned)} images of step {run.step} in {out}{had}")


def open_source(place: Path) -> Run:
    """Opens the exported folder or the run's checkpoint, with the changes of --set."""
    if WEIGHTS.value:
        return open_exported(place, SET.value, join=DISTRIBUTED.value)
    return open_run(place, SET.value, STEP.value, join=DISTRIBUTED.value)


def draw_experts(run: Run, planned: Sequence[Planned]) -> Any:
    """Draws MAX_ROWS of the images again, evenly spread, and returns a page of the experts that took their tokens."""
    chosen = np.linspace(0, len(planned) - 1, min(len(planned), MAX_ROWS)).round().astype(int)
    prompts, repeats = [planned[i].prompt for i in chosen], [planned[i].repeat for i in chosen]
    images, counts = sample_run(run, prompts, repeats, with_experts=True)
    return draw_maps(images, prompts, counts, network_times(run.experiment.sampling))


if __name__ == "__main__":
    run_command(main)
