"""Computes a whole DiT in plain float64 NumPy. It uses nothing of ecdit but the values of a config.

It covers blocks with dense FFNs or expert choice, and every option except renormalized gates.

Axes: B batch, N tokens of an image, M kept tokens, L text tokens, d width, H heads, K key-value heads, k head width,
G groups, S tokens of a group, E experts.
"""

import math

import numpy as np

EPSILON = 1e-6  # of every norm
SINUSOID_WIDTH = 256


def velocity(config, params, inputs, group_size):
    """The velocity [B, h, w, c] of noisy latents, and how many experts took each token in each sparse block.

    `params` is the model's, and `inputs` what it is called with (see helpers.Inputs); NumPy arrays of any precision.
    """
    params, (latents, time, text, size_crop, kept) = double(params), inputs
    batch, grid = len(latents), config.latent_size // config.patch_size
    row, column = np.divmod(np.arange(grid * grid), grid)

    normed_time, condition = conditions(params, double(time), double(text.pooled), double(size_crop))
    modulation = np.einsum("bd,dre->bre", condition, params["modulation"]) + params["modulation_bias"]
    text_states, text_mask = double(text.states), np.asarray(text.mask)

    half = config.width // 2
    places = np.concatenate([sinusoid(row, half), sinusoid(column, half)], axis=1) * config.absolute_positions
    x = linear(params["patches"], patches(double(latents), config.patch_size)) + places
    all_angles = np.stack([rope_angles(config, row, column)] * batch)
    angles = all_angles
    images = np.arange(batch)[:, None]
    if kept is not None:
        x, angles = x[images, kept], all_angles[images, kept]

    counts = []

    def run(block, x, angles):
        x, taken = run_block(config, block, x, angles, modulation, normed_time, text_states, text_mask, group_size)
        if taken is not None:
            counts.append(taken)
        return x

    for i in range(config.depth // 2):
        x = run(layer(params["pairs"]["odd"], i), x, angles)
        x = run(layer(params["pairs"]["even"], i), x, angles)
    if kept is not None:
        everywhere = np.stack([params["mask_token"] + places] * batch)
        everywhere[images, kept] = x
        x = everywhere
    for i in range(config.extra_blocks):
        x = run(layer(params["extra"], i), x, all_angles)

    head = np.einsum("bd,dre->bre", condition, params["head_modulation"]) + params["head_modulation_bias"]
    shift, scale = head[:, :1], head[:, 1:]
    out = linear(params["head"], layer_norm(x) * (1 + scale) + shift)
    out = image_of(out, config.patch_size, grid)
    if config.prediction == "data":  # and all times here are above 0.05
        out = (double(latents) - out) / double(time)[:, None, None, None]
    return out, np.array(counts)


# Tokens and their places


def patches(images, size):
    """[B, N, p]: squares of `size` pixels row by row, each flattened as (row, column, channel)."""
    starts = range(0, images.shape[1], size)
    cut = [images[:, y : y + size, x : x + size].reshape(len(images), -1) for y in starts for x in starts]
    return np.stack(cut, axis=1)


def image_of(tokens, size, grid):
    """The images [B, h, w, c] of which `tokens` are the patches."""
    rows = []
    for y in range(grid):
        squares = [tokens[:, y * grid + x].reshape(len(tokens), size, size, -1) for x in range(grid)]
        rows.append(np.concatenate(squares, axis=2))
    return np.concatenate(rows, axis=1)


def sinusoid(x, width):
    """[..., width]: cosines, then sines, of x at frequencies from 1 down to almost 1 / 10 000."""
    frequencies = 10_000.0 ** (-np.arange(width // 2) / (width // 2))
    angles = np.asarray(x)[..., None] * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)


def rope_angles(config, row, column):
    """[N, k/2]: half of a head's pairs turns with the token's row, the other half with its column."""
    pairs = config.width // config.heads // 4
    frequencies = config.rope_theta ** (-np.arange(pairs) / pairs)
    return np.concatenate([np.outer(row, frequencies), np.outer(column, frequencies)], axis=1)


# Conditions


def conditions(params, time, pooled, size_crop):
    """The normed embedding of the time, and SiLU of its sum with those of pooled caption, sizes and crop."""
    time = layer_norm(mlp(params["time"], sinusoid(1000 * time, SINUSOID_WIDTH)))
    caption = layer_norm(mlp(params["caption"], pooled))
    numbers = sinusoid(size_crop, SINUSOID_WIDTH)  # [B, 4, 256]: each number has a sinusoid of its own
    size_crop = layer_norm(mlp(params["size_crop"], numbers.reshape(len(numbers), -1)))
    return time, silu(time + caption + size_crop)


def mlp(p, x):
    return linear(p["out"], silu(linear(p["hidden"], x)))


# Blocks


def run_block(config, p, x, angles, modulation, normed_time, text_states, text_mask, group_size):
    """One block's output, and how many experts took each token [B, N] if it is sparse."""
    if config.block_table:
        modulation = modulation + p["table"]
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (modulation[:, i : i + 1] for i in range(6))
    x = x + gate * layer_norm(self_attention(config, p["attention"], layer_norm(x) * (1 + scale) + shift, angles))
    x = x + cross_attention(config, p["cross_attention"], layer_norm(x), text_states, text_mask)
    branch_input = layer_norm(x) * (1 + ffn_scale) + ffn_shift
    if "feed_forward" in p:
        branch, counts = layer_norm(feed_forward(p["feed_forward"], branch_input)), None
    else:
        logits = branch_input @ p["experts"]["router"]
        if config.router_input == "decoupled":
            of_time = normed_time @ p["experts"]["time_router"]
            logits = layer_norm(x) @ p["experts"]["router"] + of_time[:, None]
        branch, counts = experts(config, p["experts"], branch_input, logits, group_size)
        if config.moe_output_norm == "sandwich":
            branch = layer_norm(branch)
    return x + ffn_gate * branch, counts


def self_attention(config, p, x, angles):
    query = rotate(rms_norm(heads(x @ p["query"], config.heads), p["query_scale"]), angles)
    key = rotate(rms_norm(heads(x @ p["key"], config.kv_heads), p["key_scale"]), angles)
    value = heads(x @ p["value"], config.kv_heads)
    return attend(query, key, value, np.ones(x.shape[:2], bool)) @ p["out"]


def cross_attention(config, p, x, text_states, text_mask):
    query = rms_norm(heads(x @ p["query"], config.heads), p["query_scale"])
    key = rms_norm(heads(text_states @ p["key"], config.heads), p["key_scale"])
    return attend(query, key, heads(text_states @ p["value"], config.heads), text_mask) @ p["out"]


def heads(x, count):
    """[B, N, count, k]"""
    return x.reshape(*x.shape[:2], count, -1)


def rotate(x, angles):
    """Turns the pairs (x_i, x_{i + k/2}) of every head, read as complex numbers."""
    real, imaginary = np.split(x, 2, axis=-1)
    turned = (real + 1j * imaginary) * np.exp(1j * angles)[:, :, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def attend(query, key, value, mask):
    """softmax(query key / sqrt(k)) value over the tokens in `mask` [B, M]; query head h reads key head h // (H / K)."""
    outputs = []
    for h in range(query.shape[2]):
        of_key = h // (query.shape[2] // key.shape[2])
        scores = query[:, :, h] @ key[:, :, of_key].swapaxes(1, 2) / math.sqrt(query.shape[3])
        outputs.append(softmax(np.where(mask[:, None], scores, -np.inf)) @ value[:, :, of_key])
    return np.concatenate(outputs, axis=-1)


def experts(config, p, x, logits, group_size):
    """Expert choice: every expert takes the tokens of a group that it has the highest affinity to."""
    tokens, affinities = x.reshape(-1, group_size, x.shape[-1]), softmax(logits).reshape(-1, group_size, len(p["up"]))
    out, counts = np.zeros_like(tokens), np.zeros(tokens.shape[:2], int)
    capacity = math.ceil(group_size * config.capacity_factor / config.num_experts)
    for group, affinity in enumerate(affinities):
        for e in range(config.num_experts):
            taken = np.argsort(-affinity[:, e], kind="stable")[:capacity]
            y = feed_forward({"up": p["up"][e], "down": p["down"][e]}, tokens[group, taken])
            y = layer_norm(y) if config.moe_output_norm == "expert" else y
            out[group, taken] += affinity[taken, e, None] * y
            counts[group, taken] += 1
    out = out.reshape(x.shape)
    if config.num_shared_experts:
        shared = feed_forward(p["shared"], x)
        out = out + (layer_norm(shared) if config.moe_output_norm == "expert" else shared)
    return out, counts.reshape(x.shape[:2])


# Parts


def feed_forward(p, x):
    return gelu(x @ p["up"]) @ p["down"]


def linear(p, x):
    return x @ p["kernel"] + p["bias"]


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax(x):
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def layer_norm(x):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + EPSILON)


def rms_norm(x, scale):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPSILON) * scale


# Trees of parameters


def double(x):
    return {name: double(leaf) for name, leaf in x.items()} if isinstance(x, dict) else np.asarray(x, np.float64)


def layer(stack, i):
    """The parameters of the i-th block of a stack."""
    return {name: layer(leaf, i) if isinstance(leaf, dict) else leaf[i] for name, leaf in stack.items()}
