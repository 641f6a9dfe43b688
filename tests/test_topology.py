"""Tests slices by name: properties of all, some from public tables, and refused names."""

import math
import re

import pytest
from jax.experimental import topologies

from ecdit.chips import CHIPS
from ecdit.topology import GENERATIONS, LARGE_HOST_CHIPS, SliceError, find_slice, usual_shapes

NAMES = [f"{g.prefix}-{chips * g.cores}" for g in GENERATIONS.values() for chips in usual_shapes(g.chip)]


def test_every_slice_is_its_hosts_and_its_layout():
    for name in NAMES:
        found = find_slice(name)
        assert found.accelerator == name
        assert found.is_usual
        assert found.hosts * found.chips_per_host == found.chips == math.prod(found.shape)
        assert find_slice(f"{found.chip}:{found.topology}") == found
        assert found.chip in {chip.name for chip in CHIPS.values()}


def test_sizes_ascend_from_one_host_to_the_largest_slice():
    for generation in GENERATIONS.values():
        sizes = list(usual_shapes(generation.chip))
        assert sizes == sorted(sizes)
        assert sizes[-1] == generation.max_chips


@pytest.mark.parametrize(
    ("name", "topology", "hosts"),
    [
        ("v5p-8", "2x2x1", 1),
        ("v5p-256", "4x4x8", 32),
        ("v5p-512", "4x8x8", 64),
        ("v5p-2048", "8x8x16", 256),
        ("v5p-12288", "16x16x24", 1536),
        ("v4-8", "2x2x1", 1),
        ("v4-16", "2x2x2", 2),
        ("v4-512", "4x8x8", 64),
        ("v4-4096", "8x16x16", 512),
        ("v5litepod-1", "1x1", 1),
        ("v5litepod-16", "4x4", 4),
        ("v5e-256", "16x16", 64),
        ("v6e-4", "2x2", 1),
        ("v6e-32", "4x8", 8),
        ("v5p:4x4x16", "4x4x16", 64),
        ("tpu7x-8", "2x2x1", 1),
        ("tpu7x-128", "4x4x4", 16),
        ("tpu7x-18432", "16x24x24", 2304),
        ("tpu7x:4x4x8", "4x4x8", 32),
    ],
)
def test_what_public_tables_say(name, topology, hosts):
    assert (find_slice(name).topology, find_slice(name).hosts) == (topology, hosts)


def test_another_layout_has_the_same_name_and_is_not_the_usual_one():
    found = find_slice("v5p:4x4x16")
    assert (found.accelerator, found.is_usual) == ("v5p-512", False)


@pytest.mark.parametrize(
    ("name", "chips", "devices", "of_a_host"),
    [
        ("v4-128", 64, 64, 4),
        ("v5p-128", 64, 64, 4),
        ("v6e-64", 64, 64, 4),
        ("v6e-1", 1, 1, 1),
        ("tpu7x-128", 64, 128, 8),
        ("tpu7x:2x2x1", 4, 8, 8),
    ],
)
def test_a_chip_is_a_device_but_a_tpu7x_is_two(name, chips, devices, of_a_host):
    found = find_slice(name)
    assert (found.chips, found.devices, found.devices_per_host) == (chips, devices, of_a_host)
    assert found.hosts * found.devices_per_host == found.devices


def test_only_eight_flat_chips_come_in_one_host():
    large = {name for name in NAMES if find_slice(name).on_large_hosts() != find_slice(name)}
    assert large == {"v5litepod-8", "v6e-8"}
    for name in large:
        assert find_slice(name).on_large_hosts().hosts == 1
        assert find_slice(name).on_large_hosts().chips_per_host == LARGE_HOST_CHIPS


@pytest.mark.parametrize("name", ["v4-8", "v5p-8", "v5p-32", "v5p-256", "v5e-16", "v6e-16", "tpu7x-8", "tpu7x-128"])
def test_the_compiler_has_as_many_devices_and_hosts(name):
    found = find_slice(name)
    options = {"chip_config_name": "megacore"} if found.chip == "v4" else {}
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{found.chip}:{found.topology}", **options
    ).devices
    assert len(described) == found.devices
    assert len({tuple(device.coords) for device in described}) == found.chips
    assert len({device.process_index for device in described}) == found.hosts


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5p-250", "slices go from v5p-8 to v5p-12288; the nearest: v5p-128 and v5p-256"),
        ("v5p-99999", "the nearest: v5p-12288"),
        ("v4-4", "slices go from v4-8 to v4-8192; the nearest: v4-8"),
        ("v4-9", "the nearest: v4-8 and v4-16"),
        ("v6e-12", "the nearest: v6e-8 and v6e-16"),
        ("v5p--8", "the nearest: v5p-8"),
        ("h100-8", "must be v4-N or v5p-N or v5litepod-N or v6e-N"),
        ("v5p", "must be v4-N or v5p-N or v5litepod-N or v6e-N"),
        ("", "must be v4-N or v5p-N or v5litepod-N or v6e-N"),
        ("v5p:4x8x4", "layouts of v5p are 2x2x1, 2x2x2, 2x2x4, 2x4x4, or multiples of 4, ascending"),
        ("v5p:4x4", "layouts of v5p are"),
        ("v5p:4x4x", "layouts of v5p are"),
        ("v4:0x0x0", "layouts of v4 are"),
        ("v4:16x16x20", "at most 4096 chips"),
        ("v6e:4x4x4", "layouts of v6e are 1x1, 2x2, 2x4"),
        ("tpu7x-4", "slices go from tpu7x-8 to tpu7x-18432"),
        ("tpu7x:16x24x28", "at most 9216 chips"),
        ("v7x-128", "or v6e-N or tpu7x-N"),
    ],
)
def test_other_names_are_refused_with_what_there_is(name, says):
    with pytest.raises(SliceError, match=re.escape(says)) as error:
        find_slice(name)
    assert repr(name) in str(error.value)
