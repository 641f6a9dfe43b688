"""Tests plans of small steps by the real TPU compiler, and their reading of the compiler's output."""

import dataclasses
import importlib.util
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ecdit.errors import UserError
from ecdit.experiment import make_experiment
from ecdit.partitioning import MeshConfig, make_mesh
from ecdit.planning import fitting
from ecdit.planning.compiler import DoesNotFit, compile_step, find_target, make_torus, target_devices
from ecdit.planning.fitting import what_fits
from ecdit.planning.hlo import array_shapes, parse
from ecdit.planning.plan import Plan, advice, make_plan, report
from ecdit.runtime import TpuOptions
from ecdit.tuned.compiler_options import NO_TPU_OPTIONS, TPU_OPTIONS
from ecdit.tuned.experts import down_gradient, up_gradient
from launch.local import cpu_environment
from tests.runs import ROOT, command, run
from tests.system.test_ec_dit import SMALL, small_values

# Wide enough for whole tiles on four chips; a compilation takes some ten seconds.
CHANGES = {"model__width": 256, "model__heads": 4, "text__width": 128, "sampling__batch_size": 16}
# What the command plans: deep enough for offloading to be worth it, and experts' halves among its collectives.
DEEP = {"model__depth": 8, "train__batch_size": 128, "mesh__expert": 2, "model__expert_products": "halves"}


def small(**changes):
    return make_experiment(small_values("XL-8E", **CHANGES | changes))


class Planned(NamedTuple):
    printed: str
    values: dict[str, Any]
    written: Path
    cached: Path
    again: Callable[[], subprocess.CompletedProcess]


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """What the command printed and wrote, its cache's plan, and how to run it again."""
    folder = tmp_path_factory.mktemp("plan")
    changes = SMALL | {key.replace("__", "."): value for key, value in (CHANGES | DEEP).items()}
    arguments = command(
        "plan",
        f"--config={ROOT}/configs/ec_dit.py:XL-8E",
        *(f"--config.{key}={value}" for key, value in changes.items()),
        f"--config.runtime.compilation_cache={folder}/cache",
        "--topology=v5p:2x2x1",
        f"--json={folder}/plan.json",
    )
    environment = {name: value for name, value in cpu_environment(1).items() if name != "JAX_PLATFORMS"}
    result = run(arguments, environment)
    assert result.returncode == 0, result.stderr
    (cached,) = (folder / "cache/plans").iterdir()
    written = folder / "plan.json"
    values = json.loads(written.read_text())
    return Planned(result.stdout, values, written, cached, lambda: run(arguments, environment))


@pytest.fixture(scope="module")
def plan(planned):
    return Plan(**{field.name: planned.values[field.name] for field in dataclasses.fields(Plan)})


def test_a_plan_adds_up(plan):
    assert plan.num_chips == 4
    assert plan.hbm_bytes_per_device == sum(plan.hbm_parts.values()) < plan.hbm_limit
    parameters, moments, ema = (plan.hbm_parts[name] for name in ("parameters", "optimizer", "ema"))
    assert moments == pytest.approx(2 * ema, rel=1e-3)  # RMSProp's square and its momentum
    assert parameters > ema  # with the frozen text tower
    assert plan.hbm_parts["batch and padding"] >= 0
    assert plan.compute_seconds == pytest.approx(sum(plan.compute_seconds_by_part.values()))
    assert {"self_attention", "cross_attention", "ffn", "experts", "router"} <= set(plan.compute_seconds_by_part)
    assert plan.seconds_all_hidden <= plan.estimated_step_seconds <= plan.seconds_none_hidden
    hidden = plan.estimated_step_seconds - plan.seconds_all_hidden
    assert hidden == pytest.approx(plan.exposed_communication_seconds)
    assert set(plan.collective_bytes) == {"all_reduce", "reduce_scatter", "all_gather", "all_to_all", "permute"}
    assert sum(plan.collective_bytes_by_axis.values()) == pytest.approx(sum(plan.collective_bytes.values()))
    assert plan.dcn_bytes == 0


