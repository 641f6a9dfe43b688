"""Tests the parser of the compiler's text, on lines in the compiler's form."""

import pytest

from ecdit.planning.hlo import HloError, Shape, array_shapes, parse, replica_groups, source_target_pairs

TEXT = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%body.1 (wide.param: (s32[], bf16[4,16])) -> (s32[], bf16[4,16]) {
  %wide.param = (s32[]{:T(128)}, bf16[4,16]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  ROOT %tuple.1 = (s32[]{:T(128)}, /*index=1*/bf16[4,16]{1,0}) tuple(%wide.param, %wide.param)
}

%condition.1 (param: (s32[], bf16[4,16])) -> pred[] {
  %constant.7 = s32[]{:T(128)} constant(19)
  %param = (s32[], bf16[4,16]) parameter(0)
  %get-tuple-element.1 = s32[]{:T(128)} get-tuple-element(%param), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%get-tuple-element.1, %constant.7), direction=LT, metadata={op_name="jit(f)/lt"}
}

%called (x: f32[]) -> pred[] {
  %x = f32[] parameter(0)
  %constant.8 = s32[] constant(3)
  ROOT %lt.2 = pred[] compare(%constant.8, %constant.8), direction=LT
}

%condition.2 (param: (s32[])) -> pred[] {
  %param.2 = (s32[]) parameter(0)
  ROOT %fusion.2 = pred[] fusion(%param.2), kind=kLoop, calls=%called
}

ENTRY %main.42_spmd (param.0: f32[8]) -> f32[8] {
  %param.0 = f32[8]{0:T(1024)} parameter(0)
  %while.5 = (s32[]{:T(128)}, bf16[4,16]{1,0}) while(%param.0), condition=%condition.1, body=%body.1
  ROOT %fusion.9 = f32[8]{0} fusion(%param.0, %while.5), kind=kLoop, calls=%called, \
metadata={op_name="jit(f)/a(b)/add"}, backend_config={"window_config":{"estimated_cycles":"2125"}}
}
"""


@pytest.fixture(scope="module")
def module():
    return parse(TEXT)


def test_instructions_by_hand(module):
    assert module.entry == "main.42_spmd"
    parameter, loop, fusion = module.computations["main.42_spmd"]
    assert (loop.name, loop.opcode, loop.operands) == ("while.5", "while", ("param.0",))
    assert loop.shapes == ((), (4, 16))
    assert [shape.dtype for shape in loop.shapes] == ["s32", "bf16"]
    assert loop.bytes == 4 + 4 * 16 * 2
    assert (fusion.operands, fusion.attribute("calls")) == (("param.0", "while.5"), "called")
    assert (fusion.cycles, fusion.op_name) == (2125, "jit(f)/a(b)/add")
    assert (parameter.cycles, parameter.op_name, parameter.literal) == (None, "", "0")


def test_trip_counts_come_from_the_condition(module):
    loop = module.computations[module.entry][1]
    assert module.trip_count(loop) == 19
    elsewhere = TEXT.replace("condition=%condition.1", "condition=%condition.2")
    assert parse(elsewhere).trip_count(parse(elsewhere).computations[module.entry][1]) == 3


@pytest.mark.parametrize(
    ("old", "new"), [("direction=LT, metadata", "direction=GT, metadata"), ("constant(19)", "parameter(1)")]
)
def test_a_loop_that_cannot_be_counted_is_an_error(module, old, new):
    other = parse(TEXT.replace(old, new))
    with pytest.raises(HloError, match=r"while\.5: cannot tell how often it runs"):
        other.trip_count(other.computations[other.entry][1])


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("f32[2,3]{1,0}", 24),
        ("bf16[]", 2),
        ("pred[7]", 7),
        ("(f32[2]{0}, s8[3])", 11),
        ("s4[3]", 2),
        ("f8e4m3fn[5]", 5),
    ],
)
def test_bytes_of_types(text, size):
    assert sum(shape.bytes for shape in array_shapes(text)) == size


def test_a_type_without_a_size_is_an_error():
    with pytest.raises(HloError, match="element type 'quantum'"):
        _ = Shape("quantum", (2,)).bytes


def collective(attributes):
    line = f"  ROOT %all-reduce.1 = f32[8]{{0}} all-reduce(%x), channel_id=3, {attributes}"
    module = parse(f"ENTRY %e (x: f32[8]) -> f32[8] {{\n{line}\n}}\n")
    return module.computations["e"][0]


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, to_apply=%add", ((0, 1), (2, 3))),
        ("replica_groups=[2,4]<=[8], to_apply=%add", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=3] {'c'}", ((0, 1, 2), (3, 4, 5))),
        ("replica_groups=mesh['a'=2,'b'=3] {'a'}", ((0, 3), (1, 4), (2, 5))),
        # The devices of the mesh are those of a 2 x 3 grid, read column by column: 0 3 1 4 2 5.
        ("replica_groups=mesh['a'=3,'b'=2], device_ids=([2,3]T(1,0)) {'a'}", ((0, 1, 2), (3, 4, 5))),
        ("replica_groups=mesh['a'=4] {'a'}", ((0, 1, 2, 3),)),
        ("replica_groups={}", None),
    ],
)
def test_replica_groups_in_every_spelling(attributes, groups):
    assert replica_groups(collective(attributes)) == groups


def test_replica_groups_in_another_spelling_are_an_error():
    with pytest.raises(HloError, match=r"all-reduce\.1: the replica groups have an unknown form"):
        replica_groups(collective("replica_groups=<5>"))


def test_pairs_of_a_permute():
    assert source_target_pairs(collective("source_target_pairs={{0,1},{1,2},{2,0}}")) == ((0, 1), (1, 2), (2, 0))


@pytest.mark.parametrize("text", ["", "%a (x: f32[]) -> f32[] {\n  %x = f32[] parameter(0)\n}\n"])
def test_text_without_an_entry_is_an_error(text):
    with pytest.raises(HloError, match="no entry computation"):
        parse(text)


def test_a_line_that_is_no_instruction_is_an_error():
    with pytest.raises(HloError, match=r"not an instruction: .*what is this"):
        parse("ENTRY %e (x: f32[]) -> f32[] {\n  what is this\n}\n")
