"""Forks commands from a process that has imported JAX, because the import takes most of a short command's time.

The server is the standard library's: a fresh process with one thread, which imports the commands' modules and uses no
device. A forked command has its own process id, exit code, environment and outputs, like any other. It cannot show that
the command imports its modules, for which there is one real start of each command (`runs.run`), and it ignores
variables that Python reads when it starts, such as PYTHONPATH.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTED = (
    "ecdit.runs.training_run",
    "ecdit.runs.trained_run",
    "ecdit.checkpoints.inspection",
    "ecdit.interop.weights",
)
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(list(IMPORTED))
# JAX has read these when it was imported. The others are the same for all tests.
_CONFIGURED = {"JAX_COMPILATION_CACHE_DIR": "jax_compilation_cache_dir"}


def run_forked(arguments: Sequence[str], env: Mapping[str, str], timeout: float = 300) -> subprocess.CompletedProcess:
    """Runs `python -m MODULE FLAG...` from the root of the checkout; as `subprocess.run` with captured text."""
    python, dash, module, *flags = arguments
    assert (python, dash) == (sys.executable, "-m"), arguments
    with tempfile.TemporaryDirectory() as scratch:
        outputs = [Path(scratch, name) for name in ("out", "err")]
        process = _CONTEXT.Process(target=_command, args=(module, flags, dict(env), *map(str, outputs)))
        threads = os.environ.get("OPENBLAS_NUM_THREADS")
        os.environ["OPENBLAS_NUM_THREADS"] = "1"  # for the server, if this starts it: with one thread a fork is safe
        process.start()
        os.environ.pop("OPENBLAS_NUM_THREADS") if threads is None else os.environ.update(OPENBLAS_NUM_THREADS=threads)
        process.join(timeout)
        late = process.is_alive()
        if late:
            process.kill()
            process.join()
        out, err = (path.read_text() if path.exists() else "" for path in outputs)
        if late:
            raise subprocess.TimeoutExpired(arguments, timeout, out, err)
        return subprocess.CompletedProcess(arguments, process.exitcode, out, err)


def _command(module: str, flags: list[str], env: dict[str, str], out: str, err: str) -> None:
    """Runs the command in the forked process, with the streams and the environment of a process of its own."""
    for path, descriptor in ((os.devnull, 0), (out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - multiprocessing has put another file there
    import jax

    names = {name for name in env.keys() | os.environ.keys() if name.startswith("JAX_")} - set(_CONFIGURED)
    different = sorted(name for name in names if env.get(name) != os.environ.get(name))
    assert not different, f"only a fresh process can see {different}"
    for name, field in _CONFIGURED.items():
        if name in env:
            jax.config.update(field, env[name])
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    sys.argv = [module, *flags]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
