"""Estimates the seconds of a compiled step from the compiler's own cycles and the torus's links, without measuring.

The estimator walks the schedule as the chip would. Computation runs in order. Collectives and copies with a start and a
done run beside it, each on its own engine: computation between start and done hides them, and done waits for the rest.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable

from ecdit.models.packing import SCOPE
from ecdit.planning.collectives import Collective, Torus, between_slices, collective_of, rendezvous
from ecdit.planning.hlo import HloError, Instruction, Module

# Operations that neither move data nor compute.
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id"}
FREE |= {"opt-barrier", "add-dependency", "domain"}
FREE_CALLS = {"AllocateBuffer", "AssumeGatherIndicesInBound", "PrepareAsyncCallStart", "PrepareAsyncCallDone"}
FREE_CALLS |= {"AsyncCollectiveStart", "AsyncCollectiveDone", "Sharding", "SPMDFullToShardShape"}
HOST_MEMORY = "S(5)"  # marks the type of an array in the memory of the chip's host
# Least shares of peak FLOP/s that attention's kernels reach by their schedules: see tests/planning/test_kernels.py.
KERNEL_SHARE = 1 / 9.6  # of `tuned.fused_attention` and of unknown kernels
KERNEL_SHARES = {"packed_attention": 1 / 4}  # by a kernel's name
SORT_OPERATIONS = 4  # vector operations per element, operand and stage: compare, two selects, a move

PARTS = ("self_attention", "cross_attention", "ffn", "experts", "router", "conditioning", "head")
PARTS += ("text_tower", "clip_text", "t5_encoder", "vae_encoder", "optimizer")


@dataclasses.dataclass
class Estimate:
    """The estimate of one step on one device, in seconds."""

    seconds: float = 0.0  # the step, with the overlap in its schedule
    compute_seconds: float = 0.0  # computation alone
    communication_seconds: float = 0.0  # all collectives, hidden or not
    exposed_seconds: float = 0.0  # waits of computation for collectives
    memory_wait_seconds: float = 0.0  # waits for copies between HBM and on-chip memory or the host's memory
    parts: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # compute by PARTS or "rest"
    priced: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # compute without cycles
    collectives: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # number of runs
    instructions: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # compute by name


class _Engines:
    """Keeps the times at which engines become free in one pass through a computation."""

    def __init__(self) -> None:
        self.now = 0.0
        self.free = {"network": 0.0, "hosts": 0.0, "host memory": 0.0, "memory": 0.0, "sparse core": 0.0}
        self.pending: dict[str, tuple[str, float]] = {}  # engine and end time by name or channel

    def start(self, key: str, engine: str, seconds: float) -> None:
        """Starts work that runs beside computation."""
        self.free[engine] = max(self.now, self.free[engine]) + seconds
        self.pending[key] = engine, self.free[engine]

    def wait(self, key: str) -> tuple[str, float]:
        """Waits for work; returns its engine and the seconds without computation."""
        engine, done = self.pending.pop(key)
        waited = max(0.0, done - self.now)
        self.now += waited
        return engine, waited


class Estimator:
    """Walks a module and fills `estimate`."""

    def __init__(self, module: Module, torus: Torus):
        self.module, self.torus, self.chip = module, torus, torus.chip
        self.estimate = Estimate()
        self.estimate.seconds = self._run(module.entry, 1)

    def _run(self, name: str, times: int) -> float:
        """Returns the seconds of one pass through a computation that runs `times` times."""
        engines = _Engines()
        computation = self.module.computations[name]
        sizes = {instruction.name: instruction for instruction in computation}
        for instruction in computation:
            self._step(instruction, sizes, engines, times)
        for key in list(engines.pending):  # the computation ends when all its work has ended
            self._waited(engines.wait(key), times)
        return engines.now

    def _step(self, one: Instruction, known: dict[str, Instruction], engines: _Engines, times: int) -> None:
        if one.opcode == "while":
            trips = self.module.trip_count(one)
            engines.now += trips * self._run(one.attribute("body") or "", times * trips)
        elif one.opcode == "call":
            engines.now += self._run(one.attribute("to_apply") or "", times)
        elif one.opcode == "conditional":
            engines.now += self._usual_branch(one, times)
        elif one.opcode.endswith("-update") and one.opcode != "dynamic-update-slice":
            self._update(one, known, engines, times)
        elif one.opcode == "send":  # sends to other slices through the hosts
            collective = between_slices(one, self.torus)
            self._count(collective, times)
            engines.start(collective.channel, "hosts", collective.seconds)
        elif one.opcode in ("recv", "send-done"):
            pass  # recv-done waits
        elif one.opcode == "recv-done":
            self._waited(engines.wait(rendezvous(known[one.operands[0]])), times)
        elif one.opcode.endswith("-done"):
            self._waited(engines.wait(one.operands[0]), times)
        elif _prepares(one):
            pass
        elif one.opcode.endswith("-start"):
            self._start(one, known, engines, times)
        elif (collective := self._synchronous(one)) is not None:
            self._synchronous_wait(collective, engines, times)
        elif (marker := self._marker(one)) == "AsyncCollectiveStart":
            collective = self._continued(one)
            self._count(collective, times)
            engines.start(collective.channel, "network", collective.seconds)
        elif marker == "AsyncCollectiveDone":
            self._waited(engines.wait(self._continued(one).channel), times)
        else:
            engines.now += self._compute(one, known, times)
            self._alone(one, engines, times)

    def _usual_branch(self, one: Instruction, times: int) -> float:
        """Returns the seconds of the faster branch where captions are packed, and counts that branch alone.

        Captions do not fit, and the other branch runs, in hardly any batches: see `models.packing`.

        Raises:
          HloError: this is another conditional.
        """
        if SCOPE not in one.op_name:
            raise HloError(f"{one.name}: a conditional's cost depends on its data")
        before, runs = self.estimate, []
        for branch in one.branches:
            self.estimate = Estimate()
            runs.append((self._run(branch, times), self.estimate))
        self.estimate = before
        seconds, found = min(runs, key=lambda run: run[0])
        for field in dataclasses.fields(Estimate):
            total, part = getattr(before, field.name), getattr(found, field.name)
            setattr(before, field.name, total + part)
        return seconds

    def _alone(self, one: Instruction, engines: _Engines, times: int) -> None:
        """Prices a collective fused into a product, unless it continues one that has already started."""
        collective = self._inside(one) if one.opcode == "fusion" else None
        if collective is not None and collective.channel not in engines.pending:
            self._synchronous_wait(collective, engines, times)

    def _synchronous_wait(self, collective: Collective, engines: _Engines, times: int) -> None:
        self._count(collective, times)
        waited = max(0.0, engines.free["network"] - engines.now) + collective.seconds
        engines.now += waited
        self._waited(("network", waited), times)

    def _update(self, one: Instruction, known: dict[str, Instruction], engines: _Engines, times: int) -> None:
        """Starts a prepared call to the SparseCores, or renames work that is running."""
        start = known[one.operands[0]]
        if _prepares(start):
            begun = dataclasses.replace(one, operands=one.operands[1:], attributes=start.attributes)
            self._start(begun, known, engines, times)
        else:
            engines.pending[one.name] = engines.pending.pop(start.name)

    def _start(self, one: Instruction, known: dict[str, Instruction], engines: _Engines, times: int) -> None:
        collective = collective_of(one, self.torus)
        engine = "network"
        if collective is None and one.called:
            collective = self._inside(one)
            engine = "network" if collective else "sparse core"
        if collective is not None:
            self._count(collective, times)
            engines.start(one.name, engine, collective.seconds)
        elif HOST_MEMORY in one.result:
            moved = min(
                (shape.bytes for shape in one.shapes if len(shape)), default=0
            )  # the slice, not the stack in host memory
            engines.start(one.name, "host memory", moved / self.chip.host_bandwidth)
        elif one.opcode == "copy-start":
            engines.start(one.name, "memory", one.shapes[0].bytes / self.chip.hbm_bandwidth)
        else:
            engines.start(one.name, engine, self._by_bytes(one, known))

    def _synchronous(self, one: Instruction) -> Collective | None:
        """Returns the collective that computation waits for, or None."""
        found = collective_of(one, self.torus)
        if found is None and one.opcode == "fusion" and one.cycles is None and self._marker(one) is None:
            return self._inside(one)
        return found

    def _inside(self, one: Instruction) -> Collective | None:
        """Returns the collective inside a fusion or an asynchronous call, or None."""
        body = list(self.module.reachable(self.module.computations[one.called])) if one.called else []
        scattered = "all-reduce-scatter" in (one.called or "")
        return next((found for i in body if (found := collective_of(i, self.torus, scattered))), None)

    def _continued(self, one: Instruction) -> Collective:
        """Returns the collective of a fusion that begins or ends one."""
        found = self._inside(one)
        assert found is not None  # the fusion with the marker also has the collective
        return found

    def _marker(self, one: Instruction) -> str | None:
        """Returns the marker in a fusion that begins or ends a collective spread over several fusions, or None."""
        body = self.module.computations.get(one.attribute("calls") or "", ()) if one.opcode == "fusion" else ()
        targets = {_target(i) for i in body if i.opcode == "custom-call"}
        return next((name for name in ("AsyncCollectiveStart", "AsyncCollectiveDone") if name in targets), None)

    def _compute(self, one: Instruction, known: dict[str, Instruction], times: int) -> float:
        if one.opcode in FREE or _target(one) in FREE_CALLS:
            return 0.0
        if one.cycles is not None:
            seconds = one.cycles / self.chip.clock
        else:
            seconds = self._sort(one) if one.opcode == "sort" else self._by_bytes(one, known)
            self.estimate.priced[_target(one) or one.opcode] += seconds * times  # pyright: ignore[reportArgumentType]  # not of ints
        self.estimate.compute_seconds += seconds * times
        self.estimate.parts[part_of(one.op_name)] += seconds * times  # pyright: ignore[reportArgumentType]  # not of ints
        self.estimate.instructions[f"{one.name} {one.op_name}"] += seconds * times  # pyright: ignore[reportArgumentType]  # not of ints
        return seconds

    def _by_bytes(self, one: Instruction, known: dict[str, Instruction]) -> float:
        """Prices an operation without an estimate by its bytes at HBM's rate, and a kernel also by its FLOPs."""
        size = float(one.bytes)
        if one.opcode == "dynamic-update-slice":  # in place
            size = 2.0 * known[one.operands[1]].bytes if one.operands[1] in known else size
        elif "gather" in one.name and "fusion" in one.opcode:  # reads only the gathered rows
            size *= 2
        else:
            size += sum(known[operand].bytes for operand in one.operands if operand in known)
        share = KERNEL_SHARES.get(one.name.partition(".")[0], KERNEL_SHARE)
        return max(size / self.chip.hbm_bandwidth, one.kernel_flops / (share * self.chip.peak_flops))

    def _sort(self, one: Instruction) -> float:
        """Prices a bitonic sort by its stages on the vector units."""
        dimension = int(one.attributes.split("dimensions={")[1].split("}")[0])
        length = one.shapes[0][dimension]
        steps = math.ceil(math.log2(max(length, 2)))
        operations = math.prod(one.shapes[0]) * len(one.shapes) * SORT_OPERATIONS * steps * (steps + 1) / 2
        return operations / self.chip.vector_flops

    def _count(self, collective: Collective, times: int) -> None:
        self.estimate.collectives[dataclasses.replace(collective, channel="")] += times
        self.estimate.communication_seconds += collective.seconds * times

    def _waited(self, waited: tuple[str, float], times: int) -> None:
        engine, seconds = waited
        if engine in ("network", "hosts"):
            self.estimate.exposed_seconds += seconds * times
        else:
            self.estimate.memory_wait_seconds += seconds * times


def part_of(op_name: str) -> str:
    """Returns the part of the model that comes last in an operation's path, or "rest"."""
    places = {part: op_name.rfind(part) for part in PARTS}
    part = max(places, key=places.__getitem__)
    return part if places[part] >= 0 else "rest"


def slowest(estimate: Estimate, count: int) -> Iterable[tuple[str, float]]:
    """Returns the instructions with the most seconds over all their runs."""
    return estimate.instructions.most_common(count)


def _prepares(one: Instruction) -> bool:
    """Returns whether this only prepares a call to the SparseCores, which its update starts with operands."""
    return one.opcode == "custom-call-start" and not one.operands


def _target(one: Instruction) -> str | None:
    if one.opcode != "custom-call":
        return None
    return one.attributes.partition('custom_call_target="')[2].partition('"')[0]
