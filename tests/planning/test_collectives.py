"""Tests bytes and seconds of collectives by hand: a chip whose link carries 1 GB/s, on small tori."""

import dataclasses
import itertools

import pytest

from ecdit.chips import CHIPS, Chip, chip, chip_named
from ecdit.planning.collectives import KINDS, DevicePosition, Torus, bytes_sent_by_kind, collective_of
from ecdit.planning.hlo import HloError, parse

GB = 1e9
CHIP = Chip("toy", 1e12, GB, GB, 1e9, 1e9, link_bandwidth=GB, wraps_at=4, dcn_bandwidth=0.1 * GB,
            host_bandwidth=GB)  # fmt: skip


TWO_DIES = dataclasses.replace(CHIP, die_bandwidth=4 * GB)


def pairs(shape):
    """A torus of chips that are two devices each; the mesh is (*shape, 2)."""
    coords = list(itertools.product(*map(range, shape)))
    places = [DevicePosition(c, 0, (*c, die), die) for c in coords for die in range(2)]
    return Torus(TWO_DIES, shape, places, ("x", "y", "z", "die"))


def torus(shape, slices=1):
    """Partitions in the order of coordinates; the mesh is (slices, *shape)."""
    coords = list(itertools.product(*map(range, shape)))
    places = [DevicePosition(c, s, (s, *c)) for s in range(slices) for c in coords]
    return Torus(CHIP, shape, places, ("slices", "x", "y", "z")[: 1 + len(shape)])


def collective(opcode, shape, attributes, where, scattered=False):
    text = f"ENTRY %e (a: f32[1]) -> f32[1] {{\n  ROOT %c = {shape} {opcode}(%a), channel_id=5, {attributes}\n}}\n"
    return collective_of(parse(text).computations["e"][0], where, scattered)


RING, LINE, PLANE = torus((1, 1, 4)), torus((1, 1, 3)), torus((1, 2, 2))
ALL = "replica_groups={{0,1,2,3}}"
MILLION = "f32[250000000]"  # 1 GB


@pytest.mark.parametrize(
    ("opcode", "kind", "sent", "seconds"),
    [
        # A ring of four has two links for each chip.
        ("all-gather", "all_gather", 0.75, 0.375),
        ("all-reduce", "all_reduce", 1.5, 0.75),
        # Half of the chips send half of a gigabyte each over the two links of the middle: 2 x 0.5 / 2.
        ("all-to-all", "all_to_all", 0.75, 0.5),
    ],
)
def test_a_ring_of_four(opcode, kind, sent, seconds):
    found = collective(opcode, MILLION, ALL, RING)
    assert (found.kind, found.axis, found.channel, found.dcn_bytes) == (kind, "z", "5", 0)
    assert found.bytes_sent == pytest.approx(sent * GB)
    assert found.seconds == pytest.approx(seconds)


def test_a_reduce_scatter_in_both_of_its_forms():
    """As such its result is a part of what is reduced; as an all-reduce of which a part is kept, the whole."""
    plain = collective("reduce-scatter", "f32[62500000]", ALL, RING)
    fused = collective("all-reduce", MILLION, ALL, RING, scattered=True)
    for found in (plain, fused):
        assert (found.kind, found.bytes_sent, found.seconds) == ("reduce_scatter", 0.75 * GB, pytest.approx(0.375))


def test_a_line_has_one_link_to_each_side():
    found = collective("all-gather", MILLION, "replica_groups={{0,1,2}}", LINE)
    assert found.seconds == pytest.approx(2 / 3)


def test_a_plane_holds_a_ring_of_neighbours():
    assert collective("all-gather", MILLION, ALL, PLANE).seconds == pytest.approx(0.375)


def test_groups_that_share_links_share_their_bandwidth():
    """In a ring of eight, every other chip: two groups, each of which finds half of every link."""
    found = collective("all-gather", MILLION, "replica_groups={{0,2,4,6},{1,3,5,7}}", torus((1, 1, 8)))
    assert found.seconds == pytest.approx(2 * 0.375)


def test_an_algorithm_over_several_dimensions_uses_their_links():
    """As the compiler's strategy says: six rings in one direction each."""
    debug = 'backend_config={"debug":"UniDirectionNDRingStrategy{colors:6 phases:3"}'
    cube = torus((4, 4, 4))
    one = collective("all-reduce", MILLION, "replica_groups={}", cube)
    several = collective("all-reduce", MILLION, f"replica_groups={{}}, {debug}", cube)
    assert one.seconds == pytest.approx(2 * 63 / 64 / 2)
    assert several.seconds == pytest.approx(2 * 63 / 64 / 6)
    assert (one.axis, one.bytes_sent) == ("x+y+z", pytest.approx(2 * 63 / 64 * GB))


def test_small_collectives_cost_a_microsecond_a_hop():
    found = collective("all-gather", "f32[8]", ALL, RING)
    assert found.seconds == pytest.approx(1.5e-6)  # three hops, in both directions at once


def test_the_longest_dimension_bounds_an_all_to_all():
    """4 x 8, rings both: across the side of eight, 16 chips send 0.5 GB over 4 x 2 links."""
    groups = "replica_groups={}"
    assert collective("all-to-all", MILLION, groups, torus((1, 4, 8))).seconds == pytest.approx(16 * 0.5 / 8)
    assert collective("all-to-all", MILLION, groups, torus((1, 4, 4))).seconds == pytest.approx(8 * 0.5 / 8)


def test_a_group_of_one_moves_nothing():
    found = collective("all-reduce", MILLION, "replica_groups={{0},{1},{2},{3}}", RING)
    assert (found.bytes_sent, found.seconds, found.axis) == (0, 0, "none")


