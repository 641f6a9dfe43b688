"""Builds the experiments of configs/ec_dit.py for benchmarks, also without ml_collections."""

import sys
import types
from typing import Any

from ecdit.experiment import Experiment, make_experiment
from tests.runs import config_file


class Values(dict):
    """Stands in for ml_collections.ConfigDict in a config file, which only sets attributes: a.b = c is a["b"] = c."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


def paper_experiment(name: str, **changes: Any) -> Experiment:
    """`configs/ec_dit.py:name` with `changes`, whose keys have __ for dots."""
    try:
        import ml_collections  # noqa: F401
    except ImportError:
        sys.modules["ml_collections"] = types.SimpleNamespace(ConfigDict=Values)
    values = config_file("ec_dit").get_config(name)
    for key, value in changes.items():
        *groups, field = key.split("__")
        node = values
        for group in groups:
            node = node[group]
        node[field] = value
    return make_experiment(values)
