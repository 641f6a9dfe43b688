"""Tests the walk through a schedule on programs that can be added up by hand: 1 GHz, links and memory of 1 GB/s."""

import pytest

from ecdit.planning.estimate import KERNEL_SHARE, KERNEL_SHARES, Estimator, part_of
from ecdit.planning.hlo import HloError, parse
from tests.planning.test_collectives import RING, torus

CYCLES = 'backend_config={{"window_config":{{"estimated_cycles":"{}"}}}}'
GROUPS = "channel_id={}, replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}"
GATHERED = 0.375  # seconds of a gather of a gigabyte by the ring of four


def compute(name, seconds, operands="%p", extra=""):
    cycles = CYCLES.format(int(seconds * 1e9))
    return (
        f'%{name} = f32[4] fusion({operands}), kind=kLoop, calls=%work, metadata={{op_name="jit(f)/{extra}"}}, {cycles}'
    )


def program(*lines, more=""):
    """A module whose entry runs `lines`."""
    work = "%work (p: f32[4]) -> f32[4] {\n  ROOT %p = f32[4] parameter(0)\n}\n"
    body = "\n".join(f"  {line}" for line in lines)
    return parse(f"{work}{more}ENTRY %e (p: f32[4]) -> f32[4] {{\n  %p = f32[4] parameter(0)\n{body}\n}}\n")


def estimate(*lines, more=""):
    return Estimator(program(*lines, more=more), RING).estimate


def gather(name, opcode="all-gather", channel=1):
    return f"%{name} = f32[250000000] {opcode}(%p), {GROUPS.format(channel)}"


def test_computation_adds_up_by_part():
    found = estimate(
        compute("a", 1.0, extra="experts/router/dot"), compute("b", 2.0, extra="transpose(jvp(experts))/x")
    )
    assert found.seconds == found.compute_seconds == pytest.approx(3)
    assert found.parts == {"router": pytest.approx(1), "experts": pytest.approx(2)}
    assert (found.communication_seconds, found.exposed_seconds) == (0, 0)


def test_a_synchronous_collective_is_exposed():
    found = estimate(compute("a", 1.0), gather("g"), compute("b", 1.0))
    assert found.seconds == pytest.approx(2 + GATHERED)
    assert found.exposed_seconds == found.communication_seconds == pytest.approx(GATHERED)


@pytest.mark.parametrize(("between", "exposed"), [(1.0, 0.0), (0.2, GATHERED - 0.2), (0.0, GATHERED)])
def test_what_lies_between_start_and_done_hides_it(between, exposed):
    start = gather("s", "all-gather-start").replace("f32[250000000] all", "(f32[62500000], f32[250000000]) all")
    found = estimate(start, compute("a", between), "%d = f32[250000000] all-gather-done(%s)")
    assert found.exposed_seconds == pytest.approx(exposed)
    assert found.seconds == pytest.approx(between + exposed)
    assert found.communication_seconds == pytest.approx(GATHERED)


def test_collectives_wait_for_each_other():
    """One network: the second starts when the first is done."""
    starts = [
        gather(name, "all-gather-start").replace("f32[250000000] all", "(f32[1], f32[250000000]) all")
        for name in ("s", "t")
    ]
    dones = ["%d = f32[1] all-gather-done(%s)", "%f = f32[1] all-gather-done(%t)"]
    assert estimate(*starts, *dones).seconds == pytest.approx(2 * GATHERED)


FUSED = f"""\
%begin (p: f32[4]) -> f32[4] {{
  %g = f32[250000000] all-gather(%p), {GROUPS.format(9)}
  ROOT %c = f32[4] custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}
%step (p: f32[4]) -> f32[4] {{
  ROOT %g = f32[250000000] all-gather(%p), {GROUPS.format(9)}
}}
%end (p: f32[4]) -> f32[4] {{
  %g = f32[250000000] all-gather(%p), {GROUPS.format(9)}
  ROOT %c = f32[4] custom-call(%g), custom_call_target="AsyncCollectiveDone"
}}
"""


