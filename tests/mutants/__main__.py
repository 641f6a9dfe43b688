"""Makes the program wrong in one place at a time and runs the tests that must notice.

    python -m tests.mutants [--only=AREA] [--jobs=2] [--out=FILE] [--list]

Every mutant is applied to a copy of the checkout, as it is on disk, and never to the checkout itself. First each
mutant's tests run on an unchanged copy, in the same way: all must pass there. A mutant is
  dead      if a test fails;
  alive     if all pass: the tests have a hole, or the mutant changes nothing;
  broken    if pytest could not collect or run the tests, so nothing is known: mend the mutant or its list of tests.
--out gets a line of JSON for each, with the test that failed and what it said, and is read first: a mutant that died is
not run again while its file and its tests are unchanged. Exits with 1 unless all are dead. Needs what the tests need:
pip install -e '.[emoji,test]'.
"""

import argparse
import concurrent.futures
import contextlib
import hashlib
import importlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tests.mutants.mutant import Mutant

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
NOT_AREAS = ("__init__", "__main__", "mutant", "test_mutants")
AREAS = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in NOT_AREAS)
TIMEOUT = 900  # seconds that the tests of one mutant may take
KEYS = ("area", "file", "old", "new", "tests", "hash")  # of a record: what tells a mutant from another


class Outcome(NamedTuple):
    """What pytest made of some tests."""

    state: str  # "passed", "failed" or "broken"
    seconds: float
    said: str  # the first test that failed and its error, or the last lines that pytest printed


def all_mutants() -> list[tuple[str, Mutant]]:
    """Every mutant with its area, which is the file of this folder that lists it."""
    return [(area, mutant) for area in AREAS for mutant in importlib.import_module(f"tests.mutants.{area}").MUTANTS]


def choose(only: str) -> list[tuple[str, Mutant]]:
    """The mutants of the area `only`; if there is no such area, those whose file or text holds it."""
    if only in AREAS:
        return [(area, mutant) for area, mutant in all_mutants() if area == only]
    return [(area, mutant) for area, mutant in all_mutants() if only in f"{mutant.file} {mutant.old} {mutant.new}"]


