"""Config files to frozen dataclasses, strictly.

An experiment is one Python file with `get_config([argument])` that returns an `ml_collections.ConfigDict`
in which every field is present. `build` turns it into frozen dataclasses that live beside the code they
configure. There are no defaults anywhere else: an unknown key, a missing key, a wrong type or an impossible
value raises `ConfigError` with the key, the value and what is allowed.

ml_collections is imported only by what reads config files, so that a model can be built where it is not installed.
"""

import contextlib
import dataclasses
import functools
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from absl import app, flags, logging

if TYPE_CHECKING:
    import ml_collections

T = TypeVar("T")


class UserError(Exception):
    """Something the user can mend: commands print its message without a traceback."""


class ConfigError(UserError, ValueError):
    """A config key has a value that cannot work. `key` is the dotted path of the key."""

    def __init__(self, key: str, value: Any, allowed: str):
        self.key, self.value, self.allowed = key, value, allowed
        super().__init__(f"config.{key} = {value!r}: {allowed}")

    def under(self, prefix: str) -> "ConfigError":
        """The same error with `prefix` before its key."""
        return ConfigError(f"{prefix}.{self.key}", self.value, self.allowed)


def require(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raises ConfigError unless `condition`: for `__post_init__` of config dataclasses."""
    if not condition:
        raise ConfigError(key, value, allowed)


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """Makes the frozen dataclass `cls` from nested mappings.

    Raises:
      ConfigError: unknown key, missing key, wrong type, or a value that the dataclass refuses.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in known:
            raise ConfigError(key, values[key], f"unknown key; {cls.__name__} has {', '.join(sorted(known))}")
    for key in sorted(known - set(values)):
        raise ConfigError(key, None, f"missing; it must be {_describe(hints[key])}")
    fields = {}
    for key, value in values.items():
        fields[key] = _typed(hints[key], key, value)
    return cls(**fields)


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as nested plain dicts and lists: what JSON gives back unchanged."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple | list) else value

    return plain(dataclasses.asdict(config))


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as {'a.b': value}."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"a sequence of {_describe(typing.get_args(hint)[0])}"
    if isinstance(hint, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    return getattr(hint, "__name__", str(hint))


def _typed(hint: Any, key: str, value: Any) -> Any:
    """`value` as `hint`; an int is a valid float, a list a valid tuple, a mapping a dataclass, nothing else is."""
    wrong = ConfigError(key, value, f"must be {_describe(hint)}")
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        if value in typing.get_args(hint) and not isinstance(value, bool):
            return value
        raise wrong
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise wrong
        return tuple(_typed(typing.get_args(hint)[0], f"{key}[{i}]", item) for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        # A ConfigDict is no Mapping.
        require(hasattr(value, "items"), key, value, "must be a group of keys")
        try:
            return build(hint, value)
        except ConfigError as error:
            raise error.under(key) from None
    if origin is Mapping:  # collections.abc's
        require(isinstance(value, Mapping), key, value, "must be a mapping of keys to values")
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise wrong
    return value


def check_writable(path: Path) -> None:
    """Raises UserError, before work is done for nothing, where `path` could not be made or written."""
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    if (existing != path and not existing.is_dir()) or not os.access(existing, os.W_OK):
        raise UserError(f"{path} cannot be written: {existing} is no directory to write in")


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is in a bucket and not on a disk: see `storage`."""
    return os.fspath(path).startswith("gs://")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes an OSError, or whatever a bucket's libraries raise, a UserError that names `path`: they often do not."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_remote(path) and not isinstance(error, OSError):
            raise
        raise UserError(f"writing {path} failed: {str(error) or type(error).__name__}") from error


def replace_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all: whoever reads it, after a kill too, finds the old text or the new.

    Raises:
      UserError: it cannot be written; the old text is still there.
    """
    if is_remote(path):  # an object is written so anyway
        with writing(path):
            path.write_text(text)
        return
    scratch = path.with_name(path.name + ".tmp")
    with writing(path):
        scratch.write_text(text)
        os.replace(scratch, path)


def define_config_flag() -> flags.FlagHolder:
    """Defines `--config=FILE.py[:ARGUMENT]` with its overrides `--config.a.b=value`."""
    from ml_collections import config_flags

    return config_flags.DEFINE_config_file("config", None, "Experiment file, with an optional :argument.")


def config_values(flag: flags.FlagHolder) -> "ml_collections.ConfigDict":
    """The values of the config file that the flag names.

    Raises:
      UserError: no file was named, or it does not exist.
    """
    if flag.value is None:
        raise UserError("--config is missing: name a config file, such as configs/emoji.py")
    return _existing(flags.FLAGS[flag.name])


def config_origin(flag: flags.FlagHolder) -> dict[str, Any]:
    """Where the values of `config_values` came from: the file with its :argument, and what the flags changed in it."""
    return _origin(flags.FLAGS[flag.name])


def parse_config(arguments: Sequence[str]) -> tuple["ml_collections.ConfigDict", dict[str, Any]]:
    """What `config_values` and `config_origin` of a command would be that had these `--config...` flags.

    Raises:
      UserError: there is no such file, an unknown key, or a value that its field cannot be.
    """
    from ml_collections import config_flags

    argv, values = ["", *arguments], flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=argv)
    _parse_flags(argv, values)
    return _existing(values["config"]), _origin(values["config"])


def _existing(chosen: flags.Flag) -> "ml_collections.ConfigDict":
    import ml_collections

    if not isinstance(chosen.value, ml_collections.ConfigDict):
        raise UserError(f"--config={chosen.config_filename}: no such config file")
    return chosen.value


def _origin(chosen: flags.Flag) -> dict[str, Any]:
    from ml_collections import config_flags

    overrides = config_flags.get_override_values(chosen)
    return {"config": config_flags.get_config_filename(chosen), "overrides": overrides}


def run_command(main: Callable[[list[str]], None], known_only: bool = False) -> None:
    """Runs a command: parses its flags, calls `main(remaining argv)`, prints user errors without a traceback.

    `known_only` leaves flags that are not defined in the remaining argv. Exits with 2 after a UserError or an OSError,
    whose message names the path.
    """

    def quiet_main(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax tells each save in twenty lines
        main(argv)

    try:
        app.run(quiet_main, flags_parser=functools.partial(_parse_flags, known_only=known_only))
    except (UserError, OSError) as error:  # OSError: a path that is missing, forbidden or on a full disk
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr, flush=True)
        # At once: the threads that a failed save leaves behind print, or fail, while Python takes itself down.
        os._exit(2)


def _parse_flags(argv: list[str], values: flags.FlagValues = flags.FLAGS, known_only: bool = False) -> list[str]:
    """absl's parser, whose errors are many lines long and do not name the override that has an unknown key."""
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
