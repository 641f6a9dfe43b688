"""Reads files of prompts as benchmarks publish them; `layouts` says where the images of each go.

lines      a text file, one prompt a line
parti      PartiPrompts.tsv: columns with a header, of which one is Prompt (arXiv 2206.10789)
coco       captions_val2014.json and its like; of each image the first caption counts
geneval    evaluation_metadata.jsonl (arXiv 2310.11513)
geneval2   geneval2_data.jsonl (arXiv 2512.16853)
dpg        DPG-Bench (arXiv 2403.05135): its folder of texts, or lines {"item_id", "prompt"}
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np

from ecdit.data.sources.protocol import is_unicode
from ecdit.errors import UserError
from ecdit.json_lines import read_lines
from ecdit.sampling.prompts import prompt_lines

Kind = Literal["lines", "parti", "coco", "geneval", "geneval2", "dpg"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# Keys of a line, which tell the benchmarks apart.
_KEYS: dict[Kind, tuple[str, ...]] = {
    "geneval2": ("prompt", "atom_count", "vqa_list", "skills"),
    "geneval": ("prompt", "tag", "include"),
    "dpg": ("item_id", "prompt"),
}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt and what its benchmark knows it by."""

    text: str
    name: str = ""  # the benchmark's own: an item's id, the id of a COCO image
    line: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # GenEval's, which its folders hold


def read_prompt_file(path: Path, kind: str = "auto") -> tuple[Kind, list[Prompt]]:
    """Returns what kind of file it is, and its prompts in order.

    Args:
      path: of the file, or of DPG-Bench's folder.
      kind: one of KINDS, or "auto" to tell by the ending and the keys of the first line.

    Raises:
      UserError: it cannot be read, is of no known kind, has no prompts, or one that is empty or has no name of its own.
    """
    try:
        found = _kind(path) if kind == "auto" else cast(Kind, kind)
        prompts = list(_READERS[found](path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts={path}: {error}") from None
    if not prompts:
        raise UserError(f"--prompts={path}: no prompts")
    for number, prompt in enumerate(prompts, 1):
        if not prompt.text.strip():
            raise UserError(f"--prompts={path}: prompt {number} is empty")
        if not is_unicode(prompt.text):  # JSON can have halves of characters
            raise UserError(f"--prompts={path}: prompt {number} = {prompt.text!r}: is no Unicode text")
    if found == "dpg":
        _check_names(path, prompts)
    return found, prompts


def choose(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Returns `count` prompts, always the same ones, spread at random over all, in their order; 0 for all."""
    if not 0 <= count <= len(prompts):
        raise UserError(f"--num_prompts={count}: must be 0 .. {len(prompts)}, the prompts that there are")
    places = np.random.Generator(np.random.Philox(0)).permutation(len(prompts))[: count or len(prompts)]
    return [prompts[i] for i in np.sort(places)]


def _kind(path: Path) -> Kind:
    if path.is_dir():
        return "dpg"
    ending = path.suffix.lower()
    if ending == ".tsv":
        return "parti"
    if ending == ".json":
        return "coco"
    if ending != ".jsonl":
        return "lines"
    _, first = next(read_lines(path))
    for kind, keys in _KEYS.items():
        if set(keys) <= set(first):
            return kind
    known = "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in _KEYS.items())
    raise UserError(f"--prompts={path}: its first line has {', '.join(first) or 'no keys'}; known are {known}")


def _lines(path: Path) -> Iterator[Prompt]:
    yield from map(Prompt, prompt_lines(str(path)))


def _parti(path: Path) -> Iterator[Prompt]:
    """Reads columns without any quoting: one of the prompts has double quotes in it, which are its own."""
    lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")  # splitlines knows more ends of lines
    rows = [line.split("\t") for line in lines]
    if "Prompt" not in rows[0]:
        raise UserError(f"--prompts={path}: must have a header with the column Prompt, separated by tabs")
    column = rows[0].index("Prompt")
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(rows[0]):
            raise UserError(f"--prompts={path}, line {number}: has {len(row)} columns, the header {len(rows[0])}")
        yield Prompt(row[column])


def _coco(path: Path) -> Iterator[Prompt]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
        rows = [(row["image_id"], row["caption"]) for row in values["annotations"]]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        wanted = 'must be {"annotations": [{"image_id", "caption"}, ...]}'
        raise UserError(f"--prompts={path}: {wanted}; {type(error).__name__}: {error}") from None
    first: dict[Any, str] = {}
    for image, caption in rows:
        if not isinstance(caption, str):
            raise UserError(f"--prompts={path}: a caption of image {image} = {caption!r}: must be a string")
        if type(image) not in (int, str):
            raise UserError(f"--prompts={path}: image_id = {image!r}: must be a number or a string")
        first.setdefault(image, caption)
    for image, caption in first.items():
        yield Prompt(" ".join(caption.split()), str(image))


def _benchmark(kind: Kind, path: Path) -> Iterator[Prompt]:
    for number, values in read_lines(path):
        for key in _KEYS[kind]:
            if key not in values:
                raise UserError(f"--prompts={path}, line {number}: {key} is missing; there is {', '.join(values)}")
        if not isinstance(values["prompt"], str):
            raise UserError(f"--prompts={path}, line {number}: prompt = {values['prompt']!r}: must be a string")
        name = values.get("item_id", "")
        if type(name) not in (int, str):
            raise UserError(f"--prompts={path}, line {number}: item_id = {name!r}: must be a string or an integer")
        yield Prompt(values["prompt"], str(name), values if kind == "geneval" else {})


def _dpg(path: Path) -> Iterator[Prompt]:
    if not path.is_dir():
        yield from _benchmark("dpg", path)
        return
    for file in sorted(path.glob("*.txt")):
        yield Prompt(" ".join(file.read_text(encoding="utf-8-sig").split()), file.stem)


def _check_names(path: Path, prompts: Sequence[Prompt]) -> None:
    """Raises UserError unless each prompt has a name that can be a file's, before whose first dot the id stands."""
    seen = set()
    for prompt in prompts:
        if not re.fullmatch(r"[\w-]+", prompt.name):
            raise UserError(f"--prompts={path}: item_id = {prompt.name!r}: must be letters, digits, _ and -")
        if prompt.name in seen:
            raise UserError(f"--prompts={path}: item_id = {prompt.name!r} stands there twice")
        seen.add(prompt.name)


_READERS = {
    "lines": _lines,
    "parti": _parti,
    "coco": _coco,
    "geneval": lambda path: _benchmark("geneval", path),
    "geneval2": lambda path: _benchmark("geneval2", path),
    "dpg": _dpg,
}
