"""Looks after a run's checkpoints.

python -m ecdit.checkpoint list --workdir=runs/emoji                          # step, time, size
python -m ecdit.checkpoint verify --workdir=runs/emoji [--step=N]             # reads all arrays, compares checksums
python -m ecdit.checkpoint export --workdir=runs/emoji --out=emoji.safetensors  # the EMA weights
"""

import json
import sys
from pathlib import Path

from absl import flags

from ecdit.checkpoints.inspection import listed, verify
from ecdit.checkpoints.restore import open_reader
from ecdit.command_line import run_command
from ecdit.config import to_dict
from ecdit.errors import UserError
from ecdit.interop.weights import save_weights
from ecdit.runs.trained_run import open_run
from ecdit.storage import as_path

WORKDIR = flags.DEFINE_string("workdir", None, "The run.", required=True)
STEP = flags.DEFINE_integer("step", None, "Of the checkpoint; by default the newest, for verify all.")
OUT = flags.DEFINE_string("out", None, "The safetensors file to write.")


def main(argv: list[str]) -> None:
    """Runs the verb of the command line; verify exits with 1 if it finds damage."""
    verbs = {"verify": _verify, "list": _list, "export": _export}
    if len(argv) != 2 or argv[1] not in verbs:
        raise UserError(f"verbs: {', '.join(verbs)}; got {' '.join(argv[1:]) or 'none'}")
    verbs[argv[1]](as_path(WORKDIR.value))


def _verify(workdir: Path) -> None:
    damaged = 0
    with open_reader(workdir) as manager:
        for finding in verify(manager, STEP.value):
            damaged += bool(finding.damage)
            print(finding.line(), flush=True)
    sys.exit(1 if damaged else 0)


def _list(workdir: Path) -> None:
    with open_reader(workdir) as manager:
        for line in listed(workdir, manager):
            print(line)


def _export(workdir: Path) -> None:
    if not OUT.value or not OUT.value.endswith(".safetensors"):
        raise UserError(f"--out={OUT.value}: name a .safetensors file")
    if Path(OUT.value).exists():
        raise UserError(f"--out={OUT.value}: exists already; take another name, or delete it first")
    run = open_run(workdir, step=STEP.value, draw=False)
    metadata = {"config": json.dumps(to_dict(run.experiment)), "step": str(run.step)}
    save_weights(run.params, Path(OUT.value), metadata)
    print(f"EMA weights of step {run.step} in {OUT.value}")


if __name__ == "__main__":
    run_command(main, words=True)
