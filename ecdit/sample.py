"""Samples a run's EMA weights: `python -m ecdit.sample --workdir=runs/emoji --prompt="a red heart" --out=images`.

`--weights=FOLDER` in place of `--workdir` takes those that `ecdit.checkpoint export` has written.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from jaxtyping import UInt8
from numpy import ndarray

import ecdit
from ecdit.command_line import run_command
from ecdit.config import to_dict
from ecdit.errors import UserError
from ecdit.files import check_writable, is_remote, replace_text
from ecdit.runs.exported import check_exported, open_exported
from ecdit.runs.kept_tokenizer import open_tokenizer
from ecdit.runs.trained_run import Run, open_run, sample_run, saved_experiment
from ecdit.sampling.grids import save_grid, save_png, write_png
from ecdit.sampling.prompts import check_changes, check_prompts, prompt_lines
from ecdit.sampling.routing_maps import draw_maps
from ecdit.storage import as_path
from ecdit.system import make_system

WORKDIR = flags.DEFINE_string("workdir", None, "The run to sample from.")
WEIGHTS = flags.DEFINE_string("weights", None, "A folder of exported weights to sample from, in place of a run.")
OUT = flags.DEFINE_string("out", None, "Directory for the images, grid.png and manifest.json.", required=True)
PROMPT = flags.DEFINE_string("prompt", None, "One prompt.")
PROMPTS = flags.DEFINE_string("prompts", None, "A UTF-8 file with one prompt a line.")
STEP = flags.DEFINE_integer("step", None, "Of the checkpoint; by default the newest.")
REPEATS = flags.DEFINE_integer("repeats", 1, "Images of each prompt.", lower_bound=1)
EXPERTS = flags.DEFINE_bool("experts", False, "Draw experts.png too: how many experts took each token.")
SET = flags.DEFINE_multi_string("set", [], "KEY=VALUE of the run's sampling, such as sampling.num_steps=25.")
MANIFEST = "manifest.json"


def read_prompts(prompt: str | None, file: str | None) -> list[str]:
    """Returns the prompts of --prompt or --prompts.

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
    return prompt_lines(file)


def source_place() -> Path:
    """Returns the run's workdir or the exported folder.

    Raises:
      UserError: both or neither are given, --step of a folder, which has one, or a folder that is no exported one.
    """
    if (WORKDIR.value is None) == (WEIGHTS.value is None):
        raise UserError("give one of --workdir and --weights")
    if WEIGHTS.value is None:
        return as_path(WORKDIR.value)
    if STEP.value is not None:
        raise UserError(f"--step={STEP.value}: an exported folder holds one step alone")
    if is_remote(WEIGHTS.value):
        raise UserError(f"--weights={WEIGHTS.value}: must be a folder of this machine: copy it here first")
    check_exported(Path(WEIGHTS.value))
    return Path(WEIGHTS.value)


def main(argv: list[str]) -> None:
    """Writes one PNG for each prompt and repeat, a grid of all, and a manifest."""
    del argv
    prompts = [prompt for prompt in read_prompts(PROMPT.value, PROMPTS.value) for _ in range(REPEATS.value)]
    repeats = [i % REPEATS.value for i in range(len(prompts))]
    check_changes(SET.value)
    if is_remote(OUT.value):
        raise UserError(f"--out={OUT.value}: must be a directory of this machine; copy it to the bucket afterwards")
    place, out = source_place(), Path(OUT.value)
    check_writable(out / "grid.png")
    check_folder(out)
    experiment = saved_experiment(place, SET.value)
    if EXPERTS.value and not make_system(experiment.system).parts.denoiser.counts_experts():
        raise UserError(f"--experts: the model of {place} is dense, it has no experts to count")
    for warning in check_prompts(open_tokenizer(place, experiment.data), prompts):
        print(f"warning: {warning}", flush=True)
    run = open_exported(place, SET.value) if WEIGHTS.value else open_run(place, SET.value, STEP.value)
    named = {"folder": WEIGHTS.value} if WEIGHTS.value else {"workdir": WORKDIR.value}
    source = named | describe_source(run, SET.value)
    begin_folder(out, prompts, repeats, source)
    drawn = sample_run(run, prompts, repeats, with_experts=EXPERTS.value)
    images, counts = drawn if EXPERTS.value else (drawn, None)
    if counts is not None:
        write_png(draw_maps(images, prompts, counts), out / "experts.png")
    write_images(out, images, prompts, repeats, source)
    print(f"{len(prompts)} images of step {run.step} in {out}")


def describe_source(run: Run, changes: Sequence[str]) -> dict[str, Any]:
    """Returns all that the images follow from beside prompts and repeats, for the manifest."""
    return {
        "step": run.step,
        "checkpoint": run.checkpoint,
        "weights": "ema",
        "vocabulary": run.vocabulary,
        "seed": run.experiment.sampling.seed,
        "sampling": to_dict(run.experiment.sampling),
        "group": getattr(run.experiment.model, "sampling_group", None),
        "set": list(changes),
        "ecdit": ecdit.__version__,
    }


def check_folder(out: Path) -> dict[str, Any] | None:
    """Returns the manifest of an unfinished folder of images, or None if `out` is empty or missing.

    Raises:
      UserError: it holds anything else, which images would be mixed with or written over.
    """
    if not out.exists() or not any(out.iterdir()):
        return None
    try:
        manifest = json.loads((out / MANIFEST).read_text())
        finished = manifest["finished"]
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f"--out={out}: holds other files; take an empty directory") from None
    if finished:
        raise UserError(f"--out={out}: holds the images of another call; take an empty directory")
    return manifest


def begin_folder(out: Path, prompts: list[str], repeats: list[int], source: dict[str, Any]) -> None:
    """Writes the manifest of images that are still to be drawn.

    Raises:
      UserError: `out` has the beginning of another call's images.
    """
    found, manifest = check_folder(out), _manifest(prompts, repeats, source, finished=False)
    if found is not None and found != json.loads(json.dumps(manifest)):
        raise UserError(f"--out={out}: holds the unfinished images of another call; take an empty directory")
    out.mkdir(parents=True, exist_ok=True)
    replace_text(out / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def write_images(
    out: Path, images: UInt8[ndarray, "n h w 3"], prompts: list[str], repeats: list[int], source: dict[str, Any]
) -> None:
    """Writes `00000.png`, ..., `grid.png` and, when all are there, `manifest.json` into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for i, (image, _) in enumerate(zip(images, prompts, strict=True)):
        save_png(image, out / _file(i))
    save_grid(images, prompts, out / "grid.png")
    manifest = _manifest(prompts, repeats, source, finished=True)
    replace_text(out / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def _file(index: int) -> str:
    return f"{index:05d}.png"


def _manifest(prompts: list[str], repeats: list[int], source: dict[str, Any], finished: bool) -> dict[str, Any]:
    pairs = enumerate(zip(prompts, repeats, strict=True))
    rows = [{"file": _file(i), "prompt": prompt, "repeat": repeat} for i, (prompt, repeat) in pairs]
    return source | {"finished": finished, "images": rows}


if __name__ == "__main__":
    run_command(main)
