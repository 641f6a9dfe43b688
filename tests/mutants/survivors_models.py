"""Mutants of the models that once survived. New tests notice each of them."""

from tests.mutants.mutant import Mutant

_DIT, _KERNELS = "ecdit/models/dit.py", "ecdit/tuned/fused_attention.py"


def _kernels(case: str) -> tuple[str, ...]:
    """The kernels, interpreted, where a grid step loops over several key-value heads."""
    return (f"tests/tuned/test_fused_attention.py::test_so_are_its_kernels[{case}-loop_of_pairs]",)


def _whole(case: str) -> tuple[str, ...]:
    """The whole model against float64 NumPy."""
    return (f"tests/models/test_dit.py::test_the_whole_model_is_that_of_float64_numpy[{case}]",)


MUTANTS = (
    # Kernels of attention
    Mutant(
        _KERNELS,
        "queries = pl.ds(index * group, group)\n        out[0, queries]",
        "queries = pl.ds(index, group)\n        out[0, queries]",
        _kernels("self"),
        "queries would read the keys of other heads: wrong attention on TPUs alone",
    ),
    Mutant(
        _KERNELS,
        "queries = pl.ds(index * group, group)\n        forward",
        "queries = pl.ds(index, group)\n        forward",
        _kernels("self"),
        "gradients of queries and keys would be those of other heads, on TPUs alone",
    ),
    Mutant(
        _KERNELS,
        "norm[0, 0] += part",
        "norm[0, 0] = part",
        _kernels("self"),
        "the QK norms would learn from the last head of every grid step only",
    ),
    Mutant(
        _KERNELS,
        "function(index * together + head)",
        "function(index + head)",
        _kernels("cross"),
        "the last heads of a grid step would never be computed",
    ),
    Mutant(
        _KERNELS,
        "jax.lax.fori_loop(0, key.shape[1] // together, iteration, None)",
        "jax.lax.fori_loop(0, key.shape[1], iteration, None)",
        _kernels("cross"),
        "the loop would run past the heads of its grid step",
    ),
    Mutant(
        _KERNELS,
        "jnp.broadcast_to(norm / (images * chunks), ",
        "jnp.broadcast_to(norm / images, ",
        ("tests/tuned/test_fused_attention.py::test_it_is_the_plain_attention[cross-loop_of_pairs]",),
        "without a TPU the QK norms' gradients would grow with the number of chunks",
    ),
    # Conditions
    Mutant(
        _DIT,
        "sinusoid(1000.0 * time, SINUSOID_WIDTH)",
        "sinusoid(time, SINUSOID_WIDTH)",
        _whole("dense"),
        "the times of a sampler's steps would hardly be told apart",
    ),
    Mutant(
        _DIT,
        "sinusoid(1000.0 * time, SINUSOID_WIDTH)",
        "sinusoid(1000.0 * (1.0 - time), SINUSOID_WIDTH)",
        _whole("dense"),
        "checkpoints would be told the opposite of the time they were trained with",
    ),
    Mutant(
        _DIT,
        "normed = [layer_norm(part) for part in parts]",
        "normed = list(parts)",
        _whole("dense"),
        "the largest of the conditions would drown the others",
    ),
    Mutant(_DIT, "jax.nn.silu(sum(normed))", "jax.nn.silu(layer_norm(sum(parts)))", _whole("dense")),
    Mutant(_DIT, "jax.nn.silu(sum(normed))", "sum(normed)", _whole("dense")),
    Mutant(
        _DIT,
        'return constrain(normed[0], "batch", None)',
        'return constrain(sum(normed), "batch", None)',
        _whole("decoupled"),
        "decoupled routers would see the caption and not the time alone",
    ),
    Mutant(
        "ecdit/models/layers.py",
        "self.out(jax.nn.silu(self.hidden(x)))",
        "self.out(gelu(self.hidden(x)))",
        _whole("dense"),
    ),
    Mutant(
        _DIT,
        'return constrain(normed[0], "batch", None)',
        'return constrain(parts[0], "batch", None)',
        _whole("decoupled"),
        "decoupled routers would see the time unnormed",
    ),
    # Modulation
    Mutant(
        _DIT,
        "shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = jnp.split",
        "shift, scale, gate, ffn_scale, ffn_shift, ffn_gate = jnp.split",
        _whole("dense"),
    ),
    Mutant(
        _DIT,
        "shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = jnp.split",
        "scale, shift, gate, ffn_shift, ffn_scale, ffn_gate = jnp.split",
        _whole("dense"),
    ),
    Mutant(
        _DIT,
        "self.experts(branch_input, group_size",
        "self.experts(normed * (1 + ffn_shift) + ffn_scale, group_size",
        _whole("masked"),
        "in sparse blocks shift and scale would be swapped",
    ),
    Mutant(
        _DIT,
        "constrain(x + ffn_gate * branch,",
        "constrain(x + gate * branch,",
        _whole("dense"),
        "the FFN would have the attention's gate, and its own would learn nothing",
    ),
    Mutant(
        _DIT,
        "self.attention(layer_norm(x) * (1 + scale) + shift, angles)",
        "self.attention(layer_norm(x) * scale + shift, angles)",
        _whole("dense"),
        "a scale of 0, the initial one, would hide all tokens",
    ),
    Mutant(
        _DIT,
        "self.head(layer_norm(x.astype(jnp.float32)) * (1 + scale) + shift)",
        "self.head(layer_norm(x.astype(jnp.float32)) * scale + shift)",
        _whole("dense"),
        "the head would start with a gradient of 0",
    ),
    Mutant(
        _DIT,
        "shift, scale = jnp.split(_modulate(condition, self.head_modulation",
        "scale, shift = jnp.split(_modulate(condition, self.head_modulation",
        _whole("dense"),
    ),
    Mutant(
        _DIT,
        "self.head(layer_norm(x.astype(jnp.float32)) * (1 + scale) + shift)",
        "self.head(x.astype(jnp.float32) * (1 + scale) + shift)",
        _whole("dense"),
    ),
    Mutant(
        _DIT,
        "self.feed_forward(branch_input)",
        "self.feed_forward(normed)",
        _whole("dense"),
        "dense FFNs would not see the conditions",
    ),
    Mutant(
        _DIT,
        "self.attention(layer_norm(x) * (1 + scale) + shift, angles)",
        "self.attention(layer_norm(x), angles)",
        _whole("dense"),
        "attention would not see the conditions",
    ),
    Mutant(_DIT, "constrain(x + ffn_gate * branch,", "constrain(x + branch,", _whole("dense")),
    Mutant(
        _DIT,
        "x = x + gate * layer_norm(self.attention(layer_norm(x) * (1 + scale) + shift, angles))",
        "x = x + layer_norm(gate * self.attention(layer_norm(x) * (1 + scale) + shift, angles))",
        _whole("dense"),
        "the norm would take away the size of the gate",
    ),
    # Blocks
    Mutant(
        _DIT,
        "rope_angles(config.grid, config.head_dim, config.rope_theta)",
        "rope_angles(config.grid, config.head_dim, 10_000.0)",
        _whole("large"),
    ),
    Mutant(
        _DIT,
        "self.attention(layer_norm(x) * (1 + scale) + shift, angles)",
        "self.attention(x * (1 + scale) + shift, angles)",
        _whole("dense"),
    ),
    Mutant(
        _DIT,
        "self.cross_attention(layer_norm(x), text.states",
        "self.cross_attention(layer_norm(x) * (1 + scale) + shift, text.states",
        _whole("dense"),
        "cross-attention is unmodulated",
    ),
    Mutant(
        _DIT,
        "self.cross_attention(layer_norm(x), text.states",
        "self.cross_attention(x, text.states",
        _whole("dense"),
    ),
    Mutant(
        _DIT,
        "x = x + self.cross_attention(",
        "x = x + gate * self.cross_attention(",
        _whole("dense"),
        "cross-attention has no gate",
    ),
    Mutant(_DIT, "normed = layer_norm(x)\n", "normed = x\n", _whole("dense"), "the FFN's input would not be normed"),
    Mutant(
        _DIT,
        """x, _ = pair.odd(x, angles, modulation, time_state, text, group_size)
            return pair.even(x, angles, modulation, time_state, text, group_size, with_gates)""",
        """x, report = pair.even(x, angles, modulation, time_state, text, group_size, with_gates)
            return pair.odd(x, angles, modulation, time_state, text, group_size)[0], report""",
        _whole("masked"),
        "the sparse block of a pair would come before the dense one",
    ),
)