def test_a_collective_inside_fusions_counts_once_and_is_hidden():
    """The compiler writes it into the fusion that starts it, into those that carry it on and into the last."""
    found = estimate(
        "%s = f32[4] fusion(%p), kind=kCustom, calls=%begin",
        f"%m = f32[4] fusion(%s), kind=kOutput, calls=%step, {CYCLES.format(300_000_000)}",
        "%d = f32[4] fusion(%m), kind=kCustom, calls=%end",
        more=FUSED,
    )
    assert list(found.collectives.values()) == [1]
    assert found.compute_seconds == pytest.approx(0.3)
    assert found.exposed_seconds == pytest.approx(GATHERED - 0.3)


SCATTERED = """\
%all-reduce-scatter.3 (p: f32[250000000]) -> f32[62500000] {
  %r = f32[250000000] all-reduce(%p), channel_id=4, replica_groups={{0,1,2,3}}, to_apply=%work
  ROOT %k = f32[62500000] dynamic-slice(%r), dynamic_slice_sizes={62500000}
}
"""


def test_a_reduce_scatter_that_hides_in_a_fusion_is_found():
    found = estimate("%f = f32[62500000] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3", more=SCATTERED)
    (one,) = found.collectives
    assert (one.kind, one.bytes_sent) == ("reduce_scatter", 0.75e9)
    assert found.exposed_seconds == pytest.approx(GATHERED)


def test_a_product_that_does_a_collective_of_its_own_pays_for_both():
    """Nothing began it before: it cannot be part of one that goes on."""
    fused = f"%m = f32[4] fusion(%p), kind=kOutput, calls=%step, {CYCLES.format(300_000_000)}"
    found = estimate(fused, more=FUSED)
    assert found.seconds == pytest.approx(0.3 + GATHERED)


ON_SPARSE_CORES = """\
%called (p: f32[250000000]) -> f32[62500000] {
  ROOT %r = f32[62500000] reduce-scatter(%p), channel_id=4, replica_groups={{0,1,2,3}}, to_apply=%work
}
"""
THREAD = 'async_execution_thread="sparsecore"'
# As libtpu 0.0.42 writes it, and as 0.0.50 does: there, `s` prepares, and `u` begins.
CALLS = {
    "call": (
        f"%s = ((f32[250000000]), f32[62500000]) call-start(%p), {THREAD}, to_apply=%called",
        "%d = f32[62500000] call-done(%s)",
    ),
    "custom call": (
        f'%s = ((), (), (s32[131072], s32[1])) custom-call-start(), {THREAD}, custom_call_target="TODO(b/1)", '
        "called_computations={%called}",
        "%u = ((f32[250000000]), f32[62500000], (s32[131072])) custom-call-update(%s, %p)",
        "%d = f32[62500000] custom-call-done(%u)",
    ),
}


@pytest.mark.parametrize("written", CALLS)
def test_a_call_to_the_sparse_cores_goes_on_beside(written):
    *begin, end = CALLS[written]
    found = estimate(*begin, compute("a", 1.0), end, more=ON_SPARSE_CORES)
    assert found.exposed_seconds == 0
    assert found.communication_seconds == pytest.approx(GATHERED)
    ((one, times),) = found.collectives.items()
    assert (one.kind, one.bytes_sent, times) == ("reduce_scatter", 0.75e9, 1)


@pytest.mark.parametrize("written", CALLS)
def test_a_call_begins_with_its_operands(written):
    """What is computed between its preparation and its beginning hides nothing."""
    *begin, end = CALLS[written]
    found = estimate(*begin[:-1], compute("a", 1.0), begin[-1], end, more=ON_SPARSE_CORES)
    assert found.exposed_seconds == pytest.approx(GATHERED)


