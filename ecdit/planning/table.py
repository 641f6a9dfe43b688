"""Keeps the plans of a family of configs as a table in a markdown file, between two marks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ecdit.errors import UserError
from ecdit.files import replace_text

BEGIN, END = "<!-- plans: begin -->", "<!-- plans: end -->"
_HEAD = (
    "| config | slice | libtpu | GB a device | s a step | if all, no communication hidden | MFU | images/s | days |",
    "|---|---|---|---|---|---|---|---|---|",
)


def row(name: str, values: Mapping[str, Any], compiler: str) -> str:
    """Returns the row of a plan's values as `ecdit.plan --json` writes them, or of one that does not fit.

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


def write_rows(path: Path, rows: Mapping[tuple[str, str, str], str]) -> None:
    """Writes rows, by config, slice and compiler, into the table of a file; rows of other plans stay.

    Raises:
      UserError: the file has not both marks, or cannot be written.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"{path}: {error}") from None
    before, begin, rest = text.partition(BEGIN)
    table, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{path}: needs the lines {BEGIN} and {END}, between which the table goes")
    lines = [line for line in table.splitlines() if line.startswith("| ") and line != _HEAD[0]]
    kept = {tuple(cell.strip() for cell in line.split("|")[1:4]): line for line in lines}
    replace_text(path, "\n".join([before + BEGIN, *_HEAD, *(kept | dict(rows)).values(), END + after]))
