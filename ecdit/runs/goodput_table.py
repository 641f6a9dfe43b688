"""Makes a table of where the time of a run went."""

from collections.abc import Iterator, Sequence

from ecdit.runs.ledger import Record, account, life

MEANING = {
    "step": "steps that stayed",
    "data": "waiting for batches",
    "compile": "the first steps of each start and phase, compiled",
    "save": "waiting for saves",
    "draw": "drawing images",
    "restore": "reading checkpoints, or drawing parameters",
    "prepare": "preparing data",
    "start": "starting: imports, devices, the other processes",
    "lost": "steps and batches that a later start did again",
    "down": "between processes: killed, stopped or not started yet",
}


def table(records: Sequence[Record]) -> Iterator[str]:
    """Yields a line for each of MEANING, one for what is not accounted for, and the sum."""
    seconds, whole = account(records), life(records)
    for name, meaning in MEANING.items():
        yield _line(name, seconds.get(name, 0.0), whole, meaning)
    yield _line("unknown", whole - sum(seconds.values()), whole, "not accounted for")
    yield _line("all", whole, whole, f"of {len(records)} starts")


def _line(name: str, seconds: float, whole: float, meaning: str) -> str:
    share = seconds / whole if whole else 0.0
    return f"{name:<8}{seconds:>12.1f} s  {share:>6.1%}  {meaning}"