def copy_checkout(folder: Path) -> Path:
    """Copies the files of the checkout that git tracks or would track into `folder`."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def run_tests(root: Path, tests: tuple[str, ...]) -> Outcome:
    """Runs tests of the copy at `root`, up to the first that fails."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        options = ["-x", "-q", "-n", "0", "-m", "", "-p", "no:cacheprovider", "-o", "junit_family=xunit2"]
        command = [sys.executable, "-B", "-m", "pytest", *options, f"--junitxml={report}", *tests]
        # PYTHONPATH: commands that tests start elsewhere must not import an installed ecdit, which is no mutant.
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(root)}
        begin = time.monotonic()
        with (Path(scratch) / "printed").open("w+") as printed:
            child = subprocess.Popen(
                command, cwd=root, env=environment, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = child.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with contextlib.suppress(ProcessLookupError):  # with what the tests have started and left
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
            printed.seek(0)
            last_lines = "\n".join(printed.read().strip().splitlines()[-6:])
        seconds = time.monotonic() - begin
        if code is None:
            return Outcome("broken", seconds, f"no end after {TIMEOUT} s")
        if code == 1:
            # Under -x pytest ends with 1 for a file that it cannot import, too: that is no test that failed.
            failed = first_failure(report)
            return Outcome("failed", seconds, failed) if failed else Outcome("broken", seconds, last_lines)
        if code == 0:
            return Outcome("passed", seconds, last_lines)
        return Outcome("broken", seconds, f"pytest ended with {code}, where 0 and 1 are results\n{last_lines}")


def first_failure(report: Path) -> str:
    """The first test in pytest's XML report that failed, or whose fixture did, and the error; "" without one."""
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        for found in (*case.iterfind("failure"), *case.iterfind("error")):
            message = " ".join(found.get("message", "").split())
            if message != "collection failure":
                return f"{case.get('classname')}::{case.get('name')}: {message[:300]}"
    return ""


def identity(area: str, mutant: Mutant) -> dict[str, Any]:
    """What tells a mutant from another, with a hash of the file it changes and of the tests it names."""
    read = sorted({mutant.file, *(test.split("::")[0] for test in mutant.tests)})
    digest = hashlib.sha256()
    for name in read:
        digest.update((ROOT / name).read_bytes())
    fields = {"area": area, "file": mutant.file, "old": mutant.old, "new": mutant.new, "tests": list(mutant.tests)}
    return {**fields, "hash": digest.hexdigest()[:16]}


def kill(mutant: Mutant, root: Path) -> dict[str, Any]:
    """Applies a mutant to the copy at `root`, runs its tests, and puts the file back: state, seconds, what was said."""
    path = root / mutant.file
    original = path.read_text(encoding="utf-8")
    try:
        mutant.apply(root)
        outcome = run_tests(root, mutant.tests)
    except ValueError as error:
        outcome = Outcome("broken", 0.0, str(error))
    finally:
        path.write_text(original, encoding="utf-8")
    state = {"passed": "alive", "failed": "dead", "broken": "broken"}[outcome.state]
    return {"state": state, "seconds": round(outcome.seconds, 1), "said": outcome.said}


class Copies:
    """Unchanged copies of the checkout, one for each job."""

    def __init__(self, scratch: Path, jobs: int):
        self.jobs, self.free = jobs, queue.SimpleQueue()
        for job in range(jobs):
            self.free.put(copy_checkout(scratch / str(job)))

    def map(self, function: Callable[[Any, Path], T], items: list[Any]) -> Iterator[T]:
        """function(item, a copy that is its own) of each, `jobs` at a time, in order; it leaves the copy unchanged."""

        def do(item: Any) -> T:
            root = self.free.get()
            try:
                return function(item, root)
            finally:
                self.free.put(root)

        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            yield from pool.map(do, items)


def check_unchanged(copies: Copies, todo: list[Mutant]) -> None:
    """Runs each mutant's tests on the unchanged program, and exits if some do not pass."""
    sets = list(dict.fromkeys(mutant.tests for mutant in todo))
    print(f"{len(todo)} mutants; first their {len(sets)} sets of tests on the unchanged program", flush=True)
    begin = time.monotonic()
    outcomes = copies.map(lambda tests, root: run_tests(root, tests), sets)
    failed = 0
    for tests, found in zip(sets, outcomes, strict=True):
        if found.state != "passed":
            failed += 1
            print(f"{found.state}: {' '.join(tests)}\n{found.said}", flush=True)
    if failed:
        sys.exit("the tests do not pass on the unchanged program")
    print(f"({time.monotonic() - begin:.0f} s)", flush=True)


def earlier_records(out: Path | None) -> dict[str, dict[str, Any]]:
    """The last record of each mutant in `out`, by its identity."""
    lines = out.read_text().splitlines() if out and out.exists() else []
    return {json.dumps([record[key] for key in KEYS]): record for record in map(json.loads, lines)}


def table(records: list[dict[str, Any]]) -> str:
    """The mutants by area, as markdown, and below it those that are not dead."""
    rows = ["| area | mutants | dead | minutes |", "|---|---|---|---|"]
    for area in (*AREAS, "all"):
        of_area = [record for record in records if area in ("all", record["area"])]
        if of_area:
            dead = sum(record["state"] == "dead" for record in of_area)
            rows.append(f"| {area} | {len(of_area)} | {dead} | {sum(r['seconds'] for r in of_area) / 60:.1f} |")
    for record in records:
        if record["state"] != "dead":
            rows += ["", f"{record['state']}: {record['file']}: {record['old']!r} -> {record['new']!r}", record["said"]]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="an area, or what the file or the text of a mutant holds")
    parser.add_argument("--jobs", type=int, default=2, help="how many run at once, each in its own copy")
    parser.add_argument("--out", type=Path, help="a line of JSON for every mutant")
    parser.add_argument("--list", action="store_true", help="only say which there are")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it, too, waits for the tests that run
    chosen = choose(arguments.only)
    if not chosen:
        sys.exit(f"--only={arguments.only}: no mutant; areas: {', '.join(AREAS)}")
    if arguments.list:
        for area, mutant in chosen:
            print(f"{area}: {mutant.file}: {mutant.old!r} -> {mutant.new!r}")
        return
    earlier, records, todo = earlier_records(arguments.out), [], []
    for area, mutant in chosen:
        own = identity(area, mutant)
        known = earlier.get(json.dumps([own[key] for key in KEYS]), {})
        if known.get("state") == "dead":
            records.append(known)
        else:
            todo.append((own, mutant))
    with tempfile.TemporaryDirectory() as scratch:
        copies = Copies(Path(scratch), arguments.jobs)
        if todo:
            check_unchanged(copies, [mutant for _, mutant in todo])
        results = copies.map(lambda pair, root: kill(pair[1], root), todo)
        for (own, mutant), result in zip(todo, results, strict=True):
            records.append(own | result)
            print(f"{result['state']:7}{result['seconds']:7.1f} s  {mutant.file}: {mutant.new!r}", flush=True)
            if arguments.out:
                with arguments.out.open("a") as out:
                    out.write(json.dumps(records[-1]) + "\n")
    print(table(records))
    sys.exit(0 if all(record["state"] == "dead" for record in records) else 1)


if __name__ == "__main__":
    main()
