"""The table of chips, and what is not in it."""

import jax
import pytest
from jax.experimental import topologies

from ecdit.chips import CHIPS, chip


def test_the_public_figures():
    figures = {chip.name: (chip.peak_flops / 1e12, chip.hbm_bytes / 1e9) for chip in CHIPS.values()}
    assert figures == {"v4": (275, 32), "v5p": (459, 95), "v5e": (197, 16), "v6e": (918, 32)}


def test_an_unknown_chip_is_not_guessed():
    assert chip(jax.devices()[0].device_kind) is None


@pytest.mark.parametrize(
    ("topology", "name"), [("v5:2x2x1", "v5p"), ("v5e:2x2", "v5e"), ("v6e:2x2", "v6e"), ("v4:2x2x1", "v4")]
)
def test_kinds_are_those_that_the_compiler_gives(topology, name):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    assert chip(devices[0].device_kind).name == name
