"""Exports EMA weights: `python -m ecdit.checkpoint export --workdir=runs/emoji --out=emoji.safetensors`."""

import json
from pathlib import Path

from absl import flags

from ecdit.config import UserError, run_command, to_dict
from ecdit.interop.weights import save_weights
from ecdit.training.restored import open_run

WORKDIR = flags.DEFINE_string("workdir", None, "The run.", required=True)
STEP = flags.DEFINE_integer("step", None, "Of the checkpoint; by default the newest.")
OUT = flags.DEFINE_string("out", None, "The safetensors file to write.")


def main(argv: list[str]) -> None:
    """Runs the verb of the command line."""
    if argv[1:] != ["export"]:
        raise UserError(f"verbs: export; got {' '.join(argv[1:]) or 'none'}")
    if not OUT.value or not OUT.value.endswith(".safetensors"):
        raise UserError(f"--out={OUT.value}: name a .safetensors file")
    run = open_run(Path(WORKDIR.value), step=STEP.value, draw=False)
    metadata = {"config": json.dumps(to_dict(run.experiment)), "step": str(run.step)}
    save_weights(run.params, Path(OUT.value), metadata)
    print(f"EMA weights of step {run.step} in {OUT.value}")


if __name__ == "__main__":
    run_command(main)
