"""Predicts lower bounds of the time of training steps, sampling and the expert layer by their FLOPs and bytes.

    python -m tests.benchmarks.roofline [--chip="NVIDIA H100 80GB HBM3"] [--batch=256]

prints the tables of predictions in README.md. A part of the model takes the longer of FLOPs / peak and bytes /
bandwidth, and parts run one after another; `models.flops` counts FLOPs. No part reaches its bound, so times are too
short. Compare only ratios with measurements; they are right only if all parts miss their bounds by the same factor.

Bytes count each array that a kernel of its own reads or writes, in bfloat16: inputs and outputs of matrix products, of
GELU, of norms with what is beside them, of dispatch and combine (which adds in float32), and of attention's kernel,
without scores. The backward pass moves twice the bytes of the forward pass, as it does twice its FLOPs. Parameters are
float32: a use of one reads it, writes its bfloat16 copy and reads that. Not in it: routing's sorts, latencies, remat.

Axes: d width, f hidden width, t text width, L text tokens, E experts.
"""

import argparse
import dataclasses
from collections.abc import Iterable

from ecdit.chips import CHIPS, GPUS, Limits, limits
from ecdit.components import TextWidths
from ecdit.experiment import Experiment
from ecdit.models.config import DiTConfig
from ecdit.models.flops import denoiser_parts
from ecdit.system import make_system
from tests.benchmarks.paper import paper_experiment

CAST = 8  # bytes of a use of a parameter: float32 read, bfloat16 written and read
GRADIENT = 8  # bytes of a parameter's gradient: bfloat16 written and read, float32 written
# RMSProp with momentum and EMA: the gradient is read for its norm, then with parameter, EMA and both moments, which are
# written again.
UPDATE = 4 * (1 + 5 + 4)
ACTIVATION = 2  # bytes of a number in bfloat16


@dataclasses.dataclass(frozen=True)
class Work:
    """What a part of a step does, in all."""

    name: str
    flops: float
    bytes: float

    def seconds(self, chip: Limits) -> float:
        return max(self.flops / chip.peak_flops, self.bytes / chip.hbm_bandwidth)


def seconds(works: Iterable[Work], chip: Limits) -> float:
    """Parts one after the other."""
    return sum(work.seconds(chip) for work in works)


def text_widths(experiment: Experiment) -> TextWidths:
    """Of the states and the pooled state of the config's own tower."""
    return TextWidths(experiment.text.width, experiment.text.width)


def weights(model: DiTConfig, text_width: int) -> dict[str, float]:
    """Parameters of the denoiser's matrices, by the parts of `denoiser_parts`."""
    d, layers, kv = model.width, model.depth + model.extra_blocks, model.kv_heads * model.head_dim
    sparse = 0 if model.ffn == "dense" else model.depth // 2
    odd, even = layers - model.depth // 2, model.depth // 2 - sparse
    return {
        "self_attention": layers * (2 * d * d + 2 * d * kv),
        "cross_attention": layers * (2 * d * d + 2 * text_width * d),
        "ffn": 2 * d * d * (odd * model.ffn_multiplier + even * model.even_ffn_multiplier),
        "experts": sparse * 2 * d * model.expert_hidden * (model.num_experts + model.num_shared_experts),
        "router": sparse * d * model.num_experts,
        "conditioning": (5 * 256 + text_width + 3 * d + 8 * d) * d,
        "head": 2 * model.patch_dim * d,
    }


def ffn_numbers(width: int, hidden: int) -> float:
    """Numbers that a row of an FFN moves: both products, and GELU between them."""
    return 2 * width + 4 * hidden


def slot_numbers(width: int, hidden: int) -> float:
    """Numbers that a slot of an expert moves: dispatch, FFN, norm with gate, and combine, which adds in float32."""
    return 2 * width + ffn_numbers(width, hidden) + 2 * width + (1 + 4) * width


