"""Plans a run on a slice: its memory, bytes sent, and an estimate of the step's time.

Every time is an estimate from the TPU compiler's own cycles and from formulas for the torus's links. Compare it with
estimates of other configs and with the estimate for a model of known speed (configs/README.md), not with a clock.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence

import jax

from ecdit.checkpoints.restore import state_parts
from ecdit.components import total_flops
from ecdit.diffusion.solvers import CALLS
from ecdit.experiment import Experiment, ResolvedPhase
from ecdit.partitioning import TILE_ROWS
from ecdit.planning.collectives import bytes_sent_by_kind
from ecdit.planning.compiler import CompiledStep, Target, What, compile_step, shard_bytes
from ecdit.planning.estimate import Estimate, Estimator, slowest
from ecdit.planning.hlo import parse
from ecdit.system import make_system

DAY = 86_400.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of a step on a slice. Bytes and seconds are per device and step unless a comment says otherwise."""

    topology: str
    what: What
    num_chips: int
    num_devices: int  # as JAX lists them: twice the chips for TPU7x
    batch_size: int  # images per step
    hbm_bytes_per_device: int
    hbm_limit: int
    hbm_parts: dict[str, int]  # parameters (also frozen ones), optimizer, ema, batch and padding, temporaries
    checkpoint_bytes_per_host: int
    save_blocks_seconds: float  # copies the arrays to the hosts, before which the next step cannot start
    compute_seconds: float
    compute_seconds_by_part: dict[str, float]
    priced_by_bytes: dict[str, float]  # part of compute_seconds without the compiler's estimate, by opcode
    collective_bytes: dict[str, float]  # bytes sent inside a slice, for each of the five kinds
    collective_bytes_by_axis: dict[str, float]
    collective_seconds: dict[str, float]  # by kind and axis, hidden or not
    dcn_bytes: float  # bytes sent to other slices
    exposed_communication_seconds: float
    memory_wait_seconds: float  # waits for copies between HBM and on-chip memory or the host's memory
    estimated_step_seconds: float
    seconds_all_hidden: float  # a step if computation hid all communication
    seconds_none_hidden: float
    model_flops_per_step: float  # the denoiser's, 3 x forward in training, 1 x per call in sampling
    peak_flops_per_device: float
    estimated_mfu: float
    images_per_second: float
    days: float  # time to the last step; 0 for sampling
    chip_hours: float
    slowest: dict[str, float]  # seconds of the slowest instructions, over all their runs
    warnings: list[str]


def make_plan(experiment: Experiment, target: Target, what: What = "train") -> Plan:
    """Plans `experiment`, which has no phases, by compiling its step. Takes minutes.

    Raises:
      ConfigError: the mesh, batch or groups do not fit the target.
      DoesNotFit: the step needs more memory than the chips have.
    """
    step = compile_step(experiment, target, what)
    estimate = Estimator(parse(step.text), step.torus).estimate
    flops, images = _model_flops(experiment, what), _images(experiment, what)
    seconds, peak = estimate.seconds, target.chip.peak_flops
    total_seconds = seconds * experiment.train.num_steps if what == "train" else 0.0
    state_bytes = shard_bytes(state_parts(step.state)) if step.state else 0
    return Plan(
        topology=target.name,
        what=what,
        num_chips=target.num_chips,
        num_devices=target.num_devices,
        batch_size=images,
        hbm_bytes_per_device=_needed(step),
        hbm_limit=int(target.chip.hbm_bytes),
        hbm_parts=_memory_parts(step),
        checkpoint_bytes_per_host=math.ceil(_saved_bytes(step) / (target.slice.hosts * target.num_slices)),
        save_blocks_seconds=state_bytes / target.chip.host_bandwidth,
        compute_seconds=estimate.compute_seconds,
        compute_seconds_by_part=dict(estimate.parts.most_common()),
        priced_by_bytes=dict(estimate.priced.most_common()),
        collective_bytes=bytes_sent_by_kind(estimate.collectives),
        collective_bytes_by_axis=_by_axis(estimate),
        collective_seconds=_by_kind_and_axis(estimate),
        dcn_bytes=sum(one.dcn_bytes * times for one, times in estimate.collectives.items()),
        exposed_communication_seconds=estimate.exposed_seconds,
        memory_wait_seconds=estimate.memory_wait_seconds,
        estimated_step_seconds=seconds,
        seconds_all_hidden=seconds - estimate.exposed_seconds,
        seconds_none_hidden=seconds - estimate.exposed_seconds + estimate.communication_seconds,
        model_flops_per_step=flops,
        peak_flops_per_device=peak,
        estimated_mfu=flops / (seconds * target.num_devices * peak),
        images_per_second=images / seconds,
        days=total_seconds / DAY,
        chip_hours=total_seconds / 3600 * target.num_chips,
        slowest=dict(slowest(estimate, 12)),
        warnings=misaligned(step),
    )


