"""Plans a run: `python -m ecdit.plan --config=configs/ec_dit.py:M-64E --json=plan.json` counts what it is made of."""

import dataclasses
import json
from pathlib import Path

from absl import flags

from ecdit.config import check_writable, config_values, define_config_flag, replace_text, run_command
from ecdit.planning.counts import count, report, table_params
from ecdit.training.experiment import make_experiment

CONFIG = define_config_flag()
JSON = flags.DEFINE_string("json", None, "File for the result.")
TABLE_PARITY = flags.DEFINE_bool("table-parity", False, "Count parameters by the rule behind the paper's Table 1.")


def main(argv: list[str]) -> None:
    """Prints the plan; with --json writes it too."""
    del argv
    experiment = make_experiment(config_values(CONFIG))
    if JSON.value:
        check_writable(Path(JSON.value))
    if TABLE_PARITY.value:
        result = {"total_params": table_params(experiment.system), "counted": "as the paper's Table 1"}
        print(f"parameters by Table 1's rule: {result['total_params'] / 1e9:.2f} B")
    else:
        counts = count(experiment)
        result = dataclasses.asdict(counts)
        print("\n".join(report(counts)))
    if JSON.value:
        replace_text(Path(JSON.value), json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
