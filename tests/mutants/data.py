"""Mutants of the data: which record a row is, what chance does to it, tokens, and what is stored."""

from tests.mutants.mutant import Mutant

_LOADER, _RECORDS, _TEXT = (f"ecdit/data/{name}.py" for name in ("loader", "records", "text"))


def _loader(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/data/test_loader.py::{name}" for name in names)


def _records(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/data/test_records.py::{name}" for name in names)


MUTANTS = (
    Mutant(
        _LOADER,
        "return read_row(start_row + batch * batch_size + positions[position])",
        "return read_row(start_row + batch * len(positions) + positions[position])",
        _loader("test_processes_split_the_batch_and_nothing_else_changes"),
        "with several processes some records are read twice and others never",
    ),
    Mutant(
        _LOADER,
        "return read_row(start_row + batch * batch_size + positions[position])",
        "return read_row(batch * batch_size + positions[position])",
        _loader("test_resuming_continues_the_stream"),
        "a resumed run sees the first data again",
    ),
    Mutant(
        _LOADER,
        "return read_row(start_row + batch * batch_size + positions[position])",
        "return read_row(start_row + batch * batch_size + position)",
        _loader("test_processes_split_the_batch_and_nothing_else_changes"),
        "every process trains on the first one's rows",
    ),
    Mutant(
        _LOADER,
        ".seed(seed).shuffle().repeat()",
        ".seed(0).shuffle().repeat()",
        _loader("test_the_seed_decides_the_order"),
    ),
    Mutant(
        _LOADER,
        ".seed(seed).shuffle().repeat()",
        ".repeat()",
        _loader("test_every_epoch_is_another_permutation"),
        "the data is not shuffled",
    ),
    Mutant(
        _LOADER,
        'if _random(seed, row, "caption").random() < config.caption_dropout:',
        'if _random(seed, row, "caption").random() > config.caption_dropout:',
        _loader("test_captions_drop_at_their_rate_and_by_row"),
    ),
    Mutant(
        _LOADER,
        'if _random(seed, row, "flip").random() < config.flip_probability:',
        'if _random(seed, row, "caption").random() < config.flip_probability:',
        _loader("test_chances_do_not_touch_each_other"),
        "pictures without a caption are flipped, always",
    ),
    Mutant(
        _LOADER,
        "tokens = fit([EOS], config.caption_length)",
        "tokens = fit([], config.caption_length)",
        _loader("test_captions_drop_at_their_rate_and_by_row"),
        "the null caption in training is not the one in sampling",
    ),
    Mutant(
        _LOADER,
        "image = image[:, ::-1]",
        "image = image[::-1]",
        _loader("test_pictures_flip_at_their_rate_and_by_row"),
    ),
    Mutant(
        _LOADER,
        "counter=[0, row, 0, 0]",
        "counter=[row, 0, 0, 0]",
        _loader("test_streams_never_meet"),
        "what chance does to neighbouring rows is alike",
    ),
    Mutant(
        _LOADER,
        "image.shape[1]], np.array([top, left])",
        "image.shape[1]], np.array([left, top])",
        _loader("test_crop_offsets_are_those_of_the_pixels"),
    ),
    Mutant(
        _LOADER,
        "(0, 0)), constant_values=255)",
        "(0, 0)), constant_values=0)",
        _loader("test_crop_offsets_are_those_of_the_pixels"),
        "crops have a black edge on white pictures",
    ),
    Mutant(
        _LOADER,
        'size_crop = np.concatenate([record["original_size"], corner])',
        'size_crop = np.concatenate([corner, record["original_size"]])',
        _loader("test_crop_offsets_are_those_of_the_pixels"),
    ),
    Mutant(
        "ecdit/runs/workload.py",
        "return local[np.searchsorted(rows, wanted)]",
        "return local[: len(wanted)]",
        ("tests/ecdit_runs/test_training_run.py::test_batches_are_the_same_on_any_mesh_and_from_any_start[sizes0]",),
        "every device trains on the same rows",
    ),
    Mutant(
        "ecdit/experiment.py",
        "return phase.first_row + (step - phase.after) * phase.experiment.train.batch_size",
        "return step * phase.experiment.train.batch_size",
        ("tests/test_experiment_phases.py::test_parts_by_hand",),
        "a phase with another batch size skips records, or sees some again",
    ),
    Mutant(
        "ecdit/experiment.py",
        "if phase.after < max(step, 1))",
        "if phase.after <= max(step, 1))",
        ("tests/test_experiment_phases.py::test_parts_by_hand",),
        "the last step of a phase is trained as the next one",
    ),
    Mutant(
        _TEXT,
        "kept = tokens if len(tokens) <= caption_length else [*tokens[: caption_length - 1], EOS]",
        "kept = tokens[:caption_length]",
        _records("test_fit_pads_or_cuts_before_the_eos"),
        "a caption that is cut has no end, and its pooled state is that of a word",
    ),
    Mutant(
        _TEXT,
        "row = np.full(caption_length, PAD, np.int32)",
        "row = np.full(caption_length, EOS, np.int32)",
        _records("test_fit_pads_or_cuts_before_the_eos"),
    ),
    Mutant(
        _TEXT,
        "rows = [fit([*encode(caption), EOS], caption_length) for caption in captions]",
        "rows = [fit([*encode(caption.strip()), EOS], caption_length) for caption in map(str.lower, captions)]",
        _records("test_sampling_tokenizes_as_seqio_did"),
        "prompts are not the tokens that training saw",
    ),
    Mutant(
        _RECORDS,
        'truncated += len(example["tokens"]) > config.caption_length',
        'truncated += len(example["tokens"]) >= config.caption_length',
        _records("test_tokens_end_in_eos_and_truncated_captions_are_counted"),
    ),
    Mutant(
        _RECORDS,
        "key=lambda item: item[0] // _SHARD_RECORDS",
        "key=lambda item: item[0] % _SHARD_RECORDS",
        _records("test_shards_are_read_in_order"),
    ),
    Mutant(
        _RECORDS,
        "paths = [str(self._directory / name) for name in manifest.shards]",
        "paths = [str(self._directory / name) for name in reversed(manifest.shards)]",
        _records("test_shards_are_read_in_order"),
    ),
    Mutant(
        _RECORDS,
        "digest.update((directory / VOCABULARY).read_bytes())",
        'digest.update(b"")',
        _records("test_the_fingerprint_is_of_records_and_vocabulary"),
        "a run resumes on the same records with another vocabulary",
    ),
    Mutant(
        _RECORDS,
        "if asked != made:",
        'if asked != made and key != "caption_length":',
        _records("test_other_settings_are_refused_by_name"),
    ),
    Mutant(
        "ecdit/data/emoji.py",
        'white = Image.new("RGBA", picture.size, "white")',
        'white = Image.new("RGBA", picture.size, "black")',
        _records("test_transparent_pixels_are_white_and_the_picture_has_its_caption"),
    ),
)
