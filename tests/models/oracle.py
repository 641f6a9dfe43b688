"""Computes a mixture of experts in float64 NumPy, slot by slot, with its backward pass written by hand.

Axes: G groups, S tokens of a group, E experts, d width, f hidden width.
"""

import math
from typing import NamedTuple

import numpy as np

EPSILON = 1e-6  # of the LayerNorm after each expert


class Layer(NamedTuple):
    """Parameters of a mixture of experts, and how it routes."""

    router: np.ndarray  # [d, E]
    up: np.ndarray  # [E, d, f]
    down: np.ndarray  # [E, f, d]
    rule: str  # expert_choice | token_choice
    capacity: int
    norm: bool  # of each expert's output, before its gate


class Output(NamedTuple):
    """What a layer makes of its tokens."""

    out: np.ndarray  # [G, S, d]
    counts: np.ndarray  # [G, S]: experts of each token
    balance_loss: np.ndarray  # [G], token choice
    drop_rate: np.ndarray  # [G], token choice


def softmax(logits):
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_slope(x):
    t = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)


def norm(y):
    y = y - y.mean()
    return y / math.sqrt((y**2).mean() + EPSILON)


def norm_backward(y, d_out):
    """The gradient of <d_out, norm(y)> for y."""
    centred = y - y.mean()
    deviation = math.sqrt((centred**2).mean() + EPSILON)
    d_centred = d_out / deviation - centred * (d_out * centred).mean() / deviation**3
    return d_centred - d_centred.mean()


def choices(affinity):
    """Each token's two best experts: [(first, second)] of one group [S, E]."""
    return [tuple(np.argsort(-row, kind="stable")[:2]) for row in affinity]


def slots(layer, affinity):
    """The (token, expert) pairs of one group [S, E]."""
    experts = affinity.shape[1]
    if layer.rule == "expert_choice":
        return [(s, e) for e in range(experts) for s in np.argsort(-affinity[:, e], kind="stable")[: layer.capacity]]
    taken = []
    for k in range(2):
        wishes = [(-affinity[s, pair[k]], s, pair[k]) for s, pair in enumerate(choices(affinity))]
        for _, s, e in sorted(wishes):
            if sum(expert == e for _, expert in taken) < layer.capacity:
                taken.append((s, e))
    return taken


def gate(layer, affinity, s, e):
    if layer.rule == "expert_choice":
        return affinity[s, e]
    return affinity[s, e] / sum(affinity[s, other] for other in choices(affinity)[s])


def expert(layer, x, e):
    """One expert on one token: its output, before gate and norm, and its hidden pre-activation."""
    hidden = x @ layer.up[e]
    return gelu(hidden) @ layer.down[e], hidden


def forward(layer: Layer, x: np.ndarray) -> Output:
    """The layer's output for grouped tokens [G, S, d]."""
    affinities = softmax(x @ layer.router)
    experts = layer.router.shape[1]
    out, counts, balance, drop = np.zeros_like(x), np.zeros(x.shape[:2], int), [], []
    for g, affinity in enumerate(affinities):
        taken = slots(layer, affinity)
        for s, e in taken:
            y, _ = expert(layer, x[g, s], e)
            out[g, s] += gate(layer, affinity, s, e) * (norm(y) if layer.norm else y)
            counts[g, s] += 1
        balance.append(experts * (first_shares(affinity) * affinity.mean(axis=0)).sum())
        drop.append(1 - len(taken) / (2 * len(affinity)))
    return Output(out, counts, np.array(balance), np.array(drop))


def first_shares(affinity):
    return np.bincount([first for first, _ in choices(affinity)], minlength=affinity.shape[1]) / len(affinity)


def backward(layer: Layer, x: np.ndarray, d_out: np.ndarray, d_balance: np.ndarray) -> dict[str, np.ndarray]:
    """The gradients of <d_out, out> + <d_balance, balance_loss> for x, router, up and down."""
    d_x, d_router, d_up, d_down = (np.zeros_like(a) for a in (x, layer.router, layer.up, layer.down))
    affinities = softmax(x @ layer.router)
    for g, affinity in enumerate(affinities):
        d_affinity = np.zeros_like(affinity)
        for s, e in slots(layer, affinity):
            y, hidden = expert(layer, x[g, s], e)
            value = gate(layer, affinity, s, e)
            z = norm(y) if layer.norm else y
            d_gate = d_out[g, s] @ z
            if layer.rule == "expert_choice":
                d_affinity[s, e] += d_gate
            else:  # value = a / (a + b)
                pair = choices(affinity)[s]
                total = affinity[s, list(pair)].sum()
                for other in pair:
                    d_affinity[s, other] += d_gate * ((other == e) - value) / total
            d_z = value * d_out[g, s]
            d_y = norm_backward(y, d_z) if layer.norm else d_z
            d_down[e] += np.outer(gelu(hidden), d_y)
            d_hidden = (layer.down[e] @ d_y) * gelu_slope(hidden)
            d_up[e] += np.outer(x[g, s], d_hidden)
            d_x[g, s] += layer.up[e] @ d_hidden
        if layer.rule == "token_choice":
            d_affinity += d_balance[g] * affinity.shape[1] * first_shares(affinity) / len(affinity)
        d_logits = affinity * (d_affinity - (affinity * d_affinity).sum(axis=1, keepdims=True))
        d_router += x[g].T @ d_logits
        d_x[g] += d_logits @ layer.router.T
    return {"x": d_x, "router": d_router, "up": d_up, "down": d_down}


def margin(layer: Layer, x: np.ndarray) -> float:
    """How far the closest routing decision is from a tie, in affinity."""
    affinity = softmax(x @ layer.router)
    across = np.diff(np.sort(affinity, axis=1), axis=1).min()  # between the tokens of an expert
    return min(across, np.diff(np.sort(affinity, axis=2), axis=2).min())  # between the experts of a token
