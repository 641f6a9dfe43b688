"""Collects the results of a sweep's runs: a table as CSV and markdown, power laws, and plots if matplotlib is there.

The loss is `flow_loss`, so that the balance loss of token choice does not count. A run's final loss is its mean over
the last share of the run's steps; an unfinished run has none, and is in no fit. A run is left out,
and listed with the reason, if its config is not its point's, if it read another version of a user's file, or if its
metrics lack a step.
"""

import csv
import dataclasses
import importlib.util
import io
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ecdit.errors import UserError
from ecdit.files import replace_text
from ecdit.reporting.metrics_file import read_lines
from ecdit.runs.provenance import recorded_files
from ecdit.runs.trained_run import CONFIG_FILE
from ecdit.storage import children, is_outage, reading
from launch.sweeps.fitting import MIN_SIZES, PowerLaw, fit_power_law
from launch.sweeps.points import SweepPoint

CSV_FILE, MARKDOWN_FILE = "sweep.csv", "sweep.md"
LOSS = "flow_loss"


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a point's run, which may be unfinished."""

    name: str
    settings: Mapping[str, Any]  # the point's values by key
    series: str
    step: int  # the last step of the metrics
    num_steps: int
    loss: float | None  # final loss (squared velocity); None if steps are missing
    loss_error: float | None  # standard error of that mean, assuming independent steps
    activated_params: int
    denoiser_params: int
    flops: float  # activated FLOPs of a forward pass for one image and its caption
    left_out: str  # why the run is left out; "" if it counts
    losses: tuple[tuple[int, float], ...] = dataclasses.field(repr=False)  # (step, loss) of finite losses

    @property
    def finished(self) -> bool:
        """Returns whether all steps are done."""
        return self.step >= self.num_steps


Fits = dict[tuple[str, str], PowerLaw]  # keys are a series and the field of Result on the x axis

X_NAMES = {"flops": "activated FLOPs of an image, forward", "activated_params": "activated parameters of the denoiser"}


def collect(points: Sequence[SweepPoint], directory: Path, share: float) -> list[Path]:
    """Writes the table and the plots into the sweep's directory, even if some runs have not started. Returns the files.

    Args:
      points: the points of the sweep.
      directory: the sweep's directory; a point's run is in `directory`/NAME.
      share: share of a run's steps, at its end, over which its final loss is the mean.

    Raises:
      UserError: no run has started there, or a file cannot be read or written.
    """
    results = [read_result(point, directory / point.name, share) for point in points]
    if not any(result.losses for result in results):
        found = "".join(f"\n  {result.name}: {result.left_out}" for result in results if result.left_out)
        raise UserError(f"--workdir={directory}: no point of this sweep has been run there{found}")
    strangers = other_runs(points, directory)
    fits, files = fit_all(results), [directory / CSV_FILE, directory / MARKDOWN_FILE]
    images = {}
    if importlib.util.find_spec("matplotlib") is not None:
        from launch.sweeps import plots

        images = plots.draw_all(results, fits, directory)
    replace_text(files[0], csv_text(results))
    replace_text(files[1], markdown(results, fits, share, images, strangers))
    return files + [directory / name for name in images]


def read_result(point: SweepPoint, workdir: Path, share: float) -> Result:
    """Returns the result of a point's run from its metrics."""
    with reading(workdir):
        rows = read_lines(workdir)
        left_out = why_left_out(point, workdir, [row["step"] for row in rows])
    rows = [] if left_out else rows
    num_steps, counts = point.experiment.train.num_steps, point.counts()
    step = max((row["step"] for row in rows), default=0)
    losses = tuple((row["step"], row[LOSS]) for row in rows if row[LOSS] is not None)
    first = num_steps - max(1, round(share * num_steps))
    last = [loss for at, loss in losses if first < at <= num_steps] if step >= num_steps else []
    return Result(
        name=point.name,
        settings=point.settings,
        series=point.series,
        step=step,
        num_steps=num_steps,
        loss=float(np.mean(last)) if last else None,
        loss_error=float(np.std(last, ddof=1) / math.sqrt(len(last))) if len(last) > 1 else None,
        activated_params=counts.activated_params,
        denoiser_params=counts.denoiser_params,
        flops=sum(part["flops"] for part in counts.flops_per_image.values()),
        left_out=left_out,
        losses=losses,
    )


def why_left_out(point: SweepPoint, workdir: Path, steps: Sequence[int]) -> str:
    """Returns why a run does not count as its point's, or "".

    Args:
      point: the point.
      workdir: workdir of the run.
      steps: steps of its lines of metrics, in order.

    Raises:
      UserError: its bucket cannot be read.
    """
    if not steps:
        return ""  # the run has not started
    config = workdir / CONFIG_FILE
    if not config.exists():
        return f"it has no {CONFIG_FILE}"
    try:
        differences = point.differences(json.loads(config.read_text()), max(steps))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return f"its {CONFIG_FILE} cannot be read: {error}"
    if differences:
        return f"its config differs: {'; '.join(differences)}"
    try:
        differences = point.file_differences(recorded_files(workdir))
    except UserError as error:
        if is_outage(error):
            raise  # otherwise a moment without network would leave good runs out of the fits
        return str(error)
    if differences:
        return f"it read other files: {'; '.join(differences)}"
    wrong = next((at for at, step in enumerate(steps, 1) if step != at), None)
    return "" if wrong is None else f"its metrics have step {steps[wrong - 1]} instead of step {wrong}"