@pytest.mark.parametrize(
    "start",
    [
        "%s = ((f32[9,250000000]{1,0:S(5)}, f32[1,250000000], s32[]), f32[9,250000000]{1,0:S(5)}, u32[]) "
        "dynamic-update-slice-start(%p)",
        "%s = ((f32[9,250000000]{1,0:S(5)}, s32[]), f32[1,250000000], u32[]) dynamic-slice-start(%p)",
    ],
    ids=["to the host", "back"],
)
def test_offloaded_activations_go_over_the_host_s_link(start):
    """A gigabyte, of a stack of nine."""
    done = f"%d = f32[1,250000000] {start.rpartition(' ')[2].removesuffix('(%p)').replace('start', 'done')}(%s)"
    found = estimate(start, compute("a", 0.25), done)
    assert found.seconds == pytest.approx(1)
    assert found.memory_wait_seconds == pytest.approx(0.75)
    assert found.exposed_seconds == 0


def test_what_goes_to_other_slices_is_waited_for_where_it_comes_back():
    """Two slices: half of a gigabyte is sent on and comes back, twice 0.5 GB at 0.1 GB/s, beside nine seconds' work."""
    names = '_xla_host_transfer_rendezvous="r_0",_xla_megascale_transfer_type="ALL_REDUCE"'
    module = program(
        "%x = f32[250000000] parameter(1)",
        f"%s = (f32[250000000], u32[], token[]) send(%x, %p), frontend_attributes={{{names}}}",
        "%t = token[] send-done(%s)",
        compute("a", 9.0),
        f"%r = (f32[250000000], u32[], token[]) recv(%p), frontend_attributes={{{names}}}",
        "%d = (f32[250000000], token[]) recv-done(%r)",
    )
    found = Estimator(module, torus((1, 1, 4), slices=2)).estimate
    (one,) = found.collectives
    assert (one.kind, one.axis, one.bytes_sent, one.dcn_bytes) == ("all_reduce", "slices", 0, 1e9)
    assert found.exposed_seconds == pytest.approx(1.0)


LOOP = f"""\
%inner_body (q: (s32[])) -> (s32[]) {{
  %q = (s32[]) parameter(0)
  {compute("w", 0.1, "%q")}
}}
%inner_condition (q: (s32[])) -> pred[] {{
  %q = (s32[]) parameter(0)
  %five = s32[] constant(5)
  ROOT %lt = pred[] compare(%q, %five), direction=LT
}}
%outer_body (q: (s32[])) -> (s32[]) {{
  %q = (s32[]) parameter(0)
  %inner = (s32[]) while(%q), condition=%inner_condition, body=%inner_body
  {gather("g")}
}}
%outer_condition (q: (s32[])) -> pred[] {{
  %q = (s32[]) parameter(0)
  %three = s32[] constant(3)
  ROOT %lt = pred[] compare(%q, %three), direction=LT
}}
"""


def test_loops_in_loops_are_multiplied_out():
    found = estimate("%w = (s32[]) while(%p), condition=%outer_condition, body=%outer_body", more=LOOP)
    assert found.compute_seconds == pytest.approx(3 * 5 * 0.1)
    assert list(found.collectives.values()) == [3]
    assert found.seconds == pytest.approx(1.5 + 3 * GATHERED)


def test_operations_without_an_estimate_are_priced_by_their_bytes():
    """A copy of a gigabyte reads and writes it at 1 GB/s; an update in place moves the update alone."""
    big = "%x = f32[250000000] parameter(1)"
    found = estimate(big, "%c = f32[250000000] copy(%x)")
    assert found.priced == {"copy": pytest.approx(2.0)}
    update = "%u = f32[25000000] parameter(2)"
    found = estimate(big, update, "%c = f32[250000000] dynamic-update-slice(%x, %u, %p)")
    assert found.seconds == pytest.approx(0.2)
    kernel = '%k = f32[250000000] custom-call(%x), custom_call_target="tpu_custom_call"'
    assert estimate(big, kernel).priced == {"tpu_custom_call": pytest.approx(2.0)}


