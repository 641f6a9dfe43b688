"""Looks after a run's checkpoints.

python -m ecdit.checkpoint list --workdir=runs/emoji                       # step, time, size
python -m ecdit.checkpoint verify --workdir=runs/emoji [--step=N]          # reads all arrays, compares checksums
python -m ecdit.checkpoint export --workdir=runs/emoji --out=emoji_weights # EMA weights, config, tokenizer
python -m ecdit.checkpoint export --workdir=runs/emoji --out=emoji --format=diffusers [--towers]  # for PyTorch
"""

import sys
from pathlib import Path

from absl import flags

from ecdit.checkpoints.inspection import listed, verify
from ecdit.checkpoints.restore import open_reader
from ecdit.command_line import run_command
from ecdit.errors import UserError
from ecdit.files import is_remote
from ecdit.interop.weights import check_folder
from ecdit.runs import exported
from ecdit.runs.diffusers_folder import export_diffusers
from ecdit.runs.model_card import model_card
from ecdit.runs.trained_run import check_public_weights, open_run
from ecdit.storage import as_path

WORKDIR = flags.DEFINE_string("workdir", None, "The run.", required=True)
STEP = flags.DEFINE_integer("step", None, "Of the checkpoint; by default the newest, for verify all.")
OUT = flags.DEFINE_string("out", None, "The folder to export to, which must be missing or empty.")
SHARD_GB = flags.DEFINE_float(
    "shard_gb",
    exported.SHARD_GB,
    "Size of an exported file of weights at most, in GB, unless it is one array.",
    1e-6,
)
FORMAT = flags.DEFINE_enum(
    "format",
    "ecdit",
    ["ecdit", "diffusers"],
    "Of an exported folder: for ecdit.sample, or for PyTorch and diffusers.",
)
TOWERS = flags.DEFINE_boolean(
    "towers", False, "Copy public text encoders and autoencoders into a folder of the format diffusers."
)


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
    if not OUT.value or OUT.value.endswith(".safetensors"):
        raise UserError(f"--out={OUT.value or ''}: name a folder; the weights in it are model.safetensors")
    if is_remote(OUT.value):
        raise UserError(f"--out={OUT.value}: must be a folder of this machine; copy it to the bucket afterwards")
    if TOWERS.value and FORMAT.value != "diffusers":
        raise UserError("--towers: only a folder of --format=diffusers can hold public weights")
    folder, shard_bytes = Path(OUT.value), int(SHARD_GB.value * 1e9)
    check_folder(folder)
    run = open_run(workdir, step=STEP.value, draw=False)
    check_public_weights(workdir, run)
    if FORMAT.value == "diffusers":
        card = model_card(run, workdir, folder.absolute().name, TOWERS.value)
        shards = export_diffusers(run, folder, shard_bytes, card, TOWERS.value)
    else:
        shards = exported.export_run(run, folder, shard_bytes)
    print(f"EMA weights of step {run.step} in {folder}: {len(shards)} file{'s' if len(shards) > 1 else ''} of weights")


if __name__ == "__main__":
    run_command(main, words=True)
