"""Finds a config change or a slice with which a run fits its chips' memory."""

import dataclasses

from ecdit.config import ConfigError
from ecdit.experiment import Experiment
from ecdit.partitioning import ShardingError
from ecdit.planning.compiler import DoesNotFit, Target, compile_step, find_target
from ecdit.topology import usual_shapes

# Remat policies, from the most memory to the least, without "offload", whose time depends on the hosts.
SPARING = ("minimal", "attention_out", "full")


def what_fits(experiment: Experiment, target: Target) -> str:
    """Returns which remat policy fits the target, or else which larger slice fits with the most sparing policy.

    Compiles one candidate after another until one fits, which takes minutes each. Skips slices over which the config's
    mesh does not divide.
    """
    remat = getattr(experiment.model, "remat", None)
    if remat is None:
        return f"the denoiser {experiment.denoiser} has no remat policies to try; shard more by mesh.fsdp"
    policies = SPARING[1 + SPARING.index("minimal" if remat == "offload" else remat) :] if remat != "none" else SPARING
    for policy in policies:
        if _fits(_with_remat(experiment, policy), target):
            return f"it fits with --config.model.remat={policy}"
    sparing, flags = _with_remat(experiment, SPARING[-1]), f"--config.model.remat={SPARING[-1]}"
    if (
        getattr(experiment.model, "expert_products", "") == "halves" and experiment.mesh.fsdp == -1
    ):  # "halves" needs fsdp = 2, and a larger slice has more
        sparing = dataclasses.replace(sparing, model=dataclasses.replace(sparing.model, expert_products="scattered"))
        flags += " --config.model.expert_products=scattered"
    for chips in usual_shapes(target.chip.name):
        larger = 2 * target.slice.chips <= chips <= 8 * target.slice.chips
        if larger and chips & (chips - 1) == 0:  # meshes divide over powers of two
            shape = "x".join(map(str, usual_shapes(target.chip.name)[chips]))
            name = f"{target.chip.name}:{shape}"
            name = f"{target.num_slices}x{name}" if target.num_slices > 1 else name
            if _fits(sparing, find_target(name)):
                return f"no remat policy makes it fit; {name} does, with {flags}"
    return "nothing tried fits: no remat policy, and no slice of up to 8 times as many chips; shard more by mesh.fsdp"


def _with_remat(experiment: Experiment, policy: str) -> Experiment:
    return dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, remat=policy))


def _fits(experiment: Experiment, target: Target) -> bool:
    try:
        for phase in experiment.resolved_phases():
            compile_step(phase.experiment, target)
    except (DoesNotFit, ConfigError, ShardingError):
        return False
    return True
