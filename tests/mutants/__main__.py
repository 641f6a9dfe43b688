"""Makes the program wrong in one place at a time and runs the tests that must notice.

    python -m tests.mutants [--only=TEXT] [--jobs=2] [--out=FILE] [--list]

Every mutant is applied to a copy of the checkout, as it is on disk, and never to the checkout itself. First the tests
that any mutant names run on an unchanged copy: all must pass there. A mutant is
  dead      if a test fails (exit code 1 of pytest);
  alive     if all pass: the tests have a hole, or the mutant changes nothing;
  broken    if pytest could not run the tests, so nothing is known: the mutant or its list of tests must be mended.
--out gets a line of JSON for each, and is read first: a mutant that died is not run again while its file and its tests
are unchanged. Exits with 1 unless all are dead. Needs what the tests need: pip install -e '.[emoji,test]'.
"""

import argparse
import concurrent.futures
import hashlib
import importlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.mutants.mutant import Mutant

ROOT = Path(__file__).parents[2]
NOT_AREAS = ("__init__", "__main__", "mutant")
AREAS = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in NOT_AREAS)
TIMEOUT = 900  # seconds that the tests of one mutant may take


def all_mutants() -> list[tuple[str, Mutant]]:
    """Every mutant with its area, which is the file of this folder that lists it."""
    return [(area, mutant) for area in AREAS for mutant in importlib.import_module(f"tests.mutants.{area}").MUTANTS]


def copy_checkout(folder: Path) -> Path:
    """Copies the files of the checkout that git tracks or would track into `folder`."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def run_tests(root: Path, tests: tuple[str, ...], first_failure: bool = True) -> tuple[int | str, float, str]:
    """Runs tests of the copy at `root`: exit code or "timeout", seconds, and the last lines that pytest printed."""
    stop = ["-x"] if first_failure else []
    command = [sys.executable, "-B", "-m", "pytest", *stop, "-q", "-n", "0", "-m", "", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    begin = time.monotonic()
    try:
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
        code, text = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired:
        code, text = "timeout", f"no end after {TIMEOUT} s"
    return code, time.monotonic() - begin, "\n".join(text.strip().splitlines()[-6:])


def kill(area: str, mutant: Mutant, root: Path) -> dict[str, Any]:
    """Applies a mutant to the copy at `root`, runs its tests, and puts the file back."""
    original = (ROOT / mutant.file).read_text(encoding="utf-8")
    record = identity(area, mutant)
    try:
        mutant.apply(root)
        code, seconds, text = run_tests(root, mutant.tests)
    except ValueError as error:
        return record | {"state": "broken", "seconds": 0.0, "said": str(error)}
    finally:
        (root / mutant.file).write_text(original, encoding="utf-8")
    state = {0: "alive", 1: "dead"}.get(code, "broken")
    return record | {"state": state, "seconds": round(seconds, 1), "said": text if state != "dead" else ""}


def identity(area: str, mutant: Mutant) -> dict[str, Any]:
    """What tells a mutant from another, with a hash of the file it changes and of the tests it names."""
    read = sorted({mutant.file, *(test.split("::")[0] for test in mutant.tests)})
    digest = hashlib.sha256()
    for name in read:
        digest.update((ROOT / name).read_bytes())
    fields = {"area": area, "file": mutant.file, "old": mutant.old, "new": mutant.new, "tests": list(mutant.tests)}
    return {**fields, "hash": digest.hexdigest()[:16]}


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
    parser.add_argument("--only", default="", help="mutants whose area, file or text holds this")
    parser.add_argument("--jobs", type=int, default=2, help="how many run at once, each in its own copy")
    parser.add_argument("--out", type=Path, help="a line of JSON for every mutant")
    parser.add_argument("--list", action="store_true", help="only say which there are")
    arguments = parser.parse_args()
    chosen = [(a, m) for a, m in all_mutants() if arguments.only in f"{a} {m.file} {m.old} {m.new}"]
    if arguments.list:
        for area, mutant in chosen:
            print(f"{area}: {mutant.file}: {mutant.old!r} -> {mutant.new!r}")
        return
    earlier = arguments.out.read_text().splitlines() if arguments.out and arguments.out.exists() else []
    keys = ("area", "file", "old", "new", "tests", "hash")
    dead = {json.dumps([r[k] for k in keys]): r for r in map(json.loads, earlier) if r["state"] == "dead"}
    found = [dead.get(json.dumps([identity(a, m)[k] for k in keys])) for a, m in chosen]
    todo = [pair for pair, record in zip(chosen, found, strict=True) if record is None]
    records = [record for record in found if record is not None]

    with tempfile.TemporaryDirectory() as scratch:
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for job in range(arguments.jobs):
            copies.put(copy_checkout(Path(scratch) / str(job)))
        tests = tuple(sorted({test for _, mutant in todo for test in mutant.tests}))
        if tests:
            print(f"{len(todo)} mutants; first their tests on the unchanged program", flush=True)
            code, seconds, text = run_tests(copy_checkout(Path(scratch) / "unchanged"), tests, first_failure=False)
            print(f"{text}\n({seconds:.0f} s)", flush=True)
            if code != 0:
                sys.exit("the tests do not pass on the unchanged program")

        def do(pair: tuple[str, Mutant]) -> dict[str, Any]:
            root = copies.get()
            try:
                return kill(*pair, root)
            finally:
                copies.put(root)

        with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
            for record in pool.map(do, todo):
                records.append(record)
                print(f"{record['state']:7}{record['seconds']:7.1f} s  {record['file']}: {record['new']!r}", flush=True)
                if arguments.out:
                    with arguments.out.open("a") as out:
                        out.write(json.dumps(record) + "\n")
    print(table(records))
    sys.exit(0 if all(record["state"] == "dead" for record in records) else 1)


if __name__ == "__main__":
    main()