def test_the_speed_of_a_plan_by_hand(plan):
    seconds = plan.estimated_step_seconds
    assert plan.estimated_mfu == pytest.approx(plan.model_flops_per_step / (seconds * 4 * 459e12))
    assert plan.images_per_second == pytest.approx(128 / seconds)
    assert plan.days == pytest.approx(800_000 * seconds / 86_400)
    assert plan.chip_hours == pytest.approx(4 * 24 * plan.days)
    state_bytes = sum(plan.hbm_parts[name] for name in ("parameters", "optimizer", "ema"))
    assert plan.save_blocks_seconds == pytest.approx(state_bytes / 16e9, rel=0.01)
    # One host: what it saves is at least what its four chips share out, and no more than each having all.
    assert 1 <= plan.checkpoint_bytes_per_host / state_bytes <= 4


def test_the_flops_of_a_plan_are_the_denoiser_s(plan):
    from ecdit.components import TextWidths, total_flops
    from ecdit.models.flops import denoiser_parts

    experiment = small(**DEEP)
    parts = denoiser_parts(
        experiment.model, TextWidths(128, 128), 128, experiment.model.num_kept, experiment.model.group
    )
    assert plan.model_flops_per_step == pytest.approx(3 * 128 * total_flops(parts))


def test_what_people_read_of_a_plan(plan):
    text = "\n".join(report(plan))
    assert "v5p:2x2x1: 4 chips, train, 128 images a step. Times are estimates." in text
    assert re.search(r"MFU \d+\.\d%", text)
    assert "all_to_all" in text
    wide = dataclasses.replace(plan, compute_seconds_by_part={"experts": 0.9 * plan.estimated_step_seconds})
    assert advice(wide).startswith("the experts' products: model.capacity_factor")
    offloaded = dataclasses.replace(plan, memory_wait_seconds=0.9 * plan.estimated_step_seconds)
    assert advice(offloaded).startswith("copies between memories: with model.remat = offload")


@pytest.fixture(scope="module")
def routed():
    """What a chip of eight runs, all of them holding experts: the collectives are those of a pod."""
    changes = {
        "mesh__expert": 8,
        "train__batch_size": 128,
        "sampling__batch_size": 16,
        "runtime__tpu_options": NO_TPU_OPTIONS,
    }
    return compile_step(small(**changes), find_target("v5p:2x2x2"))


def test_a_tpu_gathers_weights_and_no_tokens(routed):
    """Tokens go to their experts by all-to-all over `expert`; a gather of activations would be of batch size."""
    experiment, module = small(), parse(routed.text)
    images, kept, width = 128, experiment.model.num_kept, experiment.model.width
    shapes = {"all-gather": [], "all-to-all": []}
    for computation in module.computations.values():
        for one in computation:
            if one.opcode in shapes:
                shapes[one.opcode] += [tuple(shape) for shape in array_shapes(one.result)]
    slots = [shape for shape in shapes["all-to-all"] if width in shape]
    assert len(slots) >= 4
    tokens = images // 8 * kept * width  # of one chip: what is gathered of tokens is more than that
    gathered = [shape for shape in shapes["all-gather"] if kept in shape[1:-1] or images in shape]
    assert [shape for shape in gathered if width in shape and _size(shape) > tokens] == []


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("gradient", [down_gradient, up_gradient])
def test_a_tpu_sums_experts_gradients_where_they_are_kept(gradient, experts):
    """A quarter of the hidden units of M's experts on a chip, which gets the sum of its own and not of all."""
    mesh = make_mesh(MeshConfig(slices=1, data=1, fsdp=4, expert=1, tensor=1), target_devices(find_target("v5p:2x2x1")))
    tokens = NamedSharding(mesh, PartitionSpec("expert", "fsdp"))
    width, hidden = (jax.ShapeDtypeStruct((experts, 32768, n), jnp.bfloat16, sharding=tokens) for n in (3072, 12288))
    with jax.set_mesh(mesh):
        arguments = (hidden, width) if gradient is down_gradient else (width, hidden)
        lowered = jax.jit(lambda *x: gradient(*x)[0]).lower(*arguments)
    program = lowered.compile(compiler_options=options()).as_text()
    kinds = {one.opcode.removesuffix("-start") for body in parse(program).computations.values() for one in body}
    assert kinds & {"all-reduce", "reduce-scatter"} == {"reduce-scatter"}


def options():
    """The compiler options of the paper's recipe."""
    return TpuOptions(**TPU_OPTIONS).of("v5p")


