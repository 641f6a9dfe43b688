"""Plans a run without running it.

    python -m ecdit.plan --config=configs/ec_dit.py:M-64E                          # counts parameters and FLOPs
    python -m ecdit.plan --config=configs/ec_dit.py:M-64E --topology=v5p:4x4x8     # memory, bytes sent, time
    python -m ecdit.plan --config=configs/ec_dit.py --table                        # the table of configs/README.md

With --topology it compiles the trainer's own step for that slice with the real TPU compiler, which needs libtpu but no
TPU and takes minutes. The exit code is 1 if the step does not fit the chips' memory.
"""

import dataclasses
import importlib.metadata
import json
import runpy
import sys
from pathlib import Path
from typing import Any

from absl import flags

from ecdit.command_line import config_origin, config_values, define_config_flag, run_command
from ecdit.errors import UserError
from ecdit.experiment import make_experiment
from ecdit.files import check_file_writable, replace_text
from ecdit.planning.cache import cached_plan, largest, longest, plan_phases
from ecdit.planning.compiler import DoesNotFit, find_target, use_compiler
from ecdit.planning.counts import count, report, table_params
from ecdit.planning.fitting import what_fits
from ecdit.planning.plan import report as plan_report
from ecdit.planning.plan import report_phases
from ecdit.planning.table import known_better, row, write_rows
from ecdit.runs.inputs import inputs_line

CONFIG = define_config_flag()
JSON = flags.DEFINE_string("json", None, "File for the result.")
TABLE_PARITY = flags.DEFINE_bool("table-parity", False, "Count parameters by the rule of the paper's Table 1.")
TOPOLOGY = flags.DEFINE_string("topology", None, "The slice: v5p:4x4x8, v5p-256, or 2xv5p:4x4x8 for two slices.")
TABLE = flags.DEFINE_bool(
    "table", False, "Plan each entry of PLANS in NAME_plans.py beside the config NAME.py, into README.md there."
)
WHAT = flags.DEFINE_enum("what", "train", ["train", "sample"], "The step to plan.")


def main(argv: list[str]) -> None:
    """Prints the plan, and writes it with --json."""
    del argv
    experiment = make_experiment(config_values(CONFIG))
    target = find_target(TOPOLOGY.value) if TOPOLOGY.value else None
    if JSON.value:
        check_file_writable(Path(JSON.value))
    if TABLE_PARITY.value:
        total = table_params(experiment.system)
        write({"total_params": total, "counted": "as the paper's Table 1"})
        print(f"parameters by Table 1's rule: {total / 1e9:.2f} B")
        return
    if TABLE.value:
        write_table(Path(config_origin(CONFIG)["config"].partition(":")[0]))
        return
    print(inputs_line(experiment), flush=True)
    counts = count(experiment)
    print("\n".join(report(counts)), flush=True)
    values = dataclasses.asdict(counts)
    if target is None:
        write(values)
        return
    use_compiler()
    try:
        plans = plan_phases(experiment, target, "sample" if WHAT.value == "sample" else "train")
    except DoesNotFit as error:
        write(values | {"fits": False, "topology": target.name, "error": str(error)})
        print(f"{target.name}: does not fit. {error}", flush=True)
        print(what_fits(experiment, target), flush=True)
        sys.exit(1)
    plan, largest_bytes = longest(plans), largest(plans).hbm_bytes_per_device
    print("\n".join([*plan_report(plan), *report_phases(plans)]))
    better = known_better(config_origin(CONFIG), experiment, target.slice, target.num_slices)
    if better and WHAT.value == "train":
        print(f"known to be faster  {better}")
    write(values | {"fits": True} | dataclasses.asdict(plan) | {"largest_phase_hbm_bytes_per_device": largest_bytes})


def write_table(config_file: Path) -> None:
    """Plans each entry of PLANS in NAME_plans.py for the config NAME.py, and writes the table's rows.

    An entry is (argument, topology), with overrides in a third dict if there are any. Each row is written at once, so
    that an interrupted call can be repeated.

    Raises:
      UserError: NAME_plans.py does not exist.
    """
    use_compiler()
    plans = config_file.with_name(f"{config_file.stem}_plans.py")
    get_config = runpy.run_path(str(config_file))["get_config"]
    if not plans.exists():
        raise UserError(f"--table: needs {plans}, with a tuple PLANS")
    compiler = importlib.metadata.version("libtpu")
    for argument, topology, *overrides in runpy.run_path(str(plans))["PLANS"]:
        changes = overrides[0] if overrides else {}
        name = ", ".join([argument, *(f"{key}={value}" for key, value in changes.items())])
        config = get_config(argument)
        config.update_from_flattened_dict(changes)
        try:
            values = dataclasses.asdict(cached_plan(make_experiment(config), find_target(topology)))
        except DoesNotFit as error:
            print(f"{name} on {topology} does not fit: {error}", flush=True)
            values = {"fits": False, "topology": topology}
        line = row(name, values, compiler)
        print(line, flush=True)
        write_rows(config_file.with_name("README.md"), {(name, topology, compiler): line})


def write(values: dict[str, Any]) -> None:
    """Writes the values to --json if it is set."""
    if JSON.value:
        replace_text(Path(JSON.value), json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
