"""Shows a job: `python -m launch.status --backend=jobset --workdir=gs://BUCKET/PATH`."""

import sys

from ecdit.command_line import run_command
from launch import jobset, local_job, tpu_vm
from launch.commands import run_all
from launch.flags import define_place

PLACE = define_place()


def main(argv: list[str]) -> None:
    """Exits with the code of the first command that failed."""
    del argv
    place = PLACE()
    if place.backend == "local":
        print("\n".join(local_job.status(place.name)))
        return
    if place.backend == "jobset":
        commands = jobset.status_commands(place.name, place.namespace, place.context)
    else:
        commands = tpu_vm.status_commands(place.name, place.slices, place.project, place.zone)
    sys.exit(run_all(commands))


if __name__ == "__main__":
    run_command(main)
