"""Makes jobs of the paper's models in this process, and stand-ins for the programs that launchers run."""

import dataclasses
import functools
import sys
import time
from pathlib import Path

from ecdit.experiment import make_experiment
from ecdit.topology import find_slice
from launch.check import make_job
from tests.runs import config_file

WORKDIR = "gs://bucket/runs/m-64e"
IMAGE = f"region-docker.pkg.dev/project/repository/ecdit:1@sha256:{'0123456789abcdef' * 4}"
# Values that a shell, Kubernetes, YAML or a program's options could read as something else.
HOSTILE = [
    *(
        "a b",
        "'",
        '"',
        'it\'s "quoted"',
        "$(touch hacked)",
        "`touch hacked`",
        "$HOME",
        "${HOME}",
        "$$",
        "$(HOME)",
        "\\",
    ),
    *(
        "; touch hacked",
        "&& touch hacked",
        "| touch hacked",
        "> hacked",
        "#",
        "*",
        "?",
        "~",
        "!!",
        "{a,b}",
        "\\n",
        "%s",
    ),
    *("-rf", "--help", "--privileged", "END_OF_LOOP", "- item", "key: value", "null", "yes", "1e3", "&anchor", "!tag"),
    *("Größe", "\u2028", "😀", "", " ", "=", "a=b"),
]


def experiment(model="XL-32E", **overrides):
    config = config_file("ec_dit").get_config(model)
    config.data.placeholder_ok = True
    config.text.frozen_random_ok = True
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in overrides.items()})
    return make_experiment(config)


@functools.cache
def job(accelerator, slices=1, model="XL-32E", workdir=WORKDIR, name="", **overrides):
    origin = {
        "config": f"configs/ec_dit.py:{model}",
        "overrides": {key.replace("__", "."): value for key, value in overrides.items()},
    }
    return make_job(experiment(model, **overrides), origin, find_slice(accelerator), slices, workdir, name)


def placed(accelerator, slices=1):
    """XL-32E on these slices, whether it fits them or not: quicker than `job`, which checks."""
    return dataclasses.replace(job("v5p-256"), slice=find_slice(accelerator), slices=slices)


def install(directory: Path, name: str, code: str) -> None:
    """Puts a program of that name, of Python code, into `directory`."""
    directory.mkdir(exist_ok=True)
    program = directory / name
    program.write_text(f"#!{sys.executable}\n{code}\n")
    program.chmod(0o755)


def wait_for(condition, seconds=120):
    """Waits until `condition()` is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