def _size(shape):
    size = 1
    for side in shape:
        size *= side
    return size


@pytest.mark.slow
def test_two_slices_meet_over_the_network_alone_by_data():
    experiment = small(mesh__slices=2, train__batch_size=128, runtime__tpu_options=NO_TPU_OPTIONS)
    found = make_plan(experiment, find_target("2xv5p:2x2x1"))
    assert found.num_chips == 8
    assert found.dcn_bytes > 0
    # Whatever goes between them is a gradient, or a number, added up.
    assert {name for name in found.collective_seconds if "slices" in name} == {"all_reduce over slices"}


@pytest.mark.slow
def test_a_plan_for_tpu7x_is_of_chips_that_are_two_devices():
    target = find_target("tpu7x:2x2x1")
    found = make_plan(small(runtime__tpu_options=NO_TPU_OPTIONS), target)
    assert (found.num_chips, found.num_devices) == (4, 8)
    assert found.hbm_bytes_per_device < found.hbm_limit == 96e9
    seconds = found.estimated_step_seconds
    assert found.estimated_mfu == pytest.approx(found.model_flops_per_step / (seconds * 4 * 2307e12))
    assert found.chip_hours == pytest.approx(4 * 24 * found.days)
    # All that is sent has its price, between the dies of a chip too.
    assert min(found.collective_seconds.values()) > 0
    assert "tpu7x:2x2x1: 4 chips of 8 devices, train, 64 images a step." in report(found)[0]


def test_an_axis_may_split_a_side_of_each_of_two_slices():
    """64 chips for the experts of 4 x 4 x 8: half of a side. No coordinate of the mesh but the first changes slices."""
    devices = target_devices(find_target("2xv5p:4x4x8"))
    mesh = make_mesh(MeshConfig(slices=2, data=1, fsdp=-1, expert=64, tensor=1), devices)
    assert mesh.devices.shape == (2, 1, 2, 64, 1)
    assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {1}]


@pytest.mark.slow
def test_offloaded_activations_are_in_the_host_s_memory(plan):
    """They need less of the chip's, and what is neither sent nor kept is computed again."""
    offloaded = make_plan(small(model__remat="offload", **DEEP), find_target("v5p:2x2x1"))
    assert offloaded.hbm_parts["temporaries"] < plan.hbm_parts["temporaries"]
    assert offloaded.compute_seconds > plan.compute_seconds
    assert min(plan.collective_bytes["permute"], offloaded.collective_bytes["permute"]) > 0


@pytest.mark.slow
def test_sampling_is_planned_too():
    found = make_plan(small(sampling__num_steps=3), find_target("v5p:2x2x1"), "sample")
    assert (found.what, found.batch_size, found.days) == ("sample", 16, 0)
    assert found.hbm_parts.keys() == {"batch and padding", "temporaries"}
    assert 0 < found.estimated_mfu < 1


@pytest.mark.parametrize(
    ("name", "chips", "devices", "slices"),
    [
        ("v5p:4x4x8", 128, 128, 1),
        ("v5p-256", 128, 128, 1),
        ("2xv5p:4x4x8", 256, 256, 2),
        ("v4-8", 4, 4, 1),
        ("tpu7x:4x4x4", 64, 128, 1),
        ("2xtpu7x-128", 128, 256, 2),
    ],
)
def test_targets_by_name(name, chips, devices, slices):
    target = find_target(name)
    assert (target.num_chips, target.num_devices, target.num_slices) == (chips, devices, slices)


def test_the_two_dies_of_a_chip_are_at_one_place():
    target = find_target("tpu7x:2x2x1")
    mesh = make_mesh(MeshConfig(slices=1, data=1, fsdp=4, expert=2, tensor=1), target_devices(target))
    torus = make_torus(mesh, target.chip)
    assert torus.shape == (2, 2, 1)
    assert sorted((place.coords, place.die) for place in torus.places) == [
        ((x, y, 0), die) for x in range(2) for y in range(2) for die in range(2)
    ]
    # The last axis is the nearest: each of its pairs is one chip.
    pairs = [torus.places[i : i + 2] for i in range(0, 8, 2)]
    assert all(a.coords == b.coords for a, b in pairs)


