"""Prints how a run spent its time: `python -m ecdit.goodput --workdir=runs/emoji`. It works while the run trains."""

from absl import flags

from ecdit.command_line import run_command
from ecdit.errors import UserError
from ecdit.runs.goodput_table import table
from ecdit.runs.ledger import read_records
from ecdit.storage import as_path, reading

WORKDIR = flags.DEFINE_string("workdir", None, "The run.", required=True)


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    workdir = as_path(WORKDIR.value)
    with reading(workdir):
        records = read_records(workdir)
    if not records:
        raise UserError(f"{workdir} has no record of a start")
    for line in table(records):
        print(line)


if __name__ == "__main__":
    run_command(main)
