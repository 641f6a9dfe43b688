"""The protocol of a backend: how a job is started, shown and stopped in one kind of place.

A backend keeps its flags, its options and its checks in its own file. The commands know it by this protocol alone.
"""

from typing import Protocol

from launch.job import Job


class Backend(Protocol):
    """A kind of place where training runs. Methods other than those that define flags read the parsed flags."""

    name: str  # the value of --backend
    file_ending: str  # of the file that a dry run writes for each point of a sweep: "yaml", "sh"
    has_large_hosts: bool  # eight chips of v5e or v6e are always in one host here; otherwise --large-hosts decides
    # True: jobs are processes of this machine, `text` is a command line that begins with "python", and `start` returns
    # when the job has ended. False: jobs run on pods, and are checked for all that a pod needs (`check.check_pod`).
    runs_here: bool

    def define_location_flags(self) -> None:
        """Defines the flags that say where the backend keeps its jobs. Every command has them."""
        ...

    def define_launch_flags(self) -> None:
        """Defines the backend's other flags, for the commands that start jobs.

        Flags of several backends are defined in `launch.starting`.
        """
        ...

    def check(self, job: Job) -> None:
        """Raises LaunchError for a job that this backend cannot run. Needs no network."""
        ...

    def text(self, job: Job) -> str:
        """Returns the manifest, script or command line that `start` runs, as a dry run writes it. Needs no network."""
        ...

    def summary(self, job: Job) -> str:
        """Returns half a line for people: how the backend runs the job."""
        ...

    def start(self, job: Job) -> int:
        """Starts the job, and returns the exit code of the command that did.

        Raises:
          UserError: a flag is missing that a dry run does not need.
        """
        ...

    def status(self, name: str, slices: int) -> int:
        """Prints the state of the job of this name and number of slices. Returns an exit code."""
        ...

    def stop(self, name: str, slices: int) -> int:
        """Lets the job save, and ends it. Returns an exit code."""
        ...
