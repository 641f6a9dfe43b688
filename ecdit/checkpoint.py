"""Exports EMA weights: `python -m ecdit.checkpoint export --workdir=runs/emoji --out=emoji.safetensors`."""

import json
from pathlib import Path

from absl import flags

from ecdit import runtime
from ecdit.conditioning.text_to_image import make_system
from ecdit.config import UserError, run_command, to_dict
from ecdit.interop.weights import save_weights
from ecdit.partitioning import make_mesh
from ecdit.training.checkpoint import restore_ema, saved_experiment

WORKDIR = flags.DEFINE_string("workdir", None, "The run.", required=True)
OUT = flags.DEFINE_string("out", None, "The safetensors file to write.")


def main(argv: list[str]) -> None:
    """Runs the verb of the command line."""
    if argv[1:] != ["export"]:
        raise UserError(f"verbs: export; got {' '.join(argv[1:]) or 'none'}")
    if not OUT.value or not OUT.value.endswith(".safetensors"):
        raise UserError(f"--out={OUT.value}: name a .safetensors file")
    workdir = Path(WORKDIR.value)
    experiment, step = saved_experiment(workdir, [])
    runtime.configure(experiment.runtime)
    params = restore_ema(workdir, make_system(experiment.system), make_mesh(experiment.mesh), step)
    save_weights(params, Path(OUT.value), {"config": json.dumps(to_dict(experiment)), "step": str(step)})
    print(f"EMA weights of step {step} in {OUT.value}")


if __name__ == "__main__":
    run_command(main)
