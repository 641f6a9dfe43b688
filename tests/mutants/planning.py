"""Mutants of plans: parameters, operations, bytes sent and seconds, and the layouts of slices."""

from tests.mutants.mutant import Mutant

_COLLECTIVES, _ESTIMATE, _HLO, _COUNTS, _FITTING = (
    f"ecdit/planning/{name}.py" for name in ("collectives", "estimate", "hlo", "counts", "fitting")
)


def _collectives(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/planning/test_collectives.py::{name}" for name in names)


def _estimate(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/planning/test_estimate.py::{name}" for name in names)


def _hlo(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/planning/test_hlo.py::{name}" for name in names)


def _counts(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/planning/test_counts.py::{name}" for name in names)


def _sizes(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/encoders/test_flops.py::{name}" for name in names)


MUTANTS = (
    Mutant(
        _COLLECTIVES,
        "share = (members - 1) / members",
        "share = 1",
        _collectives("test_a_ring_of_four"),
    ),
    Mutant(
        _COLLECTIVES,
        'return 2 * share * size if kind == "all_reduce" else share * size',
        "return share * size",
        _collectives("test_a_ring_of_four"),
    ),
    Mutant(
        _COLLECTIVES,
        "size *= len(group)  # its result is only a part of the array",
        "pass",
        _collectives("test_a_reduce_scatter_in_both_of_its_forms"),
    ),
    Mutant(
        _COLLECTIVES,
        "return (2 if closed else 1), stride, extent",
        "return 2, stride, extent",
        _collectives("test_a_line_has_one_link_to_each_side"),
    ),
    Mutant(
        _COLLECTIVES,
        "count * stride / (8 if wraps else 4)",
        "count * stride / (4 if wraps else 8)",
        _collectives("test_the_longest_dimension_bounds_an_all_to_all"),
    ),
    Mutant(
        _COLLECTIVES,
        "_bytes(kind, size / len(inner), slices)",
        "_bytes(kind, size, slices)",
        _collectives("test_between_slices_the_network_of_the_hosts_counts_apart"),
    ),
    Mutant(
        _COLLECTIVES,
        "far = (sent - nearby) * stride / (links",
        "far = (sent - nearby) / (links",
        _collectives("test_groups_that_share_links_share_their_bandwidth"),
    ),
    Mutant(
        _COLLECTIVES,
        "for a, b in pairs), key=lambda one: one.seconds)",
        "for a, b in pairs), key=lambda one: -one.seconds)",
        _collectives("test_a_permute_is_as_slow_as_its_slowest_pair"),
    ),
    Mutant(
        _COLLECTIVES,
        "hops += min(distance, side - distance) if",
        "hops += distance if",
        _collectives("test_a_permute_goes_the_short_way_round"),
    ),
    Mutant(
        _ESTIMATE,
        "self.free[engine] = max(self.now, self.free[engine]) + seconds",
        "self.free[engine] = self.now + seconds",
        _estimate("test_collectives_wait_for_each_other"),
    ),
    Mutant(
        _ESTIMATE,
        'engines.now += trips * self._run(one.attribute("body") or "", times * trips)',
        'engines.now += trips * self._run(one.attribute("body") or "", trips)',
        _estimate("test_loops_in_loops_are_multiplied_out"),
    ),
    Mutant(
        _ESTIMATE,
        'if engine in ("network", "hosts"):',
        'if engine in ("network", "hosts", "memory"):',
        _estimate("test_copies_to_nearer_memory_are_hidden_or_waited_for"),
    ),
    Mutant(
        _ESTIMATE,
        "size = 2.0 * known[one.operands[1]].bytes",
        "size = 2.0 * known[one.operands[0]].bytes",
        _estimate("test_operations_without_an_estimate_are_priced_by_their_bytes"),
    ),
    Mutant(
        _ESTIMATE,
        "and collective.channel not in engines.pending:",
        "and collective.channel in engines.pending:",
        _estimate(
            "test_a_collective_inside_fusions_counts_once_and_is_hidden",
            "test_a_product_that_does_a_collective_of_its_own_pays_for_both",
        ),
    ),
    Mutant(
        _ESTIMATE,
        "part = max(places, key=places.__getitem__)",
        "part = next(part for part in PARTS if places[part] >= 0 or part == PARTS[-1])",
        _estimate("test_parts_by_path"),
    ),
    Mutant(
        _HLO,
        '"s16": 2, "u16": 2, "bf16": 2,',
        '"s16": 2, "u16": 2, "bf16": 4,',
        _hlo("test_bytes_of_types"),
    ),
    Mutant(
        _HLO,
        "grid = grid if order is None else grid.transpose(order)",
        "grid = grid if order is None else grid.transpose(np.argsort(order)[::-1])",
        _hlo("test_replica_groups_in_every_spelling"),
    ),
    Mutant(
        "ecdit/models/flops.py",
        "return round(params * (1 - met))",
        "return round(params * met)",
        _counts("test_the_largest_model"),
    ),
    Mutant(
        "ecdit/models/flops.py",
        "else TOKEN_CHOICES / config.num_experts",
        "else capacity(config, size) / size",
        _counts("test_token_choice_activates_two_experts"),
    ),
    Mutant(
        "ecdit/models/flops.py",
        "projections = rows * (2 * width**2 + 2 * width * config.kv_heads * config.head_dim)",
        "projections = rows * 4 * width**2",
        _sizes("test_counts_equal_those_of_the_real_pass[changes3]"),
    ),
    Mutant(
        "ecdit/models/flops.py",
        "rows = config.depth * tokens + config.extra_blocks * all_tokens",
        "rows = (config.depth + config.extra_blocks) * tokens",
        _sizes("test_counts_equal_those_of_the_real_pass[changes0]"),
        "the last blocks are counted on kept tokens",
    ),
    Mutant(
        "ecdit/models/flops.py",
        "return tuple(PartFlops(name, float(seen), 2.0 * products)",
        "return tuple(PartFlops(name, float(seen), 1.0 * products)",
        _sizes("test_parts_by_hand"),
        "MFU is half of what it is: a multiply-add is two operations",
    ),
    Mutant(
        "ecdit/system.py",
        "return 3 * total_flops(",
        "return 2 * total_flops(",
        _sizes("test_parts_by_hand"),
    ),
    Mutant(
        "ecdit/reporting/speed.py",
        "return self._speed(sum(seconds) / len(seconds), sum(waits) / len(waits))",
        "return self._speed(seconds[-1], sum(waits) / len(waits))",
        ("tests/reporting/test_reporter.py::test_the_printed_speed_is_a_mean",),
    ),
    Mutant(
        "ecdit/reporting/speed.py",
        "peak = kind.peak_flops * jax.device_count() if kind else None",
        "peak = kind.peak_flops if kind else None",
        ("tests/reporting/test_reporter.py::test_the_peak_is_that_of_all_devices",),
        "MFU is printed as that of one chip",
    ),
    Mutant(
        _FITTING,
        'SPARING[1 + SPARING.index("minimal" if remat == "offload" else remat) :]',
        "SPARING",
        ("tests/planning/test_plan.py::test_a_more_sparing_policy_is_tried_first",),
    ),
    Mutant(
        _FITTING,
        "larger = 2 * target.slice.chips <= chips <= 8 * target.slice.chips",
        "larger = 4 * target.slice.chips <= chips <= 8 * target.slice.chips",
        ("tests/planning/test_plan.py::test_then_the_smallest_larger_slice",),
    ),
    Mutant(
        "ecdit/topology.py",
        'return f"{generation.prefix}-{self.chips * generation.cores}"',
        'return f"{generation.prefix}-{self.chips}"',
        ("tests/test_topology.py::test_another_layout_has_the_same_name_and_is_not_the_usual_one",),
        "half of the chips are asked for",
    ),
    Mutant(
        "ecdit/topology.py",
        "return {math.prod(shape): shape for shape in FLAT}",
        "return {math.prod(shape): shape[::-1] for shape in FLAT}",
        ("tests/test_topology.py::test_what_public_tables_say",),
    ),
    Mutant(
        "ecdit/topology.py",
        "return self.chips * GENERATIONS[self.chip].devices_per_chip",
        "return self.chips",
        ("tests/test_topology.py::test_a_chip_is_a_device_but_a_tpu7x_is_two",),
        "half of the devices of a TPU7x are in the mesh",
    ),
    Mutant(
        "ecdit/topology.py",
        "return self.chips_per_host * GENERATIONS[self.chip].devices_per_chip",
        "return self.chips_per_host",
        ("tests/test_topology.py::test_a_chip_is_a_device_but_a_tpu7x_is_two",),
    ),
    Mutant(
        "ecdit/planning/compiler.py",
        "return self.slice.devices * self.num_slices",
        "return self.slice.chips * self.num_slices",
        ("tests/planning/test_plan.py::test_targets_by_name",),
        "a plan's MFU on TPU7x is twice what it is",
    ),
    Mutant(
        "ecdit/planning/compiler.py",
        "index, device.core_on_chip)",
        "index)",
        ("tests/planning/test_plan.py::test_the_two_dies_of_a_chip_are_at_one_place",),
    ),
    Mutant(
        _COLLECTIVES,
        "nearby = sent * (members - chips) / (members - 1)",
        "nearby = 0.0",
        _collectives("test_both_dies_of_a_ring_of_four_chips"),
        "what two dies exchange is priced as if it crossed the links",
    ),
    Mutant(
        _COLLECTIVES,
        "hops = passes * (chips - 1)",
        "hops = passes * (members - 1)",
        _collectives("test_a_step_between_dies_is_a_hop"),
    ),
    Mutant(
        _COLLECTIVES,
        "return max(far, hops * HOP_SECONDS) + between_dies",
        "return max(far, hops * HOP_SECONDS)",
        _collectives("test_both_dies_of_a_ring_of_four_chips"),
    ),
    Mutant(
        _COLLECTIVES,
        "stays = not hops and a.die == b.die",
        "stays = not hops",
        _collectives("test_a_permute_between_dies_moves_bytes_and_between_chips_takes_a_link"),
        "what goes from die to die is free",
    ),
)
