"""Reads the config.json of a folder of public weights, and refuses those of another architecture."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ecdit.config import ConfigError
from ecdit.errors import UserError

CONFIG = "config.json"
T = TypeVar("T")


class WeightsError(UserError):
    """A folder of public weights or of a tokenizer cannot be used."""


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
      WeightsError: the file is missing, or is no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path}: the file does not exist") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise WeightsError(f"{path}: must hold a JSON object, it holds {type(values).__name__}")
    return values


class ConfigJson:
    """The values of a config.json, with the defaults of the library that writes it. Errors name the file."""

    def __init__(self, path: Path, values: Mapping[str, Any], defaults: Mapping[str, Any]):
        self.path, self.values = path, {**defaults, **values}

    def choose(self, key: str, allowed: Iterable[Any]) -> Any:
        """Returns the value of `key`.

        Raises:
          WeightsError: the value is not one of `allowed`.
        """
        value, allowed = self.values.get(key), list(allowed)
        if value not in allowed:
            raise WeightsError(f"{self.path}: {key} = {value!r}: must be {' or '.join(map(repr, allowed))}")
        return value

    def number(self, key: str, kind: type = int, least: float = 1) -> Any:
        """Returns the value of `key`, an int or, with `kind` float, a number.

        Raises:
          WeightsError: the value is no such number, or is below `least`.
        """
        value: Any = self.values.get(key)
        fits = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        if not fits or not value >= least or value == float("inf"):  # a NaN is above nothing
            raise WeightsError(f"{self.path}: {key} = {value!r}: must be {kind.__name__}, at least {least}")
        return kind(value)

    def numbers(self, key: str) -> tuple[int, ...]:
        """Returns the value of `key`, a list of ints of 1 or more.

        Raises:
          WeightsError: the value is no such list, or is empty.
        """
        value = self.values.get(key)
        if not (isinstance(value, list) and value and all(type(one) is int and one >= 1 for one in value)):
            raise WeightsError(f"{self.path}: {key} = {value!r}: must be a list of int, each at least 1")
        return tuple(value)

    def group(self, key: str, defaults: Mapping[str, Any]) -> "ConfigJson":
        """Returns the values under `key` and, of older versions of transformers, `key`_dict; else the defaults.

        Raises:
          WeightsError: a value is no object, or both have a value of `defaults` and differ: transformers takes either,
            depending on the class that reads them.
        """
        values, older = ({} if self.values.get(name) is None else self.values[name] for name in (key, f"{key}_dict"))
        for name, found in ((key, values), (f"{key}_dict", older)):
            if not isinstance(found, dict):
                raise WeightsError(f"{self.path}: {name} = {found!r}: must be an object")
        for name in defaults.keys() - {"projection_dim"}:  # of which a whole CLIP has one beside both parts
            if name in values and name in older and values[name] != older[name]:
                differ = f"{key} has {name} = {values[name]!r} and {key}_dict has {older[name]!r}"
                raise WeightsError(f"{self.path}: {differ}: must be equal")
        return ConfigJson(self.path, {**older, **values}, defaults)

    def make(self, kind: Callable[..., T], **fields: Any) -> T:
        """Returns a config dataclass of these fields.

        Raises:
          WeightsError: they do not fit each other. It names this file, as no key of the run's config is wrong.
        """
        try:
            return kind(**fields)
        except ConfigError as error:
            raise WeightsError(f"{self.path}: {error.key} = {error.value!r}: {error.allowed}") from None


def read_config(folder: Path, model_types: Iterable[str], key: str, defaults: Mapping[str, Any]) -> ConfigJson:
    """Reads `folder`/config.json, whose `key` (model_type or _class_name) must be one of `model_types`.

    Raises:
      WeightsError: the config cannot be read, or is for another architecture.
    """
    path = Path(folder) / CONFIG
    config = ConfigJson(path, read_json(path), defaults)
    config.choose(key, model_types)
    return config