def activations(experiment: Experiment, tokens: int, group: str) -> dict[str, float]:
    """Numbers that one forward pass moves for one image, by part."""
    model, text_width, length = experiment.model, experiment.text.width, experiment.data.caption_length
    d, kv, layers = model.width, model.kv_heads * model.head_dim, model.depth + model.extra_blocks
    parts = {part.name: part for part in denoiser_parts(model, text_widths(experiment), length, tokens, group)}
    rows = parts["self_attention"].tokens
    around = 2 * d + 3 * d  # norm with modulation; output norm, gate and residual
    even = model.depth // 2 * tokens
    even_ffn = even if model.ffn == "dense" else 0
    return {
        # queries, keys and values, their norm and rotation, the kernel, the output's product
        "self_attention": rows * (around + 2 * d + 2 * (d + kv) + 2 * (d + kv) + (2 * d + 2 * kv) + 2 * d),
        "cross_attention": rows * (around + 2 * d + 2 * d + 2 * d + 2 * d)
        + layers * length * (2 * (text_width + d) + 2 * d + 2 * d),
        "ffn": (rows - even) * (around + ffn_numbers(d, model.ffn_multiplier * d))
        + even_ffn * (around + ffn_numbers(d, model.even_ffn_multiplier * d)),
        "experts": (even - even_ffn) * around + parts["experts"].tokens * slot_numbers(d, model.expert_hidden),
        "router": parts["router"].tokens * (d + 8 * model.num_experts),  # affinities in float32, a few times
        "conditioning": 12 * d,
        "head": parts["head"].tokens * (d + model.patch_dim),
    }


def text_work(experiment: Experiment, batch: int) -> Work:
    """The frozen tower, forward; its attention is plain and writes scores, in float32."""
    text, length = experiment.text, experiment.data.caption_length
    rows = batch * length * text.layers
    numbers = rows * (ffn_numbers(text.width, 4 * text.width) + 15 * text.width + 4 * 2 * text.heads * length)
    parameters = 12 * text.width**2 * text.layers
    return Work(
        "text_tower",
        batch * make_system(experiment.system).parts.text.flops(length).flops,
        ACTIVATION * numbers + CAST * parameters,
    )


def training_work(experiment: Experiment, batch: int, tower: bool = True) -> tuple[Work, ...]:
    """A step of training on `batch` images."""
    model, length = experiment.model, experiment.data.caption_length
    parameters, numbers = weights(model, experiment.text.width), activations(experiment, model.num_kept, model.group)
    works = [
        Work(
            part.name,
            3 * batch * part.flops,
            3 * ACTIVATION * batch * numbers[part.name] + (2 * CAST + GRADIENT) * parameters[part.name],
        )
        for part in denoiser_parts(model, text_widths(experiment), length, model.num_kept, model.group)
    ]
    works.append(Work("optimizer", 0.0, UPDATE * sum(parameters.values())))
    return (*works, text_work(experiment, batch)) if tower else tuple(works)


def sampling_work(experiment: Experiment, batch: int) -> tuple[Work, ...]:
    """A step of the solver for `batch` images with guidance, without the text tower, which runs once an image."""
    model, group = experiment.model, experiment.model.sampling_group
    parameters = weights(model, experiment.text.width)
    numbers = activations(experiment, model.num_tokens, group)
    length = experiment.data.caption_length
    return tuple(
        Work(
            part.name,
            2 * batch * part.flops,
            ACTIVATION * 2 * batch * numbers[part.name] + CAST * parameters[part.name],
        )
        for part in denoiser_parts(model, text_widths(experiment), length, model.num_tokens, group)
    )