def report(plan: Plan) -> list[str]:
    """Returns the plan as lines of text."""
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in plan.hbm_parts.items())
    sent = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in plan.collective_bytes.items())
    compute = ", ".join(f"{name} {1e3 * s:.0f}" for name, s in plan.compute_seconds_by_part.items())
    chips = f"{plan.num_chips} chips" + (f" of {plan.num_devices} devices" if plan.num_devices > plan.num_chips else "")
    lines = [
        f"{plan.topology}: {chips}, {plan.what}, {plan.batch_size} images a step. Times are estimates.",
        f"memory of a device  {plan.hbm_bytes_per_device / 1e9:.2f} of {plan.hbm_limit / 1e9:.0f} GB: {parts}",
        f"step                {plan.estimated_step_seconds:.3f} s ({plan.seconds_all_hidden:.3f} if all communication "
        f"were hidden, {plan.seconds_none_hidden:.3f} if none), MFU {plan.estimated_mfu:.1%}",
        f"compute, ms         {compute}",
        f"sent, GB a device   {sent}",
        f"exposed             {1e3 * plan.exposed_communication_seconds:.0f} ms of communication, "
        f"{1e3 * plan.memory_wait_seconds:.0f} ms of copies between memories",
    ]
    if plan.what == "train":
        lines += [
            f"the whole run       {plan.images_per_second:,.0f} images/s, {plan.days:.1f} days, "
            f"{plan.chip_hours:,.0f} chip-hours",
            f"checkpoint          {plan.checkpoint_bytes_per_host / 1e9:.1f} GB a host, a save blocks for "
            f"{plan.save_blocks_seconds:.1f} s",
        ]
    return [*lines, f"dominated by        {advice(plan)}", *(f"warning: {warning}" for warning in plan.warnings)]


def report_phases(plans: Sequence[tuple[ResolvedPhase, Plan]]) -> list[str]:
    """Returns a line for each phase of a run with several phases. `report` describes the longest one."""
    if len(plans) == 1:
        return []
    return [
        f"steps {phase.after + 1} to {phase.last}: {plan.hbm_bytes_per_device / 1e9:.2f} of "
        f"{plan.hbm_limit / 1e9:.0f} GB a device, {plan.estimated_step_seconds:.3f} s a step"
        for phase, plan in plans
    ]


# The field to change if a part takes most of the step.
_FIELDS = {
    "experts": "the experts' products: model.capacity_factor sets their work, mesh.expert the layout of their slots",
    "ffn": "the dense FFNs: their products are near the chips' peak",
    "self_attention": "self-attention: its tokens are model.mask_ratio's",
    "cross_attention": "cross-attention: its text tokens are data.caption_length's",
    "optimizer": "the optimizer: more of mesh.fsdp or mesh.expert shards its state",
    "text_tower": "the text tower: text.packed_length leaves out padding; take a public one, whose states text.encode "
    "= prepared computes beforehand",
    "clip_text": "CLIP's text encoder: text.encode = prepared encodes captions beforehand; text.packed_length leaves "
    "out padding",
    "t5_encoder": "T5's encoder: text.encode = prepared encodes captions beforehand",
    "vae_encoder": "the autoencoder's encoder: vae.encode = prepared encodes images beforehand",
    "all_gather": "gathering weights: fewer of mesh.fsdp x mesh.expert, or more of train.batch_size for each chip",
    "reduce_scatter": "reducing gradients: more of train.batch_size for each chip",
    "all_reduce": "reducing gradients: more of mesh.fsdp instead of mesh.data",
    "all_to_all": "sending tokens to their experts: less of mesh.expert",
    "permute": "sending halves of experts' matrices: more of train.batch_size for each chip",
    "copies": "copies between memories: with model.remat = offload, another policy keeps activations on the chip",
}


