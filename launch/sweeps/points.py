"""Loads and checks the points of a sweep file. Each is a run with a name, flags and an experiment.

A sweep file has `get_hyper(hyper)`, which returns the points (see `sweeps.hyper`), and two constants:

    CONFIG = "configs/emoji.py"      # config file of points that do not name one
    SERIES = ("config.model.ffn",)   # points with equal values of these keys form one line of the plots
"""

import dataclasses
import hashlib
import json
import re
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ecdit.checkpoints.compatibility import config_differences
from ecdit.command_line import parse_config
from ecdit.config import changeable, flatten, to_dict
from ecdit.errors import UserError
from ecdit.experiment import Experiment, make_experiment
from ecdit.planning.counts import Counts, count
from launch.job import MAX_NAME
from launch.sweeps import hyper

CONFIG_KEY, PREFIX = "config", "config."
# Keys that name what a run reads. A resume may change them, because it compares the contents (those of
# checkpoint.init_from it reads no more); a finished run with other values may have read something else than its point.
# Not data.directory, where launchers mount the data elsewhere: data.task names what is in it.
INPUTS = frozenset(
    {
        *("checkpoint.init_from", "data.tokenizer", "data.second_tokenizer"),
        *("text.weights", "text.second_weights", "vae.weights"),
    }
)
DIGITS = 6  # digits of the hash in names that would be too long


@dataclasses.dataclass(frozen=True)
class SweepPoint:
    """A checked point of a sweep, which is one run."""

    name: str  # the last part of its workdir
    flags: tuple[str, ...]  # flags of `python -m ecdit.train`, without --workdir
    origin: Mapping[str, Any]  # from `command_line.config_origin`
    experiment: Experiment
    settings: Mapping[str, Any]  # values that distinguish it, by key: {"config.model.width": 64}
    series: str  # text of its values of SERIES; "" if the sweep has no SERIES

    def counts(self) -> Counts:
        """Returns its parameters and FLOPs."""
        return count(self.experiment)

    def differences(self, saved: Mapping[str, Any], step: int, inputs: bool = True) -> list[str]:
        """Returns a line for each key of the config of a run after `step` that makes it another run than the point's.

        A run may differ from its point in what changes how it trains, but not what: in the keys that a resume may
        change, without INPUTS. Where a run goes on, and compares what it reads by itself, `inputs` is False.
        """
        may_differ = changeable(self.experiment, "resume") - (INPUTS if inputs else frozenset())
        found = config_differences(saved, to_dict(self.experiment), may_differ, step)
        return [f"config.{key}: saved {old!r}, now {new!r}" for key, (old, new) in found.items()]

    def file_differences(self, saved: Mapping[str, str]) -> list[str]:
        """Returns a line for each of the user's files, such as data.module, that is not what a run read of it.

        Args:
          saved: the sha256 by path that the run noted; what it did not note is not compared.

        Raises:
          ConfigError: a file is not there.
        """
        now = self.experiment.user_files() if saved else {}
        return [
            f"{path}: its sha256 was {saved[path][:12]}, and is {digest[:12]}"
            for path, digest in now.items()
            if saved.get(path, digest) != digest
        ]


def load_points(path: str, config: str = "", overrides: Mapping[str, str] | None = None) -> list[SweepPoint]:
    """Returns the points of a sweep file, in its order.

    Args:
      path: path of the file.
      config: config file instead of the sweep's CONFIG; "" for the sweep's.
      overrides: values for all points by key, such as "config.train.num_steps".

    Raises:
      UserError: the file does not exist, a config refuses a key or a value (the message names the point), two points
        are equal, or an override sets a key in which points differ.
    """
    if not Path(path).is_file():
        raise UserError(f"--sweep={path}: no such file")
    module = runpy.run_path(path)
    if "get_hyper" not in module:
        raise hyper.SweepError(f"{path} has no get_hyper(hyper)")
    swept = [dict(each) for each in module["get_hyper"](hyper)]
    keys = telling_keys(swept)
    for key in overrides or {}:
        if len({_shown(each.get(key)) for each in swept}) > 1:
            raise hyper.SweepError(f"--{key}: is swept by {path}")
    base = {CONFIG_KEY: config or module.get("CONFIG", "")}
    # Names depend only on the file's overrides, so that overrides for all points do not change the workdirs.
    return [
        _make_point(name, base | each | dict(overrides or {}), keys, module.get("SERIES", ()))
        for name, each in zip(names(swept, keys), swept, strict=True)
    ]


