"""Strict runs: eight CPU devices, no silent broadcasting between ranks. (Warnings are errors by pyproject.toml.)

The emoji data is prepared once for the worker processes of pytest-xdist: the first that needs it prepares it while the
other waits.
"""

import contextlib
import fcntl
import os
import sys

import pytest

from launch.local import cpu_environment
from tests.quick import QUICK_COMPILATION

assert "jax" not in sys.modules, "jax reads these variables when it is imported, so nothing may import it before"
os.environ.update(cpu_environment(devices=8))
os.environ["XLA_FLAGS"] += f" {QUICK_COMPILATION}"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# Tests of plans load libtpu: without these it looks for a TPU host's metadata and locks out a second process.
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
os.environ["TPU_ACCELERATOR_TYPE"] = "v5p-8"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

from tests.checked_calls import check_calls  # noqa: E402  # it imports jax

check_calls()

# The folders whose tests refuse silent promotion of dtypes. It cannot be refused where optax updates parameters,
# because Adam's bias correction raises a Python number to the power of an int32.
STRICT_DTYPES = ("tests/models/", "tests/diffusion/")


@pytest.fixture(autouse=True)
def dtype_promotion(request):
    """Makes implicit promotion of dtypes an error in the folders STRICT_DTYPES."""
    import jax

    with jax.numpy_dtype_promotion("strict" if request.node.nodeid.startswith(STRICT_DTYPES) else "standard"):
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """The directory that all workers of this test session share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory):
    """The directory in which the child processes of a worker share what XLA compiled.

    It is new in each session and each worker's own, because JAX writes its entries in place: one that is read while it
    is written, or whose writer was killed, costs a warning and a compilation. This process does not use it: jax cannot
    read back what it compiled for TPUs without a TPU, and warns.
    """
    return tmp_path_factory.mktemp("compilation_cache")


@pytest.fixture(scope="session")
def cpu_env(compilation_cache):
    """`cpu_env(devices=1)` is the environment, a dict, of a subprocess with so many CPU devices."""

    def environment(devices=1):
        return {**cpu_environment(devices), "JAX_COMPILATION_CACHE_DIR": str(compilation_cache)}

    return environment


@contextlib.contextmanager
def locked(path):
    """Holds the lock of a file, which ends with the process that holds it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def emoji_data(shared):
    """The directory of the emoji data, prepared once as configs/emoji.py says."""
    from ecdit.data.prepared import prepare
    from tests.runs import tiny

    directory = shared / "emoji_data"
    with locked(shared / "emoji_data.lock"):
        prepare(tiny(data__directory=str(directory)).data)  # does nothing where another worker has done it
    return directory


@pytest.fixture
def toy(tmp_path):
    """A run of a toy in the model's place; its data is a counter."""
    from tests.checkpoints.toy import Toy

    return Toy(tmp_path / "run")


# Where the files are that take longest. The workers begin with them, so that none is left with one at the end.
LONGEST = ("tests/system/", "tests/benchmarks/", "tests/planning/", "tests/faults/", "tests/launch/", "tests/training/")


def pytest_collection_modifyitems(items):
    """Orders files by LONGEST, and leaves the tests of a file in their order."""
    place = {folder: n for n, folder in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get("/".join(item.nodeid.split("/")[:2]) + "/", len(place)))


# What may be missing where CI runs: files that are not in the repository, and programs that pip cannot install.
EXPECTED_SKIPS = (
    "no shared/",
    "the emoji sets are not fetched",
    "ECDIT_XPK names no xpk",
    "gcloud is not installed",
    "chromium is not installed",
    "there is no C compiler",
    "needs the extra parity",
    "ECDIT_SCREENSHOTS names no folder",
)


def fail_unexpected_skip(report):
    """Makes a skip a failure where CI asks for it, so that no test is lost by a package that is not installed."""
    if os.environ.get("ECDIT_FAIL_ON_SKIP") and report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not reason.startswith(EXPECTED_SKIPS):
            report.outcome, report.longrepr = "failed", f"skipped, which CI does not expect: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return fail_unexpected_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return fail_unexpected_skip((yield))
