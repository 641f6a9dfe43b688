"""Shows which experts take which patches: `python -m ecdit.routing_maps --workdir=W --prompts=FILE --out=DIRECTORY`.

It samples the prompts and writes maps, tables, arrays and a page for the browser; docs/routing_maps.md describes them.
"""

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from jaxtyping import Float, UInt8

from ecdit.command_line import run_command
from ecdit.errors import UserError
from ecdit.files import check_writable, is_remote, replace_bytes, replace_text
from ecdit.multihost import on_first
from ecdit.runs.kept_tokenizer import open_tokenizer
from ecdit.runs.trained_run import open_run, sample_run, saved_experiment
from ecdit.sampling.grids import save_png, write_png
from ecdit.sampling.image_folder import alone_in_empty, check_empty
from ecdit.sampling.layouts import plan_images
from ecdit.sampling.prompt_files import Prompt
from ecdit.sampling.prompts import check_changes, check_prompts, prompt_lines
from ecdit.sampling.routing_maps import draw_layers, spread_steps
from ecdit.sampling.routing_page import render_page
from ecdit.sampling.routing_tables import busiest_share, counts_of, coverage, coverage_csv, layer_table, takings
from ecdit.sampling.sampler import network_times
from ecdit.storage import as_path
from ecdit.system import make_system

WORKDIR = flags.DEFINE_string("workdir", None, "The run to sample from.", required=True)
PROMPTS = flags.DEFINE_string("prompts", None, "A UTF-8 file with one prompt a line.", required=True)
OUT = flags.DEFINE_string("out", None, "A new or empty directory for the files.", required=True)
STEP = flags.DEFINE_integer("step", None, "The checkpoint's step; by default the newest.")
REPEATS = flags.DEFINE_integer("repeats", 1, "Images of each prompt.", lower_bound=1)
LAST_STEPS = flags.DEFINE_integer("last_steps", 5, "The last solver steps, in which experts' tokens are counted.", 1)
PAGE_IMAGES = flags.DEFINE_integer("page_images", 8, "The number of images on the page.", lower_bound=1)
PAGE_TIMES = flags.DEFINE_integer("page_times", 10, "The number of solver steps on the page.", lower_bound=1)
SET = flags.DEFINE_multi_string("set", [], "KEY=VALUE changes the run's sampling, such as sampling.num_steps=25.")


def main(argv: list[str]) -> None:
    """Samples, and writes the files that docs/routing_maps.md describes."""
    del argv
    planned = plan_images("lines", [Prompt(line) for line in prompt_lines(PROMPTS.value)], REPEATS.value)
    prompts, repeats = [one.prompt for one in planned], [one.repeat for one in planned]
    workdir, out = as_path(WORKDIR.value), Path(OUT.value)
    check_changes(SET.value)
    if is_remote(OUT.value):
        raise UserError(f"--out={OUT.value}: must be a directory of this machine")
    check_writable(out / "routing.npz")
    check_empty(out)
    experiment = saved_experiment(workdir, SET.value)
    if not make_system(experiment.system).parts.denoiser.counts_experts():
        raise UserError(f"--workdir={WORKDIR.value}: the model is dense, it has no experts")
    for warning in check_prompts(open_tokenizer(workdir, experiment.data), prompts):
        print(f"warning: {warning}", flush=True)

    run = open_run(workdir, SET.value, STEP.value)
    with contextlib.ExitStack() as held:
        on_first(lambda: held.enter_context(alone_in_empty(out)))
        images, gates = sample_run(run, prompts, repeats, with_gates=True)

        def write() -> None:
            about = f"Step {run.step} of {WORKDIR.value}, EMA weights, seed {run.experiment.sampling.seed}."
            named = [f"{p} ({r})" for p, r in zip(prompts, repeats, strict=True)] if max(repeats) else prompts
            print(write_all(out, named, images, gates, about, network_times(run.experiment.sampling)))

        on_first(write)


def write_all(
    out: Path,
    prompts: list[str],
    images: UInt8[np.ndarray, "n h w 3"],
    gates: Float[np.ndarray, "n steps P N E"],
    about: str,
    times: Float[np.ndarray, " steps"],
) -> str:
    """Writes all files into `out`; returns the text to print. `times` are those at which steps call the network."""
    num_steps, num_experts = gates.shape[1], gates.shape[4]
    last = min(LAST_STEPS.value, num_steps)
    counts = counts_of(gates)
    shares, busiest, found = coverage(counts), busiest_share(counts, num_experts), takings(images, gates, last)
    when = f"in the last {last} of {num_steps} steps"
    shown, steps = min(PAGE_IMAGES.value, len(prompts)), spread_steps(num_steps, PAGE_TIMES.value)
    for i, image in enumerate(images):
        save_png(image, out / f"{i:05d}.png")
        write_png(draw_layers(image, prompts[i], counts[i], times), out / f"{i:05d}_experts.png")
    arrays: dict[str, Any] = {
        "prompts": np.array(prompts),
        "images": images,
        "times": times,
        "counts": counts,
        "gates": gates,
        "coverage": shares,
        "busiest": busiest,
        "expert_patches": found.patches,
        "expert_tokens": found.tokens,
        "expert_gates": found.gates,
    }
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    replace_bytes(out / "routing.npz", file.getvalue())
    replace_text(out / "coverage.csv", coverage_csv(shares, busiest, times))
    # The page comes last, because it may be too large, which is an error.
    page = render_page(prompts, images, gates, times, found, about, when, shown, steps)
    replace_text(out / "routing.html", page)
    return (
        f"{layer_table(shares, busiest)}\n{len(prompts)} images in {out}; routing.html ({len(page.encode()) / 1e6:.1f} "
        f"MB) shows {shown} of them at {len(steps)} of {num_steps} times"
    )


if __name__ == "__main__":
    run_command(main)