@pytest.mark.parametrize("name", ["v5litepod-1", "v6e-1", "2xv6e-1"])
def test_a_slice_may_have_one_chip(name):
    target = find_target(name)
    devices = target_devices(target)
    assert [tuple(device.coords) for device in devices] == [(0, 0, 0)] * target.num_slices


@pytest.mark.parametrize("installed", [True, False])
def test_the_advice_to_install_the_compiler_is_for_those_who_lack_it(monkeypatch, installed):
    from jax.experimental import topologies

    def refuse(**given):
        raise RuntimeError("INVALID_ARGUMENT: no such layout\nmore")

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    with pytest.raises(UserError) as caught:
        target_devices(find_target("v6e-1"))
    advice = "" if installed else ". Install it with pip install libtpu"
    assert str(caught.value) == (f"v6e-1: the TPU compiler cannot be used: INVALID_ARGUMENT: no such layout{advice}")


@pytest.mark.parametrize("name", ["v5p:4x4x9", "v99-8", "0xv5p:4x4x8", "tpu", "0xtpu7x:4x4x4"])
def test_other_targets_are_refused(name):
    with pytest.raises(UserError, match=re.escape(name.removeprefix("0x"))):
        find_target(name)


# What does not fit


def fake_compiler(monkeypatch, fits):
    """Compilations that are only asked whether they fit."""
    tried = []

    def compile_step(experiment, target):
        tried.append((experiment.model.remat, target.name))
        if not fits(experiment.model.remat, target.num_chips):
            raise DoesNotFit("too large")

    monkeypatch.setattr(fitting, "compile_step", compile_step)
    return tried


@pytest.mark.parametrize("remat", ["minimal", "offload"])
def test_a_more_sparing_policy_is_tried_first(monkeypatch, remat):
    tried = fake_compiler(monkeypatch, lambda remat, chips: remat == "full")
    said = what_fits(small(model__remat=remat), find_target("v5p:4x4x4"))
    assert said == "it fits with --config.model.remat=full"
    assert tried == [("attention_out", "v5p:4x4x4"), ("full", "v5p:4x4x4")]


def test_then_the_smallest_larger_slice(monkeypatch):
    tried = fake_compiler(monkeypatch, lambda remat, chips: chips >= 256)
    said = what_fits(small(model__remat="full"), find_target("v5p:4x4x4"))
    assert said.startswith("no remat policy makes it fit; v5p:4x8x8 does")
    assert tried == [("full", "v5p:4x4x8"), ("full", "v5p:4x8x8")]


def test_on_a_larger_slice_halves_of_experts_are_not_for_two_chips(monkeypatch):
    """With mesh.fsdp = -1 it is above 2 there, which halves would be refused for."""
    products = []

    def compile_step(experiment, target):
        products.append(experiment.model.expert_products)
        if target.num_chips < 128:
            raise DoesNotFit("too large")

    monkeypatch.setattr(fitting, "compile_step", compile_step)
    halves = small(model__remat="full", mesh__expert=32, model__expert_products="halves")
    said = what_fits(halves, find_target("v5p:4x4x4"))
    assert said.endswith("with --config.model.remat=full --config.model.expert_products=scattered")
    assert products == ["scattered"]


def test_sometimes_nothing_fits(monkeypatch):
    fake_compiler(monkeypatch, lambda remat, chips: False)
    assert what_fits(small(), find_target("v5p:4x4x4")).startswith("nothing tried fits")


@pytest.mark.slow
def test_the_compiler_says_what_is_largest():
    with pytest.raises(DoesNotFit, match=r"exceeds .*HBM"):
        compile_step(small(train__batch_size=2**17, model__group="image"), find_target("v4:2x2x1"))


# The command


def test_the_command_writes_what_fits_and_counts(planned):
    assert planned.values["fits"]
    assert planned.values["denoiser_params"] > 0


def test_the_command_remembers(planned):
    told = json.loads(planned.cached.read_text())
    planned.cached.write_text(json.dumps(told | {"days": 12345.0}))  # what a compilation would not say
    result = planned.again()
    assert result.returncode == 0, result.stderr
    assert result.stdout == planned.printed.replace(f"{told['days']:.1f} days", "12345.0 days")
    assert json.loads(planned.written.read_text()) == planned.values | {"days": 12345.0}
