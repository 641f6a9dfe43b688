"""Causes faults in real runs, one after the other, and checks what is lost and whether the runs end as without faults.

    python -m tests.faults.campaign --trials=100 --seed=1 --out=campaign.jsonl [--data=DIR]

Every trial draws its fault from the seed and its own number. Each is logged as one line of JSON, and none is repeated:
a restarted campaign continues after the last line of --out. It exits with 1 if a trial failed, and prints a table. Full
disks are mounted, which needs root; I/O errors need a C compiler.

A trial passes if the run reports every damage, resumes from the newest valid checkpoint, and ends bitwise like an
uninterrupted twin, in all metrics and the last checkpoint. If the number of processes or the mesh changes, the loss of
the next 20 steps must be within 1e-4 of the twin's, relative.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.faults.kinds import KINDS
from tests.faults.trial import Stage, Trial

# What happens in 25 trials, in this order.
PATTERN = (
    *("kill", "bit flip", "full disk", "truncation", "processes changed", "kill one of two", "SIGTERM"),
    *("vanished checkpoints", "second trainer", "errors of reading", "garbled metrics", "differing hosts"),
    *("kill at a phase boundary", "damage met by two", "bit flip", "kill in a save", "errors of writing", "hang"),
    *("SIGTERM to one of two", "bit flip", "truncation", "bit flip", "kill", "kill one of two", "bit flip"),
)


def do_trial(number: int, seed: int, stage: Stage) -> dict[str, Any]:
    """Does trial `number` (from 0) and says what came of it."""
    kind = PATTERN[number % len(PATTERN)]
    log: dict[str, Any] = {"trial": number, "seed": seed, "kind": kind}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(dir=stage.folder) as folder:
        try:
            KINDS[kind](Trial(random.Random(f"{seed} {number}"), Path(folder), stage, log))
            log |= {"passed": True}
        except Exception as error:
            log |= {"passed": False, "why": f"{type(error).__name__}: {error}"}
    return log | {"seconds": round(time.monotonic() - begin, 1)}


def table(logs: list[dict[str, Any]]) -> str:
    """The trials by kind, as markdown."""
    rows = ["| fault | trials | passed | bitwise equal to the twin | steps lost at most |", "|---|---|---|---|---|"]
    for kind in KINDS:
        found = [log for log in logs if log["kind"] == kind]
        if found:
            lost = max((log.get("lost", 0) for log in found), default=0)
            equal = sum(log.get("bitwise", False) for log in found)
            rows.append(f"| {kind} | {len(found)} | {sum(log['passed'] for log in found)} | {equal} | {lost} |")
    hit = [log for log in logs if log.get("array_data_hit")]
    missed = [log for log in hit if log.get("resumed_from") in log["array_data_hit"]]
    worst = max((log["loss_difference"] for log in logs if "loss_difference" in log), default=0.0)
    summary = f"Trials with damaged array data: {len(hit)}, not found: {len(missed)}. "
    return "\n".join([*rows, "", summary + f"Other processes or mesh: the loss differs by at most {worst:.1e}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--out", type=Path, required=True, help="a line of JSON for every trial")
    parser.add_argument("--data", type=Path, help="prepared emoji data, or where to prepare it")
    parser.add_argument("--cache", type=Path, help="where compiled programs are, or go")
    parser.add_argument("--kinds", help="only the trials of these kinds, with commas between")
    arguments = parser.parse_args()
    done = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    seed = done[0]["seed"] if done else arguments.seed
    print(f"seed {seed}", flush=True)
    wanted = arguments.kinds.split(",") if arguments.kinds else list(KINDS)
    with tempfile.TemporaryDirectory() as scratch, arguments.out.open("a") as out:
        data, cache = arguments.data or Path(scratch) / "data", arguments.cache or Path(scratch) / "cache"
        stage = Stage(Path(scratch), data.absolute(), cache.absolute())
        for number in range(arguments.trials):
            if PATTERN[number % len(PATTERN)] in wanted and number not in {log["trial"] for log in done}:
                done.append(do_trial(number, seed, stage))
                out.write(json.dumps(done[-1]) + "\n")
                out.flush()
                print(json.dumps(done[-1]), flush=True)
    print(table(done))
    sys.exit(0 if all(log["passed"] for log in done) else 1)


if __name__ == "__main__":
    main()
