"""Defines the flags of commands with a config file, runs commands, and reports users' errors."""

import functools
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from absl import app, flags, logging

from ecdit.config import ConfigError
from ecdit.errors import UserError
from ecdit.exit_codes import INTERRUPTED, OUTAGE


def define_config_flag() -> flags.FlagHolder:
    """Defines `--config=FILE.py[:ARGUMENT]` with its overrides `--config.a.b=value`."""
    from ml_collections import config_flags

    flag = config_flags.DEFINE_config_file(
        "config", None, "Experiment file FILE.py[:ARGUMENT], which is executed; --config.a.b=value overrides a field."
    )
    # --help lists only the flags of the command's own module.
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["config"])
    return flag


def config_values(flag: flags.FlagHolder) -> Mapping[str, Any]:
    """Returns the values of the config file in the flag.

    Raises:
      UserError: no file was named, or it does not exist.
    """
    if flag.value is None:
        raise UserError("--config is missing: name a config file, such as configs/emoji.py")
    return _existing(flags.FLAGS[flag.name])


def config_origin(flag: flags.FlagHolder) -> dict[str, Any]:
    """Returns the config file with its :argument, and the overrides, that `config_values` used."""
    return _origin(flags.FLAGS[flag.name])


def parse_config(arguments: Sequence[str]) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Returns `config_values` and `config_origin` for a command with these `--config...` flags.

    Raises:
      UserError: the file does not exist, a key is unknown, or a field cannot have its value.
    """
    from ml_collections import config_flags

    argv, values = ["", *arguments], flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=argv)
    _parse_flags(argv, values)
    return _existing(values["config"]), _origin(values["config"])


def _existing(chosen: Any) -> Mapping[str, Any]:
    import ml_collections

    if not isinstance(chosen.value, ml_collections.ConfigDict):
        raise UserError(f"--config={chosen.config_filename}: no such config file")
    return cast(Mapping[str, Any], chosen.value)  # a ConfigDict has the methods of a Mapping


def _origin(chosen: flags.Flag) -> dict[str, Any]:
    from ml_collections import config_flags

    overrides = config_flags.get_override_values(chosen)
    return {"config": config_flags.get_config_filename(chosen), "overrides": overrides}


def run_command(main: Callable[[list[str]], None], known_only: bool = False, words: bool = False) -> None:
    """Runs a command: parses its flags, calls `main(remaining argv)`, and prints user errors without a traceback.

    The exit code is 2 after a UserError or an OSError, OUTAGE if a bucket or the network could not be reached, and
    INTERRUPTED after Ctrl-C.

    Args:
      main: the command.
      known_only: whether undefined flags stay in the remaining argv.
      words: whether arguments other than flags are allowed.
    """

    def quiet_main(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax logs twenty lines per save
        if len(argv) > 1 and not words and not known_only:
            hint = f"; write --config.{argv[1]}" if "=" in argv[1] else ""
            raise UserError(f"{argv[1]}: this command takes only flags, which begin with --{hint}")
        main(argv)

    try:
        app.run(quiet_main, flags_parser=functools.partial(_parse_flags, known_only=known_only))
    except KeyboardInterrupt:
        sys.stdout.flush()
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)
    except Exception as error:
        from ecdit.storage import expected_error, is_temporary  # imported here, so that other commands start faster

        problem = expected_error(error)  # an OSError is a path that is missing, forbidden or on a full disk
        if problem is None:
            raise
        sys.stdout.flush()
        print(f"error: {_printable(str(problem))}", file=sys.stderr, flush=True)
        # Exit immediately, because threads of a failed save would print or fail while Python shuts down.
        os._exit(OUTAGE if is_temporary(problem) else 2)


def _printable(message: str) -> str:
    """Returns a message with control characters escaped, except newlines, because it may quote an untrusted file."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], message)


def _plain(message: str) -> str:
    """Returns absl's message, or a plainer one if a whole number is written differently, such as 1e3."""
    found = re.fullmatch(r"flag --(config\.\S+)=(\S+): invalid literal for int\(\).*", message)
    if not found:
        return message
    key, text = found.groups()
    try:
        exact = f", such as {int(float(text))}" if float(text).is_integer() else ""
    except ValueError:
        exact = ""
    return f"{key} = {text}: must be a whole number, written in digits{exact}"


def _parse_flags(argv: list[str], values: flags.FlagValues = flags.FLAGS, known_only: bool = False) -> list[str]:
    """Parses flags with absl, and shortens its errors, which are long and do not name an unknown override."""
    for word, after in zip(argv, [*argv[1:], "--"], strict=True):
        if word in ("--config", "-config") and after.startswith("-"):
            raise UserError("--config has no value: name a config file, such as --config=configs/emoji.py")
    try:
        return values(argv, known_only=known_only)
    except flags.Error as error:
        raise UserError(_plain(str(error))) from None
    except (AttributeError, KeyError) as error:
        overrides = [argument.removeprefix("--config.") for argument in argv if argument.startswith("--config.")]
        unknown = re.sub(r"\W+", " ", str(error)).split()[0]
        for key, _, value in (override.partition("=") for override in overrides):
            if unknown in key.split("."):
                raise ConfigError(key, value, f"the config file has no key {unknown!r}") from None
        raise