def other_runs(points: Sequence[SweepPoint], directory: Path) -> list[str]:
    """Returns the names of runs in the sweep's directory that are not points of the sweep."""
    names = {point.name for point in points}
    with reading(directory):
        found = [path.name for path in children(directory) if (path / CONFIG_FILE).exists()]
    return sorted(set(found) - names)


def by_series(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Returns the results of each series, in the sweep's order."""
    series: dict[str, list[Result]] = {}
    for result in results:
        series.setdefault(result.series, []).append(result)
    return series


def fit_all(results: Sequence[Result]) -> Fits:
    """Returns a power law for each x of X_NAMES and each series with finished runs of at least MIN_SIZES sizes."""
    fits = {}
    for (series, members), x in itertools.product(by_series(results).items(), X_NAMES):
        finished = [(getattr(result, x), result.loss) for result in members if result.loss is not None]
        law = fit_power_law(*zip(*finished, strict=True)) if finished else None
        if law is not None:
            fits[series, x] = law
    return fits


def csv_text(results: Sequence[Result]) -> str:
    """Returns a CSV table with a line for each point. Unknown values are empty."""
    keys = list(dict.fromkeys(key for result in results for key in result.settings))
    out = io.StringIO()
    sizes = ("activated_params", "denoiser_params", "flops")
    fields = ("series", "step", "num_steps", "loss", "loss_error", *sizes, "left_out")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["name", *keys, *fields])
    for result in results:
        settings = [result.settings.get(key, "") for key in keys]
        writer.writerow([result.name, *settings, *(getattr(result, field) for field in fields)])
    return out.getvalue()


def markdown(
    results: Sequence[Result], fits: Fits, share: float, images: Mapping[str, str], strangers: Sequence[str]
) -> str:
    """Returns a markdown page with the table, the runs that are left out, the fits, and the plots.

    Args:
      results: results of the points.
      fits: power laws.
      share: share of the steps over which the final loss is the mean.
      images: descriptions of the plots by file.
      strangers: names of runs in the directory that are not points of the sweep.
    """
    lines = [
        f"Loss: mean of `{LOSS}` (squared velocity) over the last {share:.0%} of the steps, ± its standard error, as "
        f"if steps were independent. FLOPs are those of one image and its caption, forward.",
        "",
        "| point | steps | loss | activated parameters | parameters of the denoiser | MFLOPs |",
        "|---|---|---|---|---|---|",
        *(_row(result) for result in results),
        "",
    ]
    missing = [
        f"{result.name} ({result.step} of {result.num_steps} steps)"
        for result in results
        if not result.finished and not result.left_out
    ]
    if missing:
        lines += [f"Not finished, and in no fit: {', '.join(missing)}.", ""]
    left_out = [f"- {result.name}: {result.left_out}" for result in results if result.left_out]
    if left_out:
        lines += ["Left out, because they differ from the sweep:", "", *left_out, ""]
    if strangers:
        lines += [f"Runs in this directory that are no points of the sweep: {', '.join(strangers)}.", ""]
    lines += [*_fit_lines(fits), ""]
    for file, description in images.items():
        lines += [f"![{description}]({file})", "", f"*{description}*", ""]
    if not images:
        lines += ["No plots: matplotlib is not installed (`pip install -e '.[plots]'`).", ""]
    return "\n".join(lines)


def _row(result: Result) -> str:
    loss = "" if result.loss is None else f"{result.loss:.4f}"
    loss += "" if result.loss_error is None else f" ± {result.loss_error:.4f}"
    sizes = f"{result.activated_params:,} | {result.denoiser_params:,} | {result.flops / 1e6:,.1f}"
    return f"| {result.name} | {result.step} of {result.num_steps} | {loss} | {sizes} |"


def _fit_lines(fits: Fits) -> list[str]:
    if not fits:
        return [f"No power law: that takes a series with finished runs of {MIN_SIZES} different sizes."]
    return [
        "Power laws: loss = a x^-b, no offset, by least squares in logarithms; b ± its standard error. The interval "
        "takes Student's t for points - 2 degrees of freedom, and is of the fit alone: not of seeds.",
        "",
        "| series | x | points | b | 95 % interval of b | a |",
        "|---|---|---|---|---|---|",
        *(
            f"| {series or 'all'} | {X_NAMES[x]} | {law.points} | {law.b:.4f} ± {law.b_error:.4f} | "
            f"{law.b - law.b_interval:.4f} to {law.b + law.b_interval:.4f} | {law.a:.4g} |"
            for (series, x), law in fits.items()
        ),
    ]
