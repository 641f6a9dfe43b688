"""Defines the protocol of a backend, which starts, shows and stops jobs in one kind of place.

A backend has its flags, options and checks in its own file. The commands use only this protocol.
"""

from typing import Protocol

from launch.job import Job


class Backend(Protocol):
    """A kind of place where training runs. Methods other than those that define flags read the parsed flags."""

    name: str  # the value of --backend
    file_ending: str  # ending of a dry run's files for the points of a sweep: "yaml", "sh"
    has_large_hosts: bool  # whether one host always has eight chips of v5e or v6e; otherwise --large-hosts decides
    # True: jobs are processes of this machine, `text` is a command line that begins with "python", and `start` returns
    # when the job has ended. False: jobs run on pods, and `check.check_pod` checks the needs of a pod.
    runs_here: bool

    def define_location_flags(self) -> None:
        """Defines the flags of the place in which jobs run. Every command has them."""
        ...

    def define_launch_flags(self) -> None:
        """Defines the backend's other flags, for the commands that start jobs.

        `launch.starting` defines the flags that several backends share.
        """
        ...

    def check(self, job: Job) -> None:
        """Raises LaunchError for a job that this backend cannot run. Needs no network."""
        ...

    def text(self, job: Job) -> str:
        """Returns the manifest, script or command line that `start` runs, as a dry run writes it. Needs no network."""
        ...

    def summary(self, job: Job) -> str:
        """Returns a short text on how the backend runs the job."""
        ...

    def needs(self, job: Job) -> list[str]:
        """Returns a line for every place where hosts must have folders or files that the launcher does not bring."""
        ...

    def start(self, job: Job) -> int:
        """Starts the job, and returns the exit code of the command that started it.

        Raises:
          UserError: a flag that a dry run does not need is missing.
        """
        ...

    def status(self, name: str, slices: int) -> int:
        """Prints the state of the job of this name and number of slices. Returns an exit code."""
        ...

    def stop(self, name: str, slices: int) -> int:
        """Lets the job save, and ends it. Returns an exit code."""
        ...
