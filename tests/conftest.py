"""Strict runs: eight CPU devices, no silent broadcasting between ranks. (Warnings are errors by pyproject.toml.)"""

import os
import sys

import pytest

from launch.local import cpu_environment

assert "jax" not in sys.modules, "jax reads these variables when it is imported, so nothing may import it before"
os.environ.update(cpu_environment(devices=8))
# Tests compile much and run little: LLVM's optimisations would take most of the suite's time.
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# Tests of plans load libtpu: without these it looks for a TPU host's metadata and locks out a second process.
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
os.environ["TPU_ACCELERATOR_TYPE"] = "v5p-8"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory):
    """A directory in which the subprocesses of a test session share what XLA compiled.

    This process does not use it: jax cannot read back what it compiled for TPUs without a TPU, and warns.
    """
    return tmp_path_factory.mktemp("compilation_cache")


@pytest.fixture
def cpu_env(compilation_cache):
    """`cpu_env(devices=1)` is the environment, a dict, of a subprocess with so many CPU devices."""

    def environment(devices=1):
        return {**cpu_environment(devices), "JAX_COMPILATION_CACHE_DIR": str(compilation_cache)}

    return environment


@pytest.fixture(scope="session")
def emoji_data(tmp_path_factory):
    """The directory of the emoji data, prepared once as configs/emoji.py says."""
    from ecdit.data.records import prepare
    from tests.runs import tiny

    directory = tmp_path_factory.mktemp("emoji_data")
    prepare(tiny(data__directory=str(directory)).data)
    return directory
