"""Tests the commands' messages for invalid flags, and the exit codes of their errors."""

import re
import subprocess
import sys

import pytest

from ecdit.config import ConfigError
from ecdit.errors import OutageError, UserError
from ecdit.exit_codes import OUTAGE
from ecdit.storage import check_workdir, expected_error, is_temporary
from tests.forking import run_forked
from tests.runs import ROOT, command, tiny

RAISE = """
from ecdit.command_line import run_command
from ecdit.errors import UserError

def main(argv):
    try:
        raise {inner}
    except Exception as error:
        raise UserError("writing gs://b/run failed") from error

run_command(main)
"""


@pytest.mark.parametrize(
    ("inner", "code"),
    [
        ("ConnectionResetError(104, 'reset')", OUTAGE),
        ("TimeoutError()", OUTAGE),
        ("ValueError('UNAVAILABLE: the bucket cannot be reached')", OUTAGE),
        ("OSError('Forbidden: gs://b/run')", 2),  # gcsfs's for 403, which would come again
        ("OSError(28, 'No space left on device')", 2),
        ("BrokenPipeError(32, 'Broken pipe')", 2),
    ],
)
def test_an_outage_ends_with_the_code_that_launchers_restart(inner, code):
    done = subprocess.run([sys.executable, "-c", RAISE.format(inner=inner)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, "error: writing gs://b/run failed\n")


@pytest.mark.parametrize("how", ["in its handler", "from it"])
def test_a_bug_that_is_met_while_an_outage_is_handled_keeps_its_traceback(how):
    """Libraries wrap an outage in an error of their own, raised from it."""

    def run():
        try:
            raise ConnectionResetError(104, "reset")
        except ConnectionError as error:
            if how == "from it":
                raise ValueError("cannot write") from error
            {}["key"]

    with pytest.raises((KeyError, ValueError)) as raised:
        run()
    found = expected_error(raised.value)
    if how == "from it":
        assert isinstance(found, OutageError)
        assert str(found) == "a bucket or the network cannot be reached: cannot write"
    else:
        assert found is None


def test_missing_rights_are_no_outage():
    gcsfs = pytest.importorskip("gcsfs.retry")
    assert is_temporary(gcsfs.HttpError({"code": 503, "message": "try later"}))
    assert not is_temporary(gcsfs.HttpError({"code": 403, "message": "forbidden"}))


@pytest.mark.parametrize("module", ["train", "sample", "plan", "prepare", "doctor"])
def test_words_without_dashes_are_refused(module, tmp_path, cpu_env):
    """`train.num_steps=5` was once ignored, and 2000 steps began."""
    needed = {
        "train": ["--config=configs/emoji.py", f"--workdir={tmp_path}/run"],
        "sample": ["--workdir=x", "--out=y"],
    }
    done = run_forked(command(module, "train.num_steps=5", *needed.get(module, [])), cpu_env())
    assert done.returncode == 2
    assert done.stderr == (
        "error: train.num_steps=5: this command takes only flags, which begin with --; "
        "write --config.train.num_steps=5\n"
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config", "--workdir=x"], "--config has no value: name a config file, such as --config=configs/emoji.py"),
        (["--workdir=x", "--config"], "--config has no value"),
        (
            ["--config=configs/emoji.py", "--workdir=x", "--config.train.num_steps=1e6"],
            "config.train.num_steps = 1e6: must be a whole number, written in digits, such as 1000000",
        ),
        (
            ["--config=configs/emoji.py", "--workdir=x", "--config.train.num_steps=many"],
            "config.train.num_steps = many: must be a whole number, written in digits\n",
        ),
    ],
)
def test_flags_that_cannot_be_are_said_to_be_so(arguments, says, cpu_env):
    done = run_forked(command("train", *arguments), cpu_env())
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {says}")


def test_help_names_the_config_and_says_that_it_is_executed(cpu_env):
    done = run_forked(command("train", "--help"), cpu_env())
    assert re.search(r"--config: Experiment file FILE.py\[:ARGUMENT\], which is executed", done.stdout)


def test_a_workdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match=re.escape(f"--workdir={tmp_path}/run: must be a directory, not a file")):
        check_workdir(tmp_path / "run")
    check_workdir(tmp_path / "other")


def test_more_steps_than_int32_counts_are_refused():
    assert tiny(train__num_steps=2**31 - 1).train.num_steps == 2**31 - 1
    with pytest.raises(ConfigError, match=re.escape("config.train.num_steps = 2147483648: must be below 2**31")):
        tiny(train__num_steps=2**31)


def test_an_error_prints_no_control_characters(capfd):
    """Names of a stranger's files stand in errors; a terminal would obey their escape sequences."""
    program = (
        "from ecdit.command_line import run_command\nfrom ecdit.errors import UserError\n"
        "def main(argv): raise UserError('\\x1b]0;x\\x07caption\\nsecond line')\nrun_command(main)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: \\x1b]0;x\\x07caption\nsecond line\n")
