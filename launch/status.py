"""Shows a job: `python -m launch.status --backend=jobset --workdir=gs://BUCKET/PATH`."""

import sys

from ecdit.command_line import run_command
from launch.flags import define_location_flags

LOCATION = define_location_flags()


def main(argv: list[str]) -> None:
    """Shows the job, and exits with the code of the first command that failed."""
    del argv
    location = LOCATION()
    sys.exit(location.backend.status(location.name, location.slices))


if __name__ == "__main__":
    run_command(main)