def advice(plan: Plan) -> str:
    """Returns the part that takes most of the step, and the field that changes it."""
    shares = collections.Counter(plan.compute_seconds_by_part)
    hidden = plan.exposed_communication_seconds / max(sum(plan.collective_seconds.values()), 1e-12)
    for name, seconds in plan.collective_seconds.items():
        shares[name.split(" over ")[0]] += seconds * hidden  # pyright: ignore[reportArgumentType]  # a Counter of floats
    shares["copies"] = plan.memory_wait_seconds  # pyright: ignore[reportArgumentType]  # a Counter of floats
    name, seconds = shares.most_common(1)[0]
    return f"{_FIELDS.get(name, name)} ({seconds / plan.estimated_step_seconds:.0%} of the step)"


def misaligned(step: CompiledStep) -> list[str]:
    """Returns warnings about large parameters whose shards are no multiple of a tile's rows.

    `partitioning.param_axes` says why such shards are slow.
    """
    if step.state is None:
        return []
    found: dict[str, list[str]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(step.state.params):
        shard = leaf.sharding.shard_shape(leaf.shape)
        for size, part in zip(leaf.shape[-2:], shard[-2:], strict=True):
            if part != size and part % TILE_ROWS and math.prod(leaf.shape) > 2**20:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                found.setdefault(f"shards of {part} of {size}, no multiple of {TILE_ROWS}", []).append(name)
    return [f"{text}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}" for text, names in found.items()]


def _needed(step: CompiledStep) -> int:
    memory = step.memory
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    code = memory.generated_code_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + fresh + code


def _memory_parts(step: CompiledStep) -> dict[str, int]:
    memory, state = step.memory, step.state
    parts = {}
    if state is not None:
        parts = {
            "parameters": shard_bytes((state.params, state.frozen, state.loaded)),
            "optimizer": shard_bytes(state.optimizer),
            "ema": shard_bytes(state.ema),
        }
    rest = memory.argument_size_in_bytes - sum(parts.values())
    parts["batch and padding"] = rest  # the compiler pads the state's arrays to whole tiles
    return parts | {"temporaries": _needed(step) - memory.argument_size_in_bytes}


def _saved_bytes(step: CompiledStep) -> int:
    leaves = jax.tree.leaves(state_parts(step.state)) if step.state is not None else []
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def _images(experiment: Experiment, what: What) -> int:
    return experiment.train.batch_size if what == "train" else experiment.sampling.batch_size


def _model_flops(experiment: Experiment, what: What) -> float:
    """Returns the denoiser's FLOPs of a step, without the text encoder, the autoencoder and rematerialisation."""
    denoiser = total_flops(make_system(experiment.system).denoiser_flops(what))
    if what == "train":
        return 3 * denoiser * experiment.train.batch_size
    sampling = experiment.sampling
    passes = (1 if sampling.guidance.scale == 1 else 2) * CALLS[sampling.solver] * sampling.num_steps
    return denoiser * passes * sampling.batch_size


def _by_axis(estimate: Estimate) -> dict[str, float]:
    total: collections.Counter[str] = collections.Counter()
    for one, times in estimate.collectives.items():
        total[one.axis] += one.bytes_sent * times
    return dict(total.most_common())


def _by_kind_and_axis(estimate: Estimate) -> dict[str, float]:
    total: collections.Counter[str] = collections.Counter()
    for one, times in estimate.collectives.items():
        total[f"{one.kind} over {one.axis}"] += one.seconds * times
    return dict(total.most_common())
