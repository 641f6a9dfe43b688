"""Draws the plots of a sweep with matplotlib, which is in the extra `plots` and imported only when drawing."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from ecdit.files import replace_bytes
from launch.sweeps.collecting import X_NAMES, Fits, Result, by_series
from launch.sweeps.fitting import PowerLaw

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEPS_FILE, X_FILES = "loss_steps.png", {"flops": "loss_flops.png", "activated_params": "loss_params.png"}
WINDOW_SHARE = 0.05  # window of the running means, as a share of a run's steps
LINES = ("-", "--", ":", "-.")


def draw_all(results: Sequence[Result], fits: Fits, directory: Path) -> dict[str, str]:
    """Draws the plots into `directory`, those against sizes only if a run is finished. Returns descriptions by file."""
    drawn = {STEPS_FILE: f"Loss against steps: running means over {WINDOW_SHARE:.0%} of a run's steps."}
    _save(directory / STEPS_FILE, lambda axes: _draw_steps(axes, results))
    if any(result.loss is not None for result in results):
        for x, file in X_FILES.items():
            _save(directory / file, lambda axes, x=x: _draw_sizes(axes, results, fits, x))
            drawn[file] = f"Final loss against {X_NAMES[x]}; lines are power laws, bands a standard error of theirs."
    return drawn


def running_mean(values: Sequence[float], window: int) -> Float[np.ndarray, " n"]:
    """Returns the mean of each value and the values before it, at most `window` in all."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _save(path: Path, draw: "Callable[[Axes], None]") -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="x-small")
    image = io.BytesIO()  # matplotlib writes only to disks
    figure.savefig(image, format="png")
    replace_bytes(path, image.getvalue())


def _draw_steps(axes: "Axes", results: Sequence[Result]) -> None:
    for color, members in enumerate(by_series(results).values()):
        for i, result in enumerate(members):
            if not result.losses:
                continue
            steps, losses = zip(*result.losses, strict=True)
            smooth = running_mean(losses, max(1, round(WINDOW_SHARE * result.num_steps)))
            label = result.name if result.finished else f"{result.name} (to step {result.step})"
            axes.plot(steps, smooth, LINES[i % len(LINES)], color=f"C{color}", linewidth=1, label=label)
    axes.set(xlabel="steps", ylabel="loss", yscale="log")


def _draw_sizes(axes: "Axes", results: Sequence[Result], fits: Fits, x: str) -> None:
    for color, (series, members) in enumerate(by_series(results).items()):
        finished = [result for result in members if result.loss is not None]
        sizes = [getattr(result, x) for result in finished]
        law = fits.get((series, x))
        label = series or "all"
        if law is not None:
            label += f": b = {law.b:.3f} ± {law.b_error:.3f}"
            _draw_law(axes, law, min(sizes), max(sizes), f"C{color}")
        losses = [result.loss for result in finished if result.loss is not None]
        axes.plot(sizes, losses, "o", color=f"C{color}", markersize=4, label=label)
    axes.set(xlabel=X_NAMES[x], ylabel="final loss", xscale="log", yscale="log")


def _draw_law(axes: "Axes", law: PowerLaw, low: float, high: float, color: str) -> None:
    x = np.geomspace(low, high, 50)
    y, factor = law.at(x), np.exp(law.log_error(x))
    axes.plot(x, y, color=color, linewidth=1)
    axes.fill_between(x, y / factor, y * factor, color=color, alpha=0.15, linewidth=0)
