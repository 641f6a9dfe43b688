"""Mutants of the denoiser's conditions: pixels, the text tower, and the whole model's parts."""

from tests.mutants.mutant import Mutant

_TOWER, _CODEC = "ecdit/encoders/text_tower.py", "ecdit/encoders/autoencoder.py"


def _tower(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/encoders/test_text_tower.py::{name}" for name in names)


MUTANTS = (
    Mutant(
        _CODEC,
        "return images.astype(jnp.float32) / 127.5 - 1.0",
        "return images.astype(jnp.float32) / 255.0",
        ("tests/encoders/test_autoencoder.py::test_bytes_span_minus_one_to_one",),
    ),
    Mutant(
        _CODEC,
        "jnp.clip(jnp.round((images + 1.0) * 127.5), 0, 255)",
        "jnp.clip(jnp.round((images + 1.0) * 128.0), 0, 255)",
        ("tests/encoders/test_autoencoder.py::test_all_bytes_survive_the_round_trip",),
    ),
    Mutant(
        _CODEC,
        "jnp.clip(jnp.round((images + 1.0) * 127.5), 0, 255)",
        "jnp.clip((images + 1.0) * 127.5, 0, 255)",
        ("tests/encoders/test_autoencoder.py::test_bytes_are_rounded_and_clipped",),
    ),
    Mutant(
        _TOWER,
        "jax.vmap(lambda row, i: row[i])(states, lengths - 1)",
        "states[:, -1]",
        _tower("test_pooled_is_the_state_of_the_last_token"),
        "the pooled caption is a state of padding",
    ),
    Mutant(
        _TOWER,
        "mask = tokens != PAD_ID",
        "mask = tokens > 1",
        _tower("test_the_empty_caption_is_its_end"),
        "the end of a caption counts as padding",
    ),
    Mutant(
        _TOWER,
        "placed = positions[None, : tokens.shape[1]] if",
        "placed = positions[None, :1] if",
        _tower("test_states_are_those_of_float64_numpy"),
    ),
    Mutant(
        _TOWER,
        "else hidden * jax.nn.sigmoid(1.702 * hidden)",
        "else hidden * jax.nn.sigmoid(hidden)",
        _tower("test_states_are_those_of_float64_numpy"),
    ),
    Mutant(
        _TOWER,
        "exact_gelu(hidden) if",
        "jax.nn.gelu(hidden) if",
        _tower("test_states_are_those_of_float64_numpy"),
        "weights of another library give other states",
    ),
    Mutant(
        _TOWER,
        "return layer_norm(x, epsilon=1e-5) * scale",
        "return layer_norm(x) * scale",
        _tower("test_norms_have_the_epsilon_of_clip_s"),
        "weights of another library give other states",
    ),
    Mutant(
        _TOWER,
        "x = x + self.attention(self.attention_norm(x), chunks)",
        "x = x + self.attention(self.ffn_norm(x), chunks)",
        _tower("test_states_are_those_of_float64_numpy"),
    ),
    Mutant(
        _TOWER,
        "return self.final_norm(x)",
        "return x",
        _tower("test_states_are_those_of_float64_numpy"),
    ),
    Mutant(
        "ecdit/system.py",
        'frozen = {"text"} if self.config.text.frozen else set()',
        'frozen = {"text"} if not self.config.text.frozen else set()',
        ("tests/launch/test_job.py::test_a_checkpoint_has_16_bytes_a_trained_parameter_and_4_a_frozen_one",),
    ),
    Mutant(
        "ecdit/system.py",
        "nnx.Rngs(key)), nnx.Param",
        "nnx.Rngs(0)), nnx.Param",
        ("tests/test_system.py::test_the_key_decides_the_draw",),
        "every seed draws the same parameters",
    ),
)
