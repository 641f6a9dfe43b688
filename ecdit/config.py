"""Turns config values into frozen dataclasses, strictly.

An experiment is one Python file with `get_config([argument])`, which returns an `ml_collections.ConfigDict` with every
field. `build` turns it into frozen dataclasses that live beside the code they configure. There are no other defaults:
an unknown key, a missing key, a wrong type or an impossible value raises `ConfigError` with the key, the value and the
allowed values.

Only code that reads config files imports ml_collections, so that a model can be built without that package.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from ecdit.errors import UserError

T = TypeVar("T")


class ConfigError(UserError, ValueError):
    """A config key has a value that cannot work. `key` is its dotted path."""

    def __init__(self, key: str, value: Any, allowed: str):
        self.key, self.value, self.allowed = key, value, allowed
        super().__init__(f"config.{key} = {value!r}: {allowed}")

    def under(self, prefix: str) -> "ConfigError":
        """Returns the same error with `prefix` before its key."""
        return ConfigError(f"{prefix}.{self.key}", self.value, self.allowed)


class FrozenMapping(dict[str, Any]):
    """A mapping in a config. It is hashable, like the frozen dataclasses around it, so nothing may change it."""

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride] - dict says that it has none
        return hash(json.dumps(self, sort_keys=True))


def require(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raises ConfigError unless `condition` holds. For `__post_init__` of config dataclasses."""
    if not condition:
        raise ConfigError(key, value, allowed)


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """Makes the frozen dataclass `cls` from nested mappings.

    Raises:
      ConfigError: a key is unknown or missing, or its value has the wrong type or is refused by the dataclass.
    """
    known = {field.name for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]  # a dataclass
    hints = typing.get_type_hints(cls)
    field_types = getattr(cls, "field_types", None)  # types that depend on another field's value
    if field_types is not None:
        hints |= field_types(values)
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
    """Returns a config dataclass as nested plain dicts and lists, which survive JSON unchanged."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple | list) else value

    return plain(dataclasses.asdict(config))


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested dicts as {'a.b': value}."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


# Metadata of config fields whose value may change when a run resumes, from one phase of a run to the next, or both. All
# other fields are fixed from a run's first step to its last.
RESUME: Mapping[str, Any] = {"may_change": ("resume",)}
PHASE: Mapping[str, Any] = {"may_change": ("phase",)}
RESUME_OR_PHASE: Mapping[str, Any] = {"may_change": ("resume", "phase")}


def changeable(config: Any, when: Literal["resume", "phase"], prefix: str = "") -> set[str]:
    """Returns the dotted keys of a config dataclass whose values may change on a resume or in a phase (`when`)."""
    keys: set[str] = set()
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), prefix + field.name
        if when not in field.metadata.get("may_change", ()):
            keys |= changeable(value, when, f"{key}.") if dataclasses.is_dataclass(value) else set()
        elif dataclasses.is_dataclass(value):  # the whole group
            keys |= flatten(to_dict(value), f"{key}.").keys()
        else:
            keys.add(key)
    return keys


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"a sequence of {_describe(typing.get_args(hint)[0])}"
    if isinstance(hint, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    return getattr(hint, "__name__", str(hint))


def _typed(hint: Any, key: str, value: Any) -> Any:
    """Returns `value` as `hint`. It converts only ints to floats, lists to tuples and mappings to dataclasses."""
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
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        # A ConfigDict is no Mapping.
        require(hasattr(value, "items"), key, value, "must be a group of keys")
        try:
            return build(hint, value)
        except ConfigError as error:
            raise error.under(key) from None
    if origin is Mapping:  # collections.abc's
        require(hasattr(value, "items"), key, value, "must be a mapping of keys to values")
        return FrozenMapping(value.items())
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise wrong
    return value
