"""Mutants of packed captions, and of how a plan counts them."""

from tests.mutants.mutant import Mutant

_KERNEL = "ecdit/tuned/packed_attention.py"
_PACKING, _TOWER, _CLIP = "ecdit/models/packing.py", "ecdit/encoders/text_tower.py", "ecdit/pretrained/clip_text.py"


def _tests(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/models/test_packing.py::{name}" for name in names)


def _kernel(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/tuned/test_packed_attention.py::{name}" for name in names)


_BY_HAND, _SAME = _tests("test_a_stream_by_hand"), _tests("test_packed_states_are_those_of_padded_captions")

MUTANTS = (
    Mutant(
        _PACKING,
        "mask = (caption[:, :, None] == of_keys[:, None]) & (",
        "mask = (",
        _BY_HAND,
        "a caption sees the one before it",
    ),
    Mutant(
        _PACKING,
        "earlier(caption, before, 0, 1, fill=-1)",
        "earlier(caption, before, 0, 1)",
        _BY_HAND,
        "the first caption of a device sees zeros in place of the chunks before",
    ),
    Mutant(
        _PACKING,
        "return chunk, math.ceil((length - 1) / chunk)",
        "return chunk, math.ceil((length - 1) / chunk) - 1",
        _SAME,
        "a long caption does not see its beginning",
    ),
    Mutant(
        _PACKING,
        "position = jnp.where(used, place - (ends - lengths)[known], 0)",
        "position = jnp.where(used, place - (ends - lengths)[0], 0)",
        _BY_HAND,
        "positions do not restart",
    ),
    Mutant(
        _PACKING,
        "ends[-1:] <= rows * chunk",
        "ends[-1:] <= rows * chunk + 1",
        _tests("test_captions_that_do_not_fit_are_padded"),
        "the last token of a caption is lost",
    ),
    Mutant(
        _PACKING,
        "jax.lax.cond(fits.all(), compute, padded, tokens)",
        "jax.lax.cond(fits.any(), compute, padded, tokens)",
        _tests("test_each_device_packs_its_own_captions"),
        "captions are cut where those of another device fit",
    ),
    Mutant(
        _PACKING,
        "math.prod(axis_size(axis) for axis in BATCH_AXES)",
        'axis_size("data")',
        _tests("test_each_device_packs_its_own_captions"),
        "packing fails on meshes that split the batch over other axes",
    ),
    Mutant(
        _PACKING,
        "parts = x.reshape(self.devices, -1, *x.shape[1:])",
        "parts = x.reshape(1, -1, *x.shape[1:])",
        _tests("test_no_caption_crosses_the_mesh"),
        "every layer sends a chunk to the next device",
    ),
    Mutant(
        _TOWER,
        "else positions[chunks.positions]",
        "else positions[None, : tokens.shape[1]]",
        _SAME,
    ),
    Mutant(
        _CLIP,
        "seen, placed = chunks.mask[:, None], places[chunks.positions]",
        "seen, placed = chunks.mask[:, None], places[None, :length]",
        _SAME,
    ),
    Mutant(
        _TOWER,
        'packing = self.config.packing if mode == "train" else PADDED',
        "packing = self.config.packing",
        _tests("test_only_training_packs"),
        "a drawn image depends on the prompts beside its own",
    ),
    Mutant(
        _KERNEL,
        "scores = jnp.where(distance <= positions, scores, HIDDEN)",
        "scores = jnp.where(distance < positions, scores, HIDDEN)",
        _kernel("test_with_equal_scores_a_token_gets_the_mean_of_its_caption_up_to_itself"),
        "a token does not see the first one of its caption",
    ),
    Mutant(
        _KERNEL,
        "own = of_key <= of_query",
        "own = of_key < of_query",
        _kernel("test_it_is_the_plain_attention"),
        "a token sees the one a chunk before it in place of itself",
    ),
    Mutant(
        _KERNEL,
        "(jnp.maximum(chunk - 1, 0), part, 0, 0)",
        "(chunk, part, 0, 0)",
        _kernel("test_it_is_the_plain_attention"),
        "on TPUs alone, a caption that crosses a border sees other keys in place of its own",
    ),
    Mutant(
        _KERNEL,
        "jnp.concatenate([x[:1], x[:-1]])",
        "x",
        _kernel("test_it_is_the_plain_attention"),
    ),
    Mutant(
        _KERNEL,
        "head = index * together + i",
        "head = index + i",
        _kernel("test_it_is_the_plain_attention"),
        "on TPUs alone, some heads are computed twice and others not at all",
    ),
    Mutant(
        _KERNEL,
        "packed_attention.defvjp(_refuse_gradient, _refuse_gradient)",
        "packed_attention.defvjp(lambda *x: (x[0], x), lambda x, g: (g, g, g, None))",
        _kernel("test_it_refuses_to_be_differentiated"),
        "a tower that is trained learns from wrong gradients",
    ),
    Mutant(
        "ecdit/models/attention.py",
        "attended = packed_attention(query, key, value, chunks.positions)",
        "attended = packed_attention(query, key, value, 0 * chunks.positions)",
        _SAME,
    ),
    Mutant(
        _CLIP,
        "attended = packed_attention(*heads, chunks.positions)",
        "attended = packed_attention(*heads, 0 * chunks.positions)",
        _SAME,
    ),
    Mutant(
        _PACKING,
        'fits = self.attention == "plain" or self.length == 0 or length <= CHUNK',
        "fits = True",
        _tests("test_fused_attention_needs_captions_that_fit_a_chunk"),
        "captions longer than a chunk see a wrong token in place of one of theirs",
    ),
    Mutant(
        "ecdit/planning/estimate.py",
        'KERNEL_SHARES.get(one.name.partition(".")[0], KERNEL_SHARE)',
        "KERNEL_SHARE",
        ("tests/planning/test_estimate.py::test_a_kernel_costs_its_bytes_or_its_work",),
        "plans price the kernel of packed captions more than twice too high",
    ),
    Mutant(
        "ecdit/training/step.py",
        'functools.partial(model.text, mode="train")',
        "model.text",
        ("tests/training/test_step_parts.py::test_a_step_packs_the_captions_of_a_frozen_tower",),
        "no step packs",
    ),
    Mutant(
        "ecdit/planning/estimate.py",
        "seconds, found = min(runs, key=lambda run: run[0])",
        "seconds, found = max(runs, key=lambda run: run[0])",
        ("tests/planning/test_estimate.py::test_packed_captions_cost_their_faster_branch",),
        "a plan counts the padding that hardly any step computes",
    ),
)
