"""Reads and writes the table of plans of a family of configs, between two marks of a markdown file."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ecdit.config import ConfigError, flatten, to_dict
from ecdit.errors import UserError
from ecdit.experiment import Experiment, check_mesh
from ecdit.files import replace_text
from ecdit.partitioning import ShardingError, abstract_mesh
from ecdit.system import make_system
from ecdit.topology import Slice

BEGIN, END = "<!-- plans: begin -->", "<!-- plans: end -->"
_HEAD = (
    "| config | slice | libtpu | GB a device | s a step | if all, no communication hidden | MFU | images/s | days |",
    "|---|---|---|---|---|---|---|---|---|",
)


def row(name: str, values: Mapping[str, Any], compiler: str) -> str:
    """Returns the table's row for a plan's values as `ecdit.plan --json` writes them, also if it does not fit.

    `compiler` is the version of libtpu that made the plan.
    """
    if not values.get("fits", True):
        return f"| {name} | {values['topology']} | {compiler} | does not fit | | | | | |"
    memory = f"{values['hbm_bytes_per_device'] / 1e9:.1f} of {values['hbm_limit'] / 1e9:.0f}"
    step, hidden, exposed = (
        f"{values[key]:.3f}" for key in ("estimated_step_seconds", "seconds_all_hidden", "seconds_none_hidden")
    )
    speed = f"{values['estimated_mfu']:.1%} | {values['images_per_second']:,.0f} | {values['days']:.1f}"
    return f"| {name} | {values['topology']} | {compiler} | {memory} | {step} | {hidden}, {exposed} | {speed} |"


def known_better(origin: Mapping[str, Any], experiment: Experiment, where: Slice, slices: int = 1) -> str:
    """Returns text that names a faster layout of a run if the table beside its config has one, else "".

    It compares rows of the run's config on one slice and with one compiler. It prefers the run's own slice, and
    otherwise uses slices with the same kind of chips.

    Args:
      origin: the run's config file and overrides, from `command_line.config_origin`.
      experiment: the run.
      where: one of its slices.
      slices: number of slices.
    """
    file, _, argument = origin["config"].partition(":")
    readme = Path(file).with_name("README.md")
    chips = f"{slices}x{where.chip}" if slices > 1 else where.chip
    groups: dict[tuple[str, str], list[_Row]] = {}
    for (name, topology, compiler), seconds in _step_seconds(readme).items():
        config, *changes = name.split(", ")
        if config == argument and topology.partition(":")[0] == chips:
            values = dict(change.split("=", 1) for change in changes)
            groups.setdefault((topology, compiler), []).append(_Row(values, seconds))
    at = f"{chips}:{where.topology}"
    for topology, compiler in sorted(groups, key=lambda key: (key[0] == at, _numbers(key[1])), reverse=True):
        rows = groups[topology, compiler]
        own = _own_row(rows, origin["overrides"], experiment)
        faster = [row for row in rows if own and row.seconds < own.seconds and _divides(row, experiment, where, slices)]
        if own and faster:
            best = min(faster, key=lambda row: row.seconds)
            flags = (
                " ".join(f"--config.{key}={value}" for key, value in best.changes.items()) or "the config's own values"
            )
            return f"{flags}: {readme} has {best.seconds:.3f} s a step on {topology}, and {own.seconds:.3f} s as asked"
        if own:
            return ""
    return ""


class _Row(NamedTuple):
    changes: Mapping[str, str]  # the config's overrides, by key
    seconds: float  # per step


def _step_seconds(readme: Path) -> dict[tuple[str, str, str], float]:
    """Returns the seconds of a step by name, slice and compiler, or nothing if there is no table."""
    try:
        table = readme.read_text().partition(BEGIN)[2].partition(END)[0]
    except OSError:
        return {}
    found = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 9 and re.fullmatch(r"\d+\.\d+", cells[4]):
            found[cells[0], cells[1], cells[2]] = float(cells[4])
    return found


def _own_row(rows: Sequence[_Row], overrides: Mapping[str, Any], experiment: Experiment) -> _Row | None:
    """Returns the row with the most changes that the run shares, or None if the run has other values."""
    values = flatten(to_dict(experiment))
    fitting = [row for row in rows if all(str(values.get(key)) == value for key, value in row.changes.items())]
    own = max(fitting, key=lambda row: len(row.changes), default=None)
    keys = {key for row in rows for key in row.changes}
    told = {key for key in overrides if key in keys or key.startswith("mesh.")} - {"mesh.slices"}
    return own if own is not None and told <= set(own.changes) else None


def _divides(row: _Row, experiment: Experiment, where: Slice, slices: int) -> bool:
    """Returns whether the run fits the slices with the row's mesh."""
    sizes = {key.removeprefix("mesh."): int(value) for key, value in row.changes.items() if key.startswith("mesh.")}
    try:
        mesh = abstract_mesh(dataclasses.replace(experiment.mesh, **sizes), where.devices * slices)
        check_mesh(experiment, mesh)
        make_system(experiment.system).shardings(mesh)
    except (ConfigError, ShardingError):
        return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def write_rows(path: Path, rows: Mapping[tuple[str, str, str], str]) -> None:
    """Writes rows, by config, slice and compiler, into the table of a file. Keeps the rows of other plans.

    Raises:
      UserError: the file lacks a mark, or cannot be read or written.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"{path}: {error}") from None
    before, begin, rest = text.partition(BEGIN)
    table, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{path}: must have the lines {BEGIN} and {END}, with the table between them")
    lines = [line for line in table.splitlines() if line.startswith("| ") and line != _HEAD[0]]
    kept = {tuple(cell.strip() for cell in line.split("|")[1:4]): line for line in lines}
    replace_text(path, "\n".join([before + BEGIN, *_HEAD, *(kept | dict(rows)).values(), END + after]))