def layer_work(model: DiTConfig, tokens: int) -> dict[str, tuple[Work, ...]]:
    """Forward and backward of the expert layer, and of the dense FFN that does as many FLOPs, on `tokens` tokens.

    For experts whose slots are capacity_factor a token.
    """
    d, f, slots = model.width, model.expert_hidden, model.capacity_factor * tokens
    flops, per_use = 3 * 2 * slots * 2 * d * f, 2 * CAST + GRADIENT
    dense_hidden = model.capacity_factor * f
    dense = 3 * ACTIVATION * tokens * ffn_numbers(d, dense_hidden) + per_use * 2 * d * dense_hidden
    experts = 3 * ACTIVATION * slots * slot_numbers(d, f) + per_use * 2 * d * f * model.num_experts
    router = 3 * ACTIVATION * tokens * (d + 8 * model.num_experts)
    return {
        "dense": (Work("ffn", flops, dense),),
        "experts": (
            Work("experts", flops, experts),
            Work("router", 3 * 2 * tokens * d * model.num_experts, router),
        ),
    }


def training_table(chip: Limits, batch: int) -> list[str]:
    """Steps of the three kinds of XL, and their ratios."""
    names = ("XL-dense", "XL-8E", "XL-8E-token_choice")
    experiments = [paper_experiment(name) for name in names]
    lines = [
        f"| {chip.name}, batch {batch} | denoiser TFLOP | parts at their bounds, ms | with the tower | time / dense | "
        "with the tower | FLOPs / dense |",
        "|---|---|---|---|---|---|---|",
    ]
    dense = None
    for name, experiment in zip(names, experiments, strict=True):
        alone, whole = (training_work(experiment, batch, tower) for tower in (False, True))
        found = sum(work.flops for work in alone), seconds(alone, chip), seconds(whole, chip)
        dense = dense or found
        ratios = " | ".join(f"{a / b:.3f}" for a, b in zip((*found[1:], found[0]), (*dense[1:], dense[0]), strict=True))
        lines.append(f"| {name} | {found[0] / 1e12:.1f} | {1e3 * found[1]:.1f} | {1e3 * found[2]:.1f} | {ratios} |")
    return lines


def sampling_table(chip: Limits, batches: Iterable[int]) -> list[str]:
    """Steps of the solver with experts against dense ones."""
    dense = paper_experiment("XL-dense")
    lines = [
        f"| {chip.name} | " + " | ".join(f"batch {batch}" for batch in batches) + " | by FLOPs |",
        "|---|" + "---|" * (len(tuple(batches)) + 1),
    ]
    for name in ("XL-8E", "XL-16E", "XL-32E"):
        experiment = paper_experiment(name)
        pairs = [(sampling_work(experiment, batch), sampling_work(dense, batch)) for batch in batches]
        over = [100 * (seconds(a, chip) / seconds(b, chip) - 1) for a, b in pairs]
        flops = [100 * (sum(w.flops for w in a) / sum(w.flops for w in b) - 1) for a, b in pairs]
        lines.append(f"| {name} | " + " | ".join(f"+{x:.0f} %" for x in (*over, flops[0])) + " |")
    return lines


def layer_table(chip: Limits, tokens: int) -> list[str]:
    """The expert layer over the dense FFN."""
    lines = [f"| {chip.name}, {tokens} tokens | layer / dense FFN of equal FLOPs |", "|---|---|"]
    for name in ("XL-8E", "XL-16E", "XL-32E"):
        works = layer_work(paper_experiment(name).model, tokens)
        lines.append(f"| {name} | {seconds(works['experts'], chip) / seconds(works['dense'], chip):.3f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", default="NVIDIA H100 80GB HBM3", choices=[*GPUS, *CHIPS], help="as JAX calls it")
    parser.add_argument("--batch", type=int, default=256, help="images of a training step")
    arguments = parser.parse_args()
    chip = limits(arguments.chip)
    for table in (
        training_table(chip, arguments.batch),
        layer_table(chip, 32 * 1024),
        sampling_table(chip, (1, 8, 64)),
    ):
        print("\n".join(table), end="\n\n")


if __name__ == "__main__":
    main()
