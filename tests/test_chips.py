"""Tests the table of chips, and chips that it lacks."""

import jax
import pytest
from jax.experimental import topologies

from ecdit.chips import CHIPS, GPUS, chip, limits


def test_the_public_figures():
    figures = {chip.name: (chip.peak_flops / 1e12, chip.hbm_bytes / 1e9) for chip in CHIPS.values()}
    assert figures == {
        "v4": (275, 32),
        "v5p": (459, 95),
        "v5e": (197, 16),
        "v6e": (918, 32),
        "tpu7x": (2307 / 2, 192 / 2),
    }


def test_the_dies_of_a_tpu7x_have_halves_of_its_public_figures():
    """2307 TFLOP/s, 192 GB at 7380 GB/s, links of 90 GB/s one way, 100 Gb/s; six links' worth between the dies."""
    die = chip("TPU7x")
    halves = (die.peak_flops, die.hbm_bytes, die.hbm_bandwidth, die.link_bandwidth, die.dcn_bandwidth)
    assert tuple(2 * half for half in halves) == (2307e12, 192e9, 7380e9, 90e9, 100e9 / 8)
    assert die.die_bandwidth == 6 * 90e9
    others = {limits.die_bandwidth for limits in CHIPS.values() if limits is not die}
    assert others == {0}


def test_the_public_figures_of_gpus():
    """TFLOP/s without sparsity, GB, TB/s."""
    figures = {
        gpu.name: (gpu.peak_flops / 1e12, gpu.hbm_bytes / 1e9, gpu.hbm_bandwidth / 1e12) for gpu in GPUS.values()
    }
    assert figures == {
        "H100-SXM": (989, 80, 3.35),
        "H100-PCIe": (756, 80, 2),
        "H100-NVL": (835, 94, 3.9),
        "H200-SXM": (989, 141, 4.8),
        "H200-NVL": (835, 141, 4.8),
        "A100-SXM-80GB": (312, 80, 2.039),
        "A100-SXM-40GB": (312, 40, 1.555),
    }


def test_a_gpu_has_limits_but_is_no_chip_of_a_plan():
    assert limits("NVIDIA H200").name == "H200-SXM"
    assert limits("TPU v5") is chip("TPU v5")
    assert chip("NVIDIA H200") is None


def test_an_unknown_chip_is_not_guessed():
    assert chip(jax.devices()[0].device_kind) is None
    assert limits(jax.devices()[0].device_kind) is None


@pytest.mark.parametrize(
    ("topology", "name"),
    [("v5:2x2x1", "v5p"), ("v5e:2x2", "v5e"), ("v6e:2x2", "v6e"), ("v4:2x2x1", "v4"), ("tpu7x:2x2x1", "tpu7x")],
)
def test_kinds_are_those_that_the_compiler_gives(topology, name):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    assert chip(devices[0].device_kind).name == name