def test_between_slices_the_network_of_the_hosts_counts_apart():
    """Two rings: each chip reduces a quarter with its like, 2 x 1/2 x 0.25 GB at 0.1 GB/s, after 1.5 GB inside."""
    found = collective("all-reduce", MILLION, "replica_groups={}", torus((1, 1, 4), slices=2))
    assert found.axis == "slices+z"
    assert found.bytes_sent == pytest.approx(1.5 * GB)
    assert found.dcn_bytes == pytest.approx(0.25 * GB)
    assert found.seconds == pytest.approx(0.75 + 2.5)


def test_a_permute_is_as_slow_as_its_slowest_pair():
    near = collective("collective-permute", MILLION, "source_target_pairs={{0,1},{1,0}}", RING)
    assert (near.kind, near.seconds, near.axis) == ("permute", pytest.approx(1.0), "z")
    far = collective("collective-permute", MILLION, "source_target_pairs={{0,1},{0,4}}", torus((1, 1, 4), slices=2))
    assert (far.bytes_sent, far.dcn_bytes, far.seconds) == (0, GB, pytest.approx(10.0))


def test_a_permute_goes_the_short_way_round():
    """From end to end: one hop in a ring of four, two in a line of three."""
    for where, last, hops in ((RING, 3, 1), (LINE, 2, 2)):
        found = collective("collective-permute", "f32[1]", f"source_target_pairs={{{{0,{last}}}}}", where)
        assert found.seconds == pytest.approx(hops * 1e-6)


@pytest.mark.parametrize(
    ("opcode", "sent", "seconds"),
    [
        # Each die gathers one half of the array over two links, and gets the other from the other die.
        ("all-gather", 0.875, 0.5 * 0.75 / 2 + 0.5 / 4),
        ("all-reduce", 1.75, 2 * (0.5 * 0.75 / 2 + 0.5 / 4)),
        # Half of the eight send half a gigabyte each over two links of the middle, of which there are two shares.
        ("all-to-all", 0.875, 0.5),
    ],
)
def test_both_dies_of_a_ring_of_four_chips(opcode, sent, seconds):
    found = collective(opcode, MILLION, "replica_groups={{0,1,2,3,4,5,6,7}}", pairs((1, 1, 4)))
    assert (found.axis, found.bytes_sent) == ("z+die", pytest.approx(sent * GB))
    assert found.seconds == pytest.approx(seconds)


def test_one_die_of_each_chip_is_a_ring_of_its_own():
    found = collective("all-gather", MILLION, "replica_groups={{0,2,4,6},{1,3,5,7}}", pairs((1, 1, 4)))
    assert (found.axis, found.seconds) == ("z", pytest.approx(0.375))


@pytest.mark.parametrize(("opcode", "seconds"), [("all-gather", 0.125), ("all-reduce", 0.25), ("all-to-all", 0.125)])
def test_the_dies_of_a_chip_need_no_link(opcode, seconds):
    groups = "replica_groups={{0,1},{2,3},{4,5},{6,7}}"
    found = collective(opcode, MILLION, groups, pairs((1, 1, 4)))
    assert (found.axis, found.seconds) == ("die", pytest.approx(seconds))
    small = collective(opcode, "f32[8]", groups, pairs((1, 1, 4)))
    assert small.seconds == pytest.approx(2e-6 if opcode == "all-reduce" else 1e-6)


def test_a_step_between_dies_is_a_hop():
    """Three hops round the ring of chips, in both directions at once, and one to the other die."""
    found = collective("all-gather", "f32[8]", "replica_groups={{0,1,2,3,4,5,6,7}}", pairs((1, 1, 4)))
    assert found.seconds == pytest.approx(1.5e-6 + 1e-6)


def test_a_permute_between_dies_moves_bytes_and_between_chips_takes_a_link():
    for pair, seconds in (("{0,1}", 0.25), ("{0,2}", 1.0), ("{0,3}", 1.0), ("{0,0}", 0.0)):
        found = collective("collective-permute", MILLION, f"source_target_pairs={{{pair}}}", pairs((1, 1, 4)))
        assert found.seconds == pytest.approx(seconds)
        assert found.bytes_sent == (GB if seconds else 0)


def test_asynchronous_forms_count_their_results():
    found = collective("all-gather-start", f"(f32[62500000], {MILLION})", ALL, RING)
    assert found.bytes_sent == pytest.approx(0.75 * GB)
    found = collective("all-to-all-start", f"(({MILLION}), {MILLION}, u32[]{{:S(2)}}, u32[]{{:S(2)}})", ALL, RING)
    assert found.bytes_sent == pytest.approx(0.75 * GB)


def test_other_instructions_are_no_collectives():
    assert collective("add", MILLION, "", RING) is None


def test_devices_that_are_not_there_are_an_error():
    with pytest.raises(HloError, match="replica groups of more than 4 devices"):
        collective("all-reduce", MILLION, "replica_groups={{0,7}}", RING)


def test_all_five_kinds_are_always_there():
    found = collective("all-gather", MILLION, ALL, RING)
    total = bytes_sent_by_kind({found: 3})
    assert total == dict.fromkeys(KINDS, 0.0) | {"all_gather": pytest.approx(2.25 * GB)}


def test_chips_by_name_and_kind():
    for kind, limits in CHIPS.items():
        assert chip(kind) is limits
        assert chip_named(limits.name) is limits
        # A cycle's products at the peak: 128 x 128 multipliers, a power of two of them.
        arrays = limits.peak_flops / limits.clock / (2 * 128 * 128)
        assert round(arrays) in (4, 8, 16)
        assert arrays == pytest.approx(round(arrays), rel=0.01)
    assert chip_named("v99") is None
