"""Evaluates a run, images or features: `python -m ecdit.evaluate NAME --flags`; docs/evaluation.md has the names.

`python -m ecdit.evaluate retrieval --workdir=runs/emoji` samples captions and looks the images up.
"""

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from absl import flags

from ecdit.command_line import run_command
from ecdit.errors import UserError

# A module has `define_flags(values)` and `run(values)`. Only the chosen one is imported, so that scorers, which need
# NumPy alone, start at once, and the flags of one evaluation are no other's.
EVALUATIONS = {
    "retrieval": "ecdit.commands.retrieval",
    "loss": "ecdit.commands.loss",
    "shapes": "ecdit.commands.shapes",
    "geneval-score": "ecdit.commands.geneval_score",
    "geneval": "ecdit.commands.geneval",
    "geneval2-score": "ecdit.commands.geneval2_score",
    "dsg-score": "ecdit.commands.dsg_score",
    "dpg-score": "ecdit.commands.dpg_score",
    "frechet": "ecdit.commands.frechet",
    "kid": "ecdit.commands.kid",
    "cmmd": "ecdit.commands.cmmd",
    "precision-recall": "ecdit.commands.precision_recall",
    "clip-score": "ecdit.commands.clip_score",
    "paper": "ecdit.commands.paper",
}


def choose(arguments: Sequence[str]) -> ModuleType | None:
    """Returns the module of the evaluation that the first argument names, or None.

    The name comes first, because behind flags it could as well be a flag's value.
    """
    name = arguments[0] if arguments else ""
    return importlib.import_module(EVALUATIONS[name]) if name in EVALUATIONS else None


def main(argv: list[str]) -> None:
    """Runs the evaluation that the command line names."""
    chosen = choose(argv[1:])
    if chosen is None or len(argv) > 2:
        raise UserError(
            f"evaluations: {', '.join(EVALUATIONS)}; the name comes first; got {' '.join(argv[1:]) or 'none'}"
        )
    chosen.run(flags.FLAGS)


if __name__ == "__main__":
    module = choose(sys.argv[1:])
    if module is not None:
        module.define_flags(flags.FLAGS)
        flags.adopt_module_key_flags(module)
    # Without a name no flag is defined, and an error should say that the name is missing rather than that a flag is.
    run_command(main, known_only=module is None, words=True)
