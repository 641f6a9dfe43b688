"""The flags of commands that take a config file, and how a command runs and reports a user's error."""

import functools
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from absl import app, flags, logging

from ecdit.config import ConfigError
from ecdit.errors import UserError


def define_config_flag() -> flags.FlagHolder:
    """Defines `--config=FILE.py[:ARGUMENT]` with its overrides `--config.a.b=value`."""
    from ml_collections import config_flags

    return config_flags.DEFINE_config_file("config", None, "Experiment file, with an optional :argument.")


def config_values(flag: flags.FlagHolder) -> Mapping[str, Any]:
    """Returns the values of the config file that the flag names.

    Raises:
      UserError: no file was named, or it does not exist.
    """
    if flag.value is None:
        raise UserError("--config is missing: name a config file, such as configs/emoji.py")
    return _existing(flags.FLAGS[flag.name])


def config_origin(flag: flags.FlagHolder) -> dict[str, Any]:
    """Returns where the values of `config_values` came from: the file with its :argument, and the overrides."""
    return _origin(flags.FLAGS[flag.name])


def parse_config(arguments: Sequence[str]) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Returns what `config_values` and `config_origin` would be for a command with these `--config...` flags.

    Raises:
      UserError: there is no such file, an unknown key, or a value that its field cannot be.
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
    return cast(Mapping[str, Any], chosen.value)  # it has the methods of one


def _origin(chosen: flags.Flag) -> dict[str, Any]:
    from ml_collections import config_flags

    overrides = config_flags.get_override_values(chosen)
    return {"config": config_flags.get_config_filename(chosen), "overrides": overrides}


def run_command(main: Callable[[list[str]], None], known_only: bool = False) -> None:
    """Runs a command: parses its flags, calls `main(remaining argv)`, and prints user errors without a traceback.

    With `known_only`, undefined flags stay in the remaining argv. The exit code is 2 after a UserError or an OSError.
    """

    def quiet_main(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax logs twenty lines a save
        main(argv)

    try:
        app.run(quiet_main, flags_parser=functools.partial(_parse_flags, known_only=known_only))
    except (UserError, OSError) as error:  # OSError: a path that is missing, forbidden or on a full disk
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr, flush=True)
        # Immediately, because threads of a failed save would print or fail while Python shuts down.
        os._exit(2)


def _parse_flags(argv: list[str], values: flags.FlagValues = flags.FLAGS, known_only: bool = False) -> list[str]:
    """Parses flags by absl; its errors are long and do not name an unknown override, so it makes short ones of them."""
    try:
        return values(argv, known_only=known_only)
    except flags.Error as error:
        raise UserError(str(error)) from None
    except (AttributeError, KeyError) as error:
        overrides = [argument.removeprefix("--config.") for argument in argv if argument.startswith("--config.")]
        unknown = re.sub(r"\W+", " ", str(error)).split()[0]
        for key, _, value in (override.partition("=") for override in overrides):
            if unknown in key.split("."):
                raise ConfigError(key, value, f"the config file has no key {unknown!r}") from None
        raise
