"""Questions about an image that depend on each other, as DSG's and DPG-Bench's tables give them, with answers."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ecdit.errors import UserError
from ecdit.json_lines import at_line, read_lines, require, take


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with a judge's answers. `parents` is None if its cell of the table is malformed."""

    number: int
    parents: tuple[int, ...] | None  # the questions without which this one makes no sense
    answers: tuple[str, ...]  # one for each image of the prompt
    description: str = ""  # the table's `tuple`, such as "entity - whole (rubix cube)"

    def scores(self) -> list[float]:
        """Returns 1 for each answer that is exactly "yes", and 0 for every other one."""
        return [float(answer == "yes") for answer in self.answers]


@dataclasses.dataclass(frozen=True)
class Item:
    """A prompt's questions, in the order of the file."""

    item_id: str
    questions: tuple[Question, ...]

    def unknown_parents(self) -> list[int]:
        """Returns the parents that are not among the questions of this item."""
        known = {question.number for question in self.questions}
        return [parent for question in self.questions for parent in question.parents or () if parent not in known]


def parse_parents(cell: str | int) -> tuple[int, ...] | None:
    """Returns the ids in a cell such as "1,2" of the column `dependency`, or None if one of its parts is no integer.

    0 means that there is no parent, and says nothing beside other ids.
    """
    try:
        return tuple(parent for part in str(cell).split(",") if (parent := int(part)) != 0)
    except ValueError:
        return None


def read_items(path: Path, answers: str, with_tuple: bool) -> Iterator[tuple[int, Item]]:
    """Yields (line number, item) of each line {"item_id", "questions": [{"id", "dependency", ...}, ...]}.

    `answers` is the key of a question's answers: "answer" is a string, "answers" a list of them, one for each image.

    Raises:
      UserError: a line is unreadable, lacks a key or an answer, or has a value that is not allowed; or an item or a
        question stands twice.
    """
    seen: dict[str, int] = {}
    for number, values in read_lines(path):
        with at_line(path, number):
            item = item_of(values, answers, with_tuple)
            if item.item_id in seen:
                raise UserError(f"item_id = {item.item_id!r}: stands in line {seen[item.item_id]} already")
        seen[item.item_id] = number
        yield number, item


def item_of(values: dict[str, Any], answers: str, with_tuple: bool) -> Item:
    """Returns the item that a line's object describes; see `read_items`."""
    item_id = _text_or_integer(values, "item_id", "")
    listed = take(values, "questions", list)
    require(bool(listed), "questions", listed, "must have one question or more")
    questions: dict[int, Question] = {}
    for i, question in enumerate(listed):
        name = f"questions[{i}]"
        require(isinstance(question, dict), name, question, "must be an object")
        made = _question(question, answers, with_tuple, f"{name}.")
        require(made.number not in questions, f"{name}.id", made.number, "stands twice in this item")
        questions[made.number] = made
    counts = {len(question.answers) for question in questions.values()}
    if len(counts) > 1:
        raise UserError(
            f"questions: have {' and '.join(map(str, sorted(counts)))} answers; each must have one an image"
        )
    return Item(item_id, tuple(questions.values()))


def _question(values: dict[str, Any], answers: str, with_tuple: bool, inside: str) -> Question:
    number = _text_or_integer(values, "id", inside)
    valid = number.strip().isdecimal() and int(number) > 0
    require(valid, f"{inside}id", values["id"], "must be an integer above 0, which means no parent")
    given = [take(values, "answer", str, inside)] if answers == "answer" else take(values, answers, list, inside)
    require(bool(given), f"{inside}{answers}", given, "must have one answer or more")
    for answer in given:
        require(isinstance(answer, str), f"{inside}{answers}", given, "must be strings; only 'yes' counts")
    parents = parse_parents(_text_or_integer(values, "dependency", inside))
    description = take(values, "tuple", str, inside) if with_tuple else ""
    return Question(int(number), parents, tuple(given), description)


def _text_or_integer(values: dict[str, Any], key: str, inside: str) -> str:
    """Returns `values[key]` as text, because tables turned into JSON may have integers instead of text."""
    return str(values[key]) if type(values.get(key)) is int else take(values, key, str, inside)
