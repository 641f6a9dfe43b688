"""Measures what the storage of prepared text states changes in the loss of a trained run, on fixed images and noise.

    python -m tests.benchmarks.stored_states --workdir=runs/emoji [--images=1024] [--json=FILE]

The run's own text tower encodes the captions, its EMA weights predict, and the only difference between the rows is how
the states reach the denoiser: as they are, or as a column text-<name> keeps them (`data.text_states`), in bfloat16 or
in int8 with a scale for each token. Pooled states are bfloat16 in both. As images, noise and times are the same, a
difference of losses has the spread of the difference and not that of the loss; `spread` is its standard error.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ecdit.components import TextStates
from ecdit.data.text_states import restore, store
from ecdit.evaluation.flow_loss import BINS, Rows, fixed_rows, losses_by_image, make_loss_program
from ecdit.partitioning import batch_shards
from ecdit.runs.trained_run import Run, open_data, open_run

BATCH = 64  # images at a time, about


def encode(run: Run, tokens: np.ndarray) -> TextStates:
    """Returns the states of captions, int32[n, L], by the run's tower."""
    unit = BATCH * batch_shards(run.mesh)
    program = jax.jit(lambda params, rows: run.system.bind(params).text(rows))
    found = []
    with jax.set_mesh(run.mesh):
        for begin in range(0, len(tokens), unit):
            some = np.arange(begin, begin + unit) % len(tokens)  # one shape, so one compilation
            found.append(jax.device_get(program(run.params, tokens[some])))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(tokens)], *found)


def stored(rows: Rows, text: TextStates, kind: Any) -> Rows:
    """Returns rows that hold states, as a column of this kind gives them back, in place of tokens."""
    length = text.mask.shape[1]
    back = [
        restore(store(states, mask, pooled, 1, kind), length)
        for states, mask, pooled in zip(text.states, text.mask, text.pooled, strict=True)
    ]
    states, mask, pooled = (np.stack(parts) for parts in zip(*back, strict=True))
    rest = {name: values for name, values in rows.items() if name != "tokens"}
    return {**rest, "text_states": states, "text_mask": mask, "text_pooled": pooled}


def measure(run: Run, rows: Rows) -> dict[str, dict[str, Any]]:
    """Returns by kind of storage the loss, its difference from that of the states as they are, and its spread."""
    text = encode(run, rows["tokens"])
    ways = {"as they are": rows} | {kind: stored(rows, text, kind) for kind in ("bfloat16", "int8")}
    program = make_loss_program(run.system, run.mesh, BATCH)
    found, plain = {}, None
    for name, some in ways.items():
        losses = losses_by_image(program, run.params, some)
        plain = losses if plain is None else plain
        difference = (losses - plain).mean(axis=1)  # of an image, over the bins of time
        found[name] = {
            "loss": float(losses.mean()),
            "difference": float(difference.mean()),
            "spread": float(difference.std() / len(difference) ** 0.5),
            "by_time": (losses - plain).mean(axis=0).tolist(),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    run = open_run(arguments.workdir, draw=False, load=True)
    rows = fixed_rows(open_data(run, arguments.workdir), arguments.images, "train")
    found = measure(run, rows)
    print(f"step {run.step}, {len(rows['tokens'])} images at {BINS} times each")
    print("| states | loss | difference | spread | difference / loss |\n|---|---|---|---|---|")
    for name, row in found.items():
        loss, difference, spread = row["loss"], row["difference"], row["spread"]
        print(f"| {name} | {loss:.6f} | {difference:+.2e} | {spread:.1e} | {100 * difference / loss:+.4f} % |")
    if arguments.json:
        arguments.json.write_text(json.dumps({"step": run.step, "kinds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