def _make_point(name: str, values: hyper.Overrides, keys: Sequence[str], series: Sequence[str]) -> SweepPoint:
    if not values[CONFIG_KEY]:
        raise hyper.SweepError(f"point {name}: names no config file, and the sweep has no CONFIG")
    for key in values:
        if key != CONFIG_KEY and not key.startswith(PREFIX):
            raise hyper.SweepError(f"point {name}: {key}: must be {PREFIX}KEY, as on the command line, or {CONFIG_KEY}")
    flags = tuple(
        f"--{key}={value}" for key, value in values.items()
    )  # the base comes first, because the file must precede its overrides
    try:
        parsed, origin = parse_config(flags)
        experiment = make_experiment(parsed)
    except UserError as error:
        raise hyper.SweepError(f"point {name}: {error}") from None
    resolved = flatten(to_dict(experiment), PREFIX)
    for key in series:
        if key not in resolved:
            raise hyper.SweepError(f"SERIES: {key}: the config of point {name} has no such key")
    return SweepPoint(
        name=name,
        flags=flags,
        origin=origin,
        experiment=experiment,
        settings={key: values.get(key, resolved.get(key)) for key in keys},
        series=", ".join(_series_word(key, resolved[key]) for key in series),
    )


def telling_keys(points: Sequence[hyper.Overrides]) -> list[str]:
    """Returns the keys that distinguish points, in order, without those that earlier keys determine, as in a zip.

    Raises:
      SweepError: there are no points, or two are equal.
    """
    if not points:
        raise hyper.SweepError("the sweep has no points")

    def told(keys: Sequence[str]) -> int:
        return len({tuple(_shown(point.get(key)) for key in keys) for point in points})

    every = list(dict.fromkeys(key for point in points for key in point))
    if told(every) < len(points):
        same = next(point for i, point in enumerate(points) if point in points[:i])
        raise hyper.SweepError(f"two points are the same: {same}")
    kept: list[str] = []
    for key in every:
        if told([*kept, key]) > told(kept):
            kept.append(key)
    return kept or every[:1]


def names(points: Sequence[hyper.Overrides], keys: Sequence[str]) -> list[str]:
    """Returns a name for each point, which is reproducible, valid in Kubernetes, and unique.

    It consists of the point's values of `keys`. If it is too long, keys of several words are reduced to initials; if it
    is still too long, it is cut and ends with digits of a hash.
    """
    made = []
    for point in points:
        values = {key: point[key] for key in keys if key in point}
        full, short = _joined_words(values, keys, shorten=False), _joined_words(values, keys, shorten=True)
        made.append(full if len(full) <= MAX_NAME else short)
    return [
        word if len(word) <= MAX_NAME and made.count(word) == 1 else _with_digits(word, point)
        for word, point in zip(made, points, strict=True)
    ]


def _joined_words(values: Mapping[str, Any], keys: Sequence[str], shorten: bool) -> str:
    lasts = [_last(key) for key in keys]
    parts = []
    for key, value in values.items():
        last = _last(key)
        if lasts.count(last) > 1:
            last = key.removeprefix(PREFIX)
        if shorten and "_" in last:
            last = "".join(word[:1] for word in re.split(r"[._]", last))
        parts += [last, _value_word(key, value)]
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-") or "point"


def _last(key: str) -> str:
    """Returns the last part of a key; for `optimizer.name` it is `optimizer`."""
    return key.removesuffix(".name").rpartition(".")[2]


def _value_word(key: str, value: Any) -> str:
    if key == CONFIG_KEY:
        file, _, argument = str(value).partition(":")
        return argument or Path(file).stem
    if isinstance(value, float):
        plain, short = f"{value:.12g}", re.sub(r"\.?0*e([+-])0*", r"e\1", f"{value:.11e}").replace("e+", "e")
        value = min(plain, short, key=len)
    return re.sub(r"^-(?=\d)", "m", str(value)).replace(".", "p")


def _with_digits(word: str, point: hyper.Overrides) -> str:
    text = json.dumps(point, sort_keys=True, default=str)
    digits = hashlib.sha256(text.encode()).hexdigest()[:DIGITS]
    return f"{word[: MAX_NAME - DIGITS - 1].strip('-')}-{digits}"


def _series_word(key: str, value: Any) -> str:
    return value if isinstance(value, str) else f"{key.rpartition('.')[2]} {value}"


def _shown(value: Any) -> str:
    """Returns text for comparing values, because sets cannot contain lists, and 1 == True."""
    return repr(value)
