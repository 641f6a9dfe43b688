"""Defines a mutant: one line of the program made wrong, and the tests that must notice it."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A change of one place in one file. `old` must stand there exactly once, so that a stale mutant is an error."""

    file: str  # from the root of the checkout
    old: str
    new: str
    tests: tuple[str, ...]  # arguments of pytest: files or node ids, of which at least one test must fail
    why: str = ""  # what would go wrong for a user, where the change does not say it

    def apply(self, root: Path) -> None:
        """Changes the file under `root`.

        Raises:
          ValueError: `old` is not there exactly once.
        """
        path = root / self.file
        text = path.read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.file} has {count} times, not once: {self.old!r}")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")
