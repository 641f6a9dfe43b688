"""Adds a backend that only prints: `python -m tests.launch.noting COMMAND FLAG...` runs a command of launch with it.

It shows that the commands need only a backend's protocol.
"""

import importlib
import sys

from absl import flags

from ecdit.command_line import run_command
from launch.backends import BACKENDS
from launch.job import LaunchError

FLAGS = flags.FLAGS


class Noting:
    name = "noting"
    file_ending = "note"
    has_large_hosts = True
    runs_here = False

    def define_location_flags(self):
        flags.DEFINE_string("desk", "plain", "noting: where notes lie.")

    def define_launch_flags(self):
        flags.DEFINE_string("ink", "black", "noting: of notes.")

    def check(self, job):
        if job.slices > 1:
            raise LaunchError("noting takes one slice")

    def text(self, job):
        return f"{job.name} on {job.hosts} hosts: {FLAGS['ink'].value}, {FLAGS['desk'].value}\n"

    def summary(self, job):
        return f"a note in {FLAGS['ink'].value}"

    def needs(self, job):
        return []

    def start(self, job):
        print("started", self.text(job), end="")
        return 5

    def status(self, name, slices):
        print("status", name, slices, FLAGS["desk"].value)
        return 6

    def stop(self, name, slices):
        print("stop", name, slices, FLAGS["desk"].value)
        return 7


if __name__ == "__main__":
    command = sys.argv.pop(1)
    BACKENDS[Noting.name] = Noting()
    run_command(importlib.import_module(f"launch.{command}").main, known_only=command == "sweep")
