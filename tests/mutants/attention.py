"""Mutants of attention, of its fused kernels, and of patches and positions."""

from tests.mutants.mutant import Mutant

_PLAIN, _EMBEDDINGS = "ecdit/models/attention.py", "ecdit/models/embeddings.py"
_FUSED, _FUNCTIONS = "ecdit/tuned/fused_attention.py", "ecdit/functions.py"


def _attention(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/models/test_attention.py::{name}" for name in names)


def _fused(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/tuned/test_fused_attention.py::{name}" for name in names)


def _embeddings(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/models/test_embeddings.py::{name}" for name in names)


MUTANTS = (
    Mutant(
        _PLAIN,
        "preferred_element_type=jnp.float32) * width**-0.5",
        "preferred_element_type=jnp.float32) * heads**-0.5",
        _attention("test_self_attention_is_that_of_float64_numpy"),
    ),
    Mutant(
        _PLAIN,
        "jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))[None]",
        "jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool), 1)[None]",
        _attention("test_later_tokens_change_nothing_before_them"),
        "each token of a caption sees the next one",
    ),
    Mutant(
        _PLAIN,
        "scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)",
        "scores = jnp.where(mask[:, None, None], scores, 0.0)",
        _attention("test_padding_of_the_caption_changes_nothing"),
    ),
    Mutant(
        _PLAIN,
        "weights = jax.nn.softmax(scores, axis=-1)",
        "weights = jax.nn.softmax(scores, axis=-2)",
        _attention("test_self_attention_is_that_of_float64_numpy"),
    ),
    Mutant(
        _PLAIN,
        "key = _scaled(_scaled(key, norms[1]), norms[0])",
        "key = _scaled(key, norms[1])",
        _attention("test_cross_attention_is_that_of_float64_numpy"),
        "the queries' norm has no learned scale",
    ),
    Mutant(
        _PLAIN,
        "rotate(_scaled(key, norms[1]), angles)",
        "rotate(_scaled(key, norms[0]), angles)",
        _attention("test_self_attention_is_that_of_float64_numpy"),
    ),
    Mutant(
        _PLAIN,
        "jax.lax.rsqrt(jnp.square(x.astype(jnp.float32)).mean(axis=2) + epsilon)",
        "jax.lax.rsqrt(jnp.square(x.astype(jnp.float32)).sum(axis=2) + epsilon)",
        _attention("test_self_attention_is_that_of_float64_numpy"),
        "attention is nearly uniform: scores are too small by the head's width",
    ),
    Mutant(
        _PLAIN,
        'for name in ("query", "key", "value")\n        )',
        'for name in ("query", "key", "key")\n        )',
        _attention("test_causal_attention_is_that_of_float64_numpy"),
    ),
    Mutant(
        _PLAIN,
        "return (rows @ kernel).reshape(batch, tokens, -1)",
        "return (rows @ kernel).reshape(tokens, batch, -1).swapaxes(0, 1)",
        _attention("test_self_attention_is_that_of_float64_numpy"),
        "images get each other's tokens",
    ),
    Mutant(
        "ecdit/tuned/projections.py",
        'return jnp.einsum("bfn,bnd->fd", heads, gradient), gradient',
        'return jnp.einsum("bfn,bnd->fd", heads, gradient) / heads.shape[0], gradient',
        ("tests/models/test_partitioning.py::test_tuned_is_plain[fsdp-tensor-scattered-minimal]",),
        "attention's last matrix would learn at another rate than the rest, on TPUs alone",
    ),
    Mutant(
        _FUSED,
        "scores = _product(turned, key, 0, 0) * turned.shape[0] ** -0.5",
        "scores = _product(turned, key, 0, 0) * turned.shape[1] ** -0.5",
        _fused("test_it_is_the_plain_attention"),
    ),
    Mutant(
        _FUSED,
        "key = _prepared(key, scales[1], turn)",
        "key = _prepared(key, scales[0], turn)",
        _fused("test_it_is_the_plain_attention"),
    ),
    Mutant(
        _FUSED,
        "bias = None if mask is None else jnp.where(mask, 0.0, HIDDEN)",
        "bias = None if mask is None else jnp.where(mask, HIDDEN, 0.0)",
        _fused("test_it_is_the_plain_attention"),
    ),
    Mutant(
        _FUSED,
        "first * sin + second * cos], axis=0)",
        "first * sin - second * cos], axis=0)",
        _fused("test_it_is_the_plain_attention"),
    ),
    Mutant(
        _FUSED,
        "(query_scale.sum(axis=(0, 1)), key_scale.sum(axis=(0, 1)))",
        "(key_scale.sum(axis=(0, 1)), query_scale.sum(axis=(0, 1)))",
        _fused("test_it_is_the_plain_attention"),
        "the norms' scales of queries and keys learn from each other's gradients",
    ),
    Mutant(
        _FUSED,
        "norm[...] = jnp.zeros_like(norm)",
        "norm[...] = jnp.ones_like(norm)",
        _fused("test_so_are_its_kernels"),
    ),
    Mutant(
        "ecdit/patches.py",
        "return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1,",
        "return x.transpose(0, 3, 1, 2, 4, 5).reshape(batch, -1,",
        _embeddings("test_patches_are_read_row_by_row"),
        "tokens are in columns, and their positions in rows",
    ),
    Mutant(
        "ecdit/patches.py",
        "x = tokens.reshape(batch, grid, grid, patch, patch, channels)",
        "x = tokens.reshape(batch, grid, grid, channels, patch, patch).transpose(0, 1, 2, 4, 5, 3)",
        _embeddings("test_unpatchify_is_the_inverse"),
    ),
    Mutant(
        _EMBEDDINGS,
        "jnp.arange(half, dtype=jnp.float32) / half)",
        "jnp.arange(half, dtype=jnp.float32) / width)",
        _embeddings("test_sinusoid_by_hand"),
    ),
    Mutant(
        _EMBEDDINGS,
        "[sinusoid(position // grid, width // 2), sinusoid(position % grid, width // 2)]",
        "[sinusoid(position % grid, width // 2), sinusoid(position // grid, width // 2)]",
        _embeddings("test_grid_positions_by_hand"),
    ),
    Mutant(
        _EMBEDDINGS,
        "frequencies = theta ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)",
        "frequencies = theta ** (-jnp.arange(pairs, dtype=jnp.float32) / head_dim)",
        _embeddings("test_rope_angles_by_hand"),
    ),
    Mutant(
        _EMBEDDINGS,
        "row, column = (position // grid).astype(jnp.float32), (position % grid).astype(jnp.float32)",
        "row, column = (position // grid).astype(jnp.float32), position.astype(jnp.float32)",
        _embeddings("test_rope_angles_by_hand"),
        "a step to the right turns as much as one to the next row does in an image of one column",
    ),
    Mutant(
        _FUNCTIONS,
        "[first * cos - second * sin, first * sin + second * cos]",
        "[first * cos + second * sin, first * sin + second * cos]",
        _embeddings("test_rotation_by_hand"),
    ),
    Mutant(
        _FUNCTIONS,
        "cos, sin = jnp.cos(angles), jnp.sin(angles)",
        "cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)",
        _embeddings("test_rotation_is_float32_and_keeps_the_dtype"),
    ),
    Mutant(
        _EMBEDDINGS,
        "base.at[kept].set(tokens)",
        "base.at[kept].add(tokens)",
        _embeddings("test_tokens_are_taken_and_put_back_by_index"),
        "the mask token is added to what was kept",
    ),
)
