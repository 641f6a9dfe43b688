"""Samples a run's EMA weights: `python -m ecdit.sample --workdir=runs/emoji --prompt="a red heart" --out=images`."""

import json
from pathlib import Path
from typing import Any

from absl import flags
from jaxtyping import UInt8
from numpy import ndarray

from ecdit.command_line import run_command
from ecdit.errors import UserError
from ecdit.files import check_writable
from ecdit.runs.trained_run import open_run, sample_run, saved_experiment
from ecdit.sampling.grids import save_grid, save_png
from ecdit.sampling.routing_maps import draw_maps
from ecdit.storage import as_path
from ecdit.system import make_system

WORKDIR = flags.DEFINE_string("workdir", None, "The run to sample from.", required=True)
OUT = flags.DEFINE_string("out", None, "Directory for the images, grid.png and manifest.json.", required=True)
PROMPT = flags.DEFINE_string("prompt", None, "One prompt.")
PROMPTS = flags.DEFINE_string("prompts", None, "A UTF-8 file with one prompt a line.")
STEP = flags.DEFINE_integer("step", None, "Of the checkpoint; by default the newest.")
REPEATS = flags.DEFINE_integer("repeats", 1, "Images of each prompt.", lower_bound=1)
EXPERTS = flags.DEFINE_bool("experts", False, "Draw experts.png too: how many experts took each token.")
SET = flags.DEFINE_multi_string("set", [], "KEY=VALUE for a key of the run's config, such as sampling.num_steps=25.")


def read_prompts(prompt: str | None, file: str | None) -> list[str]:
    """The prompts of --prompt or --prompts.

    Raises:
      UserError: both or neither, a file that cannot be read, an empty line (the null caption is no prompt).
    """
    if (prompt is None) == (file is None):
        raise UserError("give one of --prompt and --prompts")
    if prompt is not None:
        if not prompt.strip():
            raise UserError(f"--prompt={prompt!r} is empty")
        return [prompt]
    assert file is not None  # as one of them is given
    try:
        text = Path(file).read_text(encoding="utf-8-sig")  # an editor's byte order mark is no part of a prompt
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts={file}: {error}") from None
    lines = text.removesuffix("\n").split("\n") if text else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise UserError(f"--prompts={file}: line {number} is empty")
    if not lines:
        raise UserError(f"--prompts={file}: no prompts")
    return lines


def main(argv: list[str]) -> None:
    """Writes one PNG for each prompt and repeat, a grid of all, and a manifest."""
    del argv
    prompts = [prompt for prompt in read_prompts(PROMPT.value, PROMPTS.value) for _ in range(REPEATS.value)]
    repeats = [i % REPEATS.value for i in range(len(prompts))]
    out = Path(OUT.value)
    check_writable(out / "grid.png")
    if EXPERTS.value:
        system = make_system(saved_experiment(as_path(WORKDIR.value), SET.value).system)
        if not system.parts.denoiser.counts_experts():
            raise UserError(f"--experts: the model of {WORKDIR.value} is dense, it has no experts to count")
    run = open_run(as_path(WORKDIR.value), SET.value, STEP.value)
    drawn = sample_run(run, prompts, repeats, with_experts=EXPERTS.value)
    pictures, counts = drawn if EXPERTS.value else (drawn, None)
    source = {"workdir": WORKDIR.value, "step": run.step, "seed": run.experiment.sampling.seed}
    write_pictures(out, pictures, prompts, repeats, source)
    if counts is not None:
        draw_maps(pictures, prompts, counts).save(out / "experts.png")
    print(f"{len(prompts)} images of step {run.step} in {out}")


def write_pictures(
    out: Path, pictures: UInt8[ndarray, "n h w 3"], prompts: list[str], repeats: list[int], source: dict[str, Any]
) -> None:
    """Writes `00000.png`, ..., `grid.png` and `manifest.json` into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    names = [f"{i:05d}.png" for i in range(len(prompts))]
    for name, picture in zip(names, pictures, strict=True):
        save_png(picture, out / name)
    save_grid(pictures, prompts, out / "grid.png")
    rows = [{"file": n, "prompt": p, "repeat": r} for n, p, r in zip(names, prompts, repeats, strict=True)]
    (out / "manifest.json").write_text(json.dumps(source | {"pictures": rows}, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
