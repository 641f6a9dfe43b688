"""Mutants of packed captions, and of how a plan counts them."""

from tests.mutants.mutant import Mutant

_PACKING, _TOWER, _CLIP = "ecdit/models/packing.py", "ecdit/encoders/text_tower.py", "ecdit/pretrained/clip_text.py"


def _tests(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/models/test_packing.py::{name}" for name in names)


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
        'room = self.config.packed_length if mode == "train" else 0',
        "room = self.config.packed_length",
        _tests("test_only_training_packs"),
        "a drawn image depends on the prompts beside its own",
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
