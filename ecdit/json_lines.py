"""Reads JSON Lines strictly: errors name file, line, key and value. Writes results whole or not at all."""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ecdit.errors import UserError
from ecdit.files import check_file_writable, is_remote, replace_text

_KINDS = {str: "a string", list: "a list", dict: "an object", int: "an integer"}


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) of each line of a file; empty lines are skipped.

    Raises:
      UserError: a line is not UTF-8, not one JSON object, has a key twice, or holds NaN or an infinity; or the file has
        no line at all. The message names the file and the line.
    """
    number, found = 0, False
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                found = True
                with at_line(path, number):
                    values = _parse(line)
                yield number, values
    if not found:
        raise UserError(f"{path}: has no lines; it must have a JSON object on each")


@contextlib.contextmanager
def at_line(path: Path, number: int) -> Iterator[None]:
    """Names the file and the line in a UserError that is raised inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}, line {number}: {error}") from error


def _parse(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{shown(values)}: must be a JSON object")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"the key {twice!r} stands twice in one object")
    return values


def _refuse_constant(constant: str) -> None:
    raise UserError(f"{constant} is no number; numbers must be finite")


def shown(value: Any) -> str:
    """Returns `value` for a message, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def require(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raises a UserError that names the key, its value and what is allowed, unless `condition`."""
    if not condition:
        raise UserError(f"{key} = {shown(value)}: {allowed}")


def take(values: dict[str, Any], key: str, kind: type, inside: str = "") -> Any:
    """Returns `values[key]`, which must be of `kind`.

    `inside` is the path of `values` for messages, such as "metadata.".

    Raises:
      UserError: it is missing, or of another kind. A boolean is no integer.
    """
    name = f"{inside}{key}"
    if key not in values:
        raise UserError(f"{name} is missing: must be {_KINDS[kind]}; there is {', '.join(values) or 'nothing'}")
    value = values[key]
    require(isinstance(value, kind) and not isinstance(value, bool), name, value, f"must be {_KINDS[kind]}")
    return value


def is_number(value: Any) -> bool:
    """Returns whether a value of JSON is a number within float64's range, and no boolean."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def result_paths(
    values: Any, *names: str, inputs: Sequence[str] = (), local: Sequence[str] = ()
) -> tuple[Path | None, ...]:
    """Returns the files that flags name for results, on a disk or in a bucket; None where a flag is not given.

    Call it before the work whose results go there.

    Args:
      values: the flags.
      names: the flags of results.
      inputs: the flags of files that are read, or of several with commas between them.
      local: those of `names` whose files cannot be in a bucket.

    Raises:
      UserError: a file cannot be written, is a directory, or is that of two of these flags.
    """
    paths: list[Path | None] = []
    taken: dict[str, str] = {}  # flags by their files
    for name in inputs:
        for text in filter(None, (getattr(values, name) or "").split(",")):
            taken[str(Path(text).resolve())] = name
    for name in names:
        text = getattr(values, name)
        paths.append(_result_path(text, f"--{name}", name in local) if text else None)
        if text:
            place = text if is_remote(text) else str(Path(text).resolve())
            if (other := taken.setdefault(place, name)) != name:
                raise UserError(f"--{name}={text}: is the file of --{other} too, and would replace it")
    return tuple(paths)


def _result_path(text: str, name: str, local: bool) -> Path:
    if "://" in text:
        from ecdit.storage import as_path  # here: scorers need no library of buckets

        if local:
            raise UserError(f"{name}={text}: must be a file of this machine")
        return as_path(text, name)
    check_file_writable(Path(text))
    return Path(text)


def write_results(path: Path, text: str) -> None:
    """Writes a result whole or not at all, into a directory that is made if it is missing."""
    if not is_remote(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text)


def json_text(values: dict[str, Any]) -> str:
    """Returns `values` as the text of an indented JSON file. JSON has no NaN: a missing result is null.

    Raises:
      UserError: a number is not finite.
    """
    try:
        return json.dumps(values, indent=2, allow_nan=False) + "\n"
    except ValueError as error:
        raise UserError(f"the result is not written, it has a number that is not finite: {error}") from None
