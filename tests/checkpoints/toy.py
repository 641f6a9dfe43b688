"""Defines a toy model whose step adds 1 to every parameter, so that a state shows its step."""

import contextlib
import itertools
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ecdit.checkpoints import restore
from ecdit.partitioning import make_mesh, replicated
from ecdit.runs.activity import Activity
from ecdit.runs.evaluator import Evaluated
from ecdit.runs.training_run import Accepted, run_workload
from ecdit.runs.workload import Workload
from ecdit.training.state import TrainState
from tests.runs import tiny

SIZE = 1 << 20  # floats of a parameter: saving them takes longer than the next steps


def toy_state():
    zero = jnp.zeros((), jnp.int32)
    params = lambda: {"denoiser": {"head": jnp.zeros(SIZE), "tail": jnp.zeros(3)}}  # noqa: E731
    counts = {"bad_steps": jnp.copy(zero), "bad_in_row": jnp.copy(zero), "usual_loss": jnp.float32(jnp.inf)}
    return TrainState(zero, params(), params(), {}, {"count": jnp.copy(zero)}, **counts)


def toy_sharding():
    return replicated(make_mesh(tiny().mesh))


def toy_abstract():
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=toy_sharding())  # noqa: E731
    return jax.tree.map(like, jax.eval_shape(toy_state))


@partial(jax.jit, donate_argnums=0)
def toy_step(state, bad, leaf):
    """`bad` says whether the step counts as not finite, `leaf` which gradient it blames."""
    step, bad_in_row = state.step + 1, (state.bad_in_row + 1) * bad
    params, ema = jax.tree.map(lambda x: x + 1, (state.params, state.ema))
    new = TrainState(step, params, ema, {}, state.optimizer, state.bad_steps + bad, bad_in_row, state.usual_loss)
    loss = jnp.where(bad & (leaf < 0), jnp.nan, step.astype(jnp.float32))
    return new, {"loss": loss, "grad_norm": loss, "bad_in_row": bad_in_row, "bad_leaf": leaf}


class Toy:
    """A run of the toy in `workdir`. `at[n]` is called when batch n is asked for (n counts from 1, over all runs)."""

    def __init__(self, workdir):
        self.workdir, self.at, self.bad, self.leaf = workdir, {}, (), -1
        self.accepted = Accepted()
        self.first_rows = []  # of each start and phase
        self.first_state, self.train_step = toy_state, lambda state, bad: toy_step(state, bad, self.leaf)
        self.gradients = lambda state, bad: state.params
        self.evaluated = []  # (step, the numbers of the parameters that were evaluated)
        self.drawing = lambda: None  # is called when images are drawn, or an evaluation is made, and not yet written
        self.drawn = {}  # step: the numbers of the parameters that its images were drawn with

    def batches(self, phase, start_row):
        self.first_rows.append(start_row)
        for n in itertools.count(start_row // phase.experiment.train.batch_size + 1):
            self.at.get(n, lambda: None)()
            yield jnp.int32(n in self.bad)

    def write(self, params, step, permit):
        self.drawing()
        permit()
        self.drawn[step] = {tuple(np.unique(x).tolist()) for x in jax.tree.leaves(params)}
        path = self.workdir / f"{step}.png"
        Image.new("RGB", (4, 3)).save(path)
        return {"samples": path}

    def evaluate(self, params, step, permit):
        self.drawing()
        permit()
        self.evaluated.append((step, {tuple(np.unique(x).tolist()) for x in jax.tree.leaves(params)}))
        return Evaluated({"eval/loss": float(step)}, {})

    def is_recorded(self, step):
        return step in [done for done, _ in self.evaluated]

    def train(self, num_steps, every, keep=100, max_bad_steps=3, images_every=0, **more):
        overrides = {"num_steps": num_steps, "max_bad_steps": max_bad_steps, "log_every": 1000}
        overrides["images_every"] = images_every
        values = {f"train__{key}": value for key, value in overrides.items()} | more
        experiment = tiny(checkpoint__every=every, checkpoint__keep=keep, **values)
        with (
            jax.set_mesh(make_mesh(experiment.mesh)),
            contextlib.closing(Activity(experiment.train)) as activity,
        ):
            return run_workload(self.workload(experiment), experiment, self.workdir, {}, self.accepted, activity)

    def workload(self, experiment):
        return Workload(
            abstract=toy_abstract(),
            first_state=lambda: (jax.jit(self.first_state, out_shardings=toy_sharding())(), ""),
            load=dict,
            prepare_data=lambda: ["toy" for _ in experiment.resolved_phases()],
            tokenizer=lambda: {"words.txt": b"toy's words"},
            train_step=lambda phase: self.train_step,
            gradients=lambda phase: self.gradients,
            batches=self.batches,
            images=lambda phase, workdir: self,
            flops_per_image=lambda phase: 1.0,
            evaluator=lambda phase, workdir: self if experiment.evaluation.every else None,
        )

    def losses(self):
        lines = (self.workdir / "metrics.jsonl").read_text().splitlines()
        return [(row["step"], row["loss"]) for row in map(json.loads, lines)]

    def saved(self):
        """{step: (one number of each array that was saved)} of all checkpoints."""
        states = {}
        with restore.open_reader(self.workdir) as manager:
            for step in manager.all_steps():
                state = restore.restore(manager, step, toy_abstract())
                states[step] = {tuple(np.unique(x).tolist()) for x in jax.tree.leaves((state.params, state.ema))}
                assert int(state.step) == step
                assert restore.read_meta(manager, step).next_row == 16 * step
        return states