def test_a_kernel_costs_its_bytes_or_its_work():
    """By what it says of itself, at a share of the peak of 1e12; a gigabyte read and one written are 2 s."""
    big = "%x = f32[250000000] parameter(1)"
    for flops, seconds in ((1e9, 2.0), (4e12 * KERNEL_SHARE, 4.0)):
        cost = f'backend_config={{"custom_call_config":{{"cost_estimate":{{"flops":"{flops:.0f}"}}}}}}'
        kernel = f'%k = f32[250000000] custom-call(%x), custom_call_target="tpu_custom_call", {cost}'
        assert estimate(big, kernel).seconds == pytest.approx(seconds)
    known = kernel.replace("%k", "%packed_attention.3")
    dearer = KERNEL_SHARE / KERNEL_SHARES["packed_attention"]
    assert estimate(big, known).seconds == pytest.approx(max(2.0, seconds * dearer))


def test_a_sort_costs_its_stages():
    """1024 long: 10 x 11 / 2 stages of 4 operations on each element and operand, at 1e9 of them a second."""
    found = estimate("%s = (f32[8,1024], s32[8,1024]) sort(%p, %p), dimensions={1}, to_apply=%work")
    assert found.seconds == pytest.approx(8 * 1024 * 2 * 4 * 55 / 1e9)


def test_copies_to_nearer_memory_are_hidden_or_waited_for():
    start = "%s = (f32[25000000]{0:S(1)}, f32[25000000], u32[]) copy-start(%p)"
    done = "%d = f32[25000000] copy-done(%s)"
    assert estimate(start, compute("a", 1.0), done).memory_wait_seconds == 0
    assert estimate(start, done).memory_wait_seconds == pytest.approx(0.1)


@pytest.mark.parametrize("form", ["branch_computations={{%{}, %{}}}", "true_computation=%{}, false_computation=%{}"])
@pytest.mark.parametrize("order", [("fast", "slow"), ("slow", "fast")])
def test_packed_captions_cost_their_faster_branch(form, order):
    """One second and a gather, in place of three seconds; the other branch counts nowhere. A loop runs it twice."""
    branches = "".join(
        f"%{name} (p: f32[4]) -> f32[4] {{\n  %p = f32[4] parameter(0)\n  {lines}\n}}\n"
        for name, lines in {
            "slow": compute("a", 3.0, extra="ffn/dot"),
            "fast": f"{compute('b', 1.0, extra='text_tower/dot')}\n  {gather('g')}",
        }.items()
    )
    metadata = 'metadata={op_name="jit(f)/text_tower/packed_captions/cond"}'
    chosen = f"%c = f32[4] conditional(%p, %p, %p), {form.format(*order)}, {metadata}"
    body = f"%body (p: f32[4]) -> f32[4] {{\n  %p = f32[4] parameter(0)\n  {chosen}\n}}\n"
    loop = '%w = f32[4] while(%p), body=%body, condition=%work, backend_config={"known_trip_count":{"n":"2"}}'
    found = estimate(compute("d", 1.0, extra="ffn/dot"), loop, more=branches + body)
    assert found.seconds == pytest.approx(1 + 2 * (1 + GATHERED))
    assert found.parts == {"ffn": pytest.approx(1), "text_tower": pytest.approx(2)}
    assert found.exposed_seconds == found.communication_seconds == pytest.approx(2 * GATHERED)
    assert list(found.collectives.values()) == [2]
    assert sum(found.instructions.values()) == pytest.approx(3)


def test_another_conditional_is_refused():
    with pytest.raises(HloError, match="a conditional's cost depends on its data"):
        estimate("%c = f32[4] conditional(%p), branch_computations={%work}")


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("jit(train_step)/jvp()/while/body/experts/router/top_k", "router"),
        ("jit(train_step)/transpose(jvp(text_tower))/while/body/dot", "text_tower"),
        ("jit(train_step)/jvp(t5_encoder)/while/body/dot", "t5_encoder"),
        ("jit(train_step)/jvp(vae_encoder)/conv", "vae_encoder"),
        ("jit(train_step)/optimizer/select_n", "optimizer"),
        ("jit(train_step)/jvp()/add", "rest"),
        ("", "rest"),
    ],
)
def test_parts_by_path(path, part):
    assert part_of(path) == part
