"""Mutants of the data: the record of a row, its augmentation, tokens, and stored files."""

from tests.mutants.mutant import Mutant

_LOADER, _TEXT, _PARTS, _PREPARED = (f"ecdit/data/{name}.py" for name in ("loader", "text", "parts", "prepared"))
_FITTING, _ARCHIVE = "ecdit/data/fitting.py", "ecdit/data/sources/archive.py"
_SHARDS, _COLUMNS, _MIXING = (f"ecdit/data/{name}.py" for name in ("shards", "columns", "mixing"))


def _loader(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/data/test_loader.py::{name}" for name in names)


def _preparation(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/data/test_preparation.py::{name}" for name in names)


def _mixing(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/data/test_mixing.py::{name}" for name in names)


def _shares(name: str) -> tuple[str, ...]:
    return (f"tests/data/test_shares.py::{name}",)


def _again(name: str) -> tuple[str, ...]:
    return (f"tests/data/test_prepared_again.py::{name}",)


def _preprocessors(name: str) -> tuple[str, ...]:
    return (f"tests/data/test_preprocessors.py::{name}",)


def _fuzz(name: str) -> tuple[str, ...]:
    return (f"tests/data/test_fuzz_sources.py::{name}",)


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
        'if config.flip_probability and _random(seed, row, "flip").random() < config.flip_probability:',
        'if config.flip_probability and _random(seed, row, "caption").random() < config.flip_probability:',
        _loader("test_chances_do_not_touch_each_other"),
        "images without a caption are flipped, always",
    ),
    Mutant(
        _LOADER,
        "caption = text(tokenizer.empty if empty is None else empty)",
        "caption = text([] if empty is None else empty)",
        _loader("test_captions_drop_at_their_rate_and_by_row"),
        "the null caption in training is not the one in sampling",
    ),
    Mutant(
        _LOADER,
        "content = content[:, ::-1]",
        "content = content[::-1]",
        _loader("test_images_flip_at_their_rate_and_by_row"),
    ),
    Mutant(
        _LOADER,
        "np.array([0, row, 0, 0], np.uint64)",
        "np.array([row, 0, 0, 0], np.uint64)",
        _loader("test_streams_never_meet"),
        "what chance does to neighbouring rows is alike",
    ),
    Mutant(
        _LOADER,
        "image.shape[1]], np.array([top, left])",
        "image.shape[1]], np.array([left, top])",
        _loader("test_crop_offsets_are_those_of_the_pixels_beside_the_stored_crop"),
    ),
    Mutant(
        _LOADER,
        "(0, 0)), constant_values=255)",
        "(0, 0)), constant_values=0)",
        _loader("test_crop_offsets_are_those_of_the_pixels_beside_the_stored_crop"),
        "crops have a black edge on white images",
    ),
    Mutant(
        _LOADER,
        "size_crop = np.concatenate([found.original_size, crop])",
        "size_crop = np.concatenate([crop, found.original_size])",
        _loader("test_crop_offsets_are_those_of_the_pixels_beside_the_stored_crop"),
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
        "ecdit/pretrained/tokenizers.py",
        "kept = tokens if len(tokens) <= length else [*tokens[: length - 1], end]",
        "kept = tokens[:length]",
        _preparation("test_fit_pads_or_cuts_before_the_eos"),
        "a caption that is cut has no end, and its pooled state is that of a word",
    ),
    Mutant(
        "ecdit/pretrained/tokenizers.py",
        "row = np.full(length, pad, np.int32)",
        "row = np.full(length, end, np.int32)",
        _preparation("test_fit_pads_or_cuts_before_the_eos"),
    ),
    Mutant(
        "ecdit/data/tokenizer.py",
        "return [[*self._vocabulary.encode(caption), EOS] for caption in captions]",
        "return [[*self._vocabulary.encode(caption.strip()), EOS] for caption in map(str.lower, captions)]",
        _preparation("test_captions_are_tokenized_as_seqio_does"),
        "prompts are not the tokens that training saw",
    ),
    Mutant(
        _LOADER,
        "caption = text(found.tokens[field])",
        "caption = text(next(iter(found.tokens.values())))",
        _loader("test_caption_fields_are_drawn_at_their_rates_and_by_row"),
        "of several captions only the first is ever read",
    ),
    Mutant(
        _LOADER,
        '_random(seed, row, "field")',
        '_random(seed, row, "caption")',
        _loader("test_chances_do_not_touch_each_other"),
        "captions that are dropped are always those of one field",
    ),
    Mutant(
        _LOADER,
        "crop = crop + corner",
        "crop = corner",
        _loader("test_crop_offsets_are_those_of_the_pixels_beside_the_stored_crop"),
        "the micro-condition knows nothing of the crop at preparation",
    ),
    Mutant(
        _LOADER,
        "return readers[part](index)",
        "return readers[part](row)",
        _loader("test_a_mixture_reads_each_part_shuffled_by_itself"),
        "parts of a mixture skip records",
    ),
    Mutant(
        _MIXING,
        "eligible = counts * period < shares * (row + 1)",
        "eligible = counts * period <= shares * (row + 1)",
        _mixing("test_no_part_is_ever_a_row_ahead_or_behind"),
        "a part may be a whole row ahead of its share",
    ),
    Mutant(
        _MIXING,
        "return part, rounds * int(self.rates[part] * period) + int(self._places[within])",
        "return part, rounds * period + int(self._places[within])",
        _mixing("test_each_part_is_read_in_its_own_order_without_gaps"),
        "records of a part are skipped after each period",
    ),
    Mutant(
        _TEXT,
        "if (vocabulary.pad_id(), vocabulary.eos_id()) != (PAD, EOS):",
        "if False:",
        _preparation("test_a_tokenizer_with_other_special_tokens_is_refused"),
    ),
    Mutant(
        "ecdit/data/tokens.py",
        "return sum(count for length, count in lengths if int(length) > caption_length)",
        "return sum(count for length, count in lengths if int(length) >= caption_length)",
        _preparation("test_captions_that_are_cut_are_counted"),
    ),
    Mutant(
        "ecdit/data/splits.py",
        'return "held_out" if place_of(key) < prepare.held_out else "train"',
        'return "held_out" if place_of(key) > 1 - prepare.held_out and len(key) % 2 else "train"',
        _preparation("test_held_out_keys_stay_held_out_as_the_data_grows"),
    ),
    Mutant(
        _PARTS,
        "writers[split].write(encode_record(record))",
        'writers["train"].write(encode_record(record))',
        _preparation("test_held_out_keys_stay_held_out_as_the_data_grows"),
        "training reads what it should be measured on",
    ),
    Mutant(
        _FITTING,
        "if reason := column_reason(prepare.filters, pair.columns):",
        "if False:",
        _preparation("test_filters_leave_out_by_size_caption_and_column"),
    ),
    Mutant(
        _PARTS,
        "quarantine.add(made)",
        "pass",
        _preparation("test_what_is_left_out_is_counted_and_named"),
    ),
    Mutant(
        _FITTING,
        "        if len(run) == longest or total >= _RUN_BYTES:",
        "        if len(run) == longest:",
        ("tests/data/test_fitting.py::test_a_run_is_bounded_by_its_bytes",),
        "256 large photographs are in memory at once",
    ),
    Mutant(
        _FITTING,
        "    if run:\n        yield run",
        "    if len(run) == longest:\n        yield run",
        ("tests/data/test_fitting.py::test_records_in_runs_are_those_of_each_pair_alone",),
        "the last pairs of each part are lost",
    ),
    Mutant(
        _ARCHIVE,
        "!= int(stored, 8):",
        "< 0:",
        ("tests/data/test_archive.py::test_the_fast_reading_of_headers_agrees_with_tarfile",),
        "a damaged header is believed",
    ),
    Mutant(
        _ARCHIVE,
        "(?:[0-7]{7}\\0|\\0{8}){2}\\0.{166}",
        "(?:[0-7]{7}\\0|\\0{8}){2}.{167}",
        ("tests/data/test_archive.py::test_the_fast_reading_of_headers_agrees_with_tarfile",),
        "long names lose their folder",
    ),
    Mutant(
        _SHARDS,
        "return path.stat().st_size == shard.size",
        "return (directory / shard.name).exists()",
        _preparation("test_missing_and_short_shards_are_named_at_the_start"),
        "a shard that was copied in part stops a run hours later",
    ),
    Mutant(
        _SHARDS,
        "except (FileNotFoundError, NotADirectoryError):",
        "except OSError:",
        ("tests/data/test_shards.py::test_a_shard_that_the_disk_cannot_read_is_not_called_missing",),
        "an I/O error asks for the data to be prepared again",
    ),
    Mutant(
        _COLUMNS,
        '("records", column.records, manifest.fingerprint),',
        '("records", column.records, column.records),',
        _preparation("test_a_column_of_other_records_or_another_tokenizer_is_refused"),
        "captions of other records are trained on",
    ),
    Mutant(
        _COLUMNS,
        '("tokenizer or weights", column.made_by, made_by or column.made_by),',
        '("tokenizer or weights", column.made_by, column.made_by),',
        _preparation("test_a_column_of_other_records_or_another_tokenizer_is_refused"),
    ),
    Mutant(
        _COLUMNS,
        "if written.records != shard.records:",
        "if False:",
        _preparation("test_a_column_with_a_row_too_few_is_an_error"),
        "every caption after it belongs to the image before",
    ),
    Mutant(
        _COLUMNS,
        "if one and one.made_of != key]",
        "if one and not one.made_of]",
        _shares("test_shards_that_hosts_computed_of_something_else_are_not_joined"),
        "latents of other records are joined with these",
    ),
    Mutant(
        _COLUMNS,
        "if rows.get(name) != wanted.get(name)]",
        "if name not in wanted]",
        _shares("test_a_column_without_a_row_for_each_record_is_refused"),
    ),
    Mutant(
        "ecdit/data/preparation.py",
        "if done is not None and done.made_with != made_with:",
        "if done is not None and not done.made_with:",
        _shares("test_parts_that_hosts_prepared_with_other_settings_are_not_joined"),
        "held-out keys are trained on",
    ),
    Mutant(
        "ecdit/data/preparation.py",
        "        if now == manifest.source:",
        "        if now:",
        _again("test_records_of_a_source_that_has_changed_are_refused_until_they_are_said_to_be_the_same"),
    ),
    Mutant(
        _LOADER,
        "seed = seed if place == 0 else",
        "seed = seed if place >= 0 else",
        _again("test_parts_of_a_mixture_are_not_shuffled_alike"),
        "each image of two parts comes twice in a batch",
    ),
    Mutant(
        "ecdit/data/registry.py",
        "    mixing([part.rate for part in parts])  # refuses rates before anything is prepared\n",
        "",
        _again("test_rates_that_cannot_be_mixed_are_refused_before_anything_is_prepared"),
    ),
    Mutant(
        "ecdit/evaluation/flow_loss.py",
        "min(count, count if part is None else _records(part, split))",
        "count if part is None or _records(part, split) else 0",
        ("tests/evaluation/test_flow_loss.py::test_parts_of_a_mixture_give_each_held_out_record_once",),
        "the held-out loss of a mixture is that of a few records",
    ),
    Mutant(
        _PREPARED,
        "fingerprint = combined([*decides, *rates, column.made_by, *order])",
        "fingerprint = combined([*decides, *rates, *order])",
        _preparation("test_the_fingerprint_of_a_run_s_data_follows_its_tokenizer_and_rates"),
        "a run of generated rows resumes with another tokenizer",
    ),
    Mutant(
        _PREPARED,
        "fingerprint = combined([*decides, *rates, column.made_by, *order])",
        "fingerprint = combined([*decides, column.made_by, *order])",
        _preparation("test_the_fingerprint_of_a_run_s_data_follows_its_tokenizer_and_rates"),
        "a run resumes on a mixture with other rates",
    ),
    Mutant(
        "ecdit/data/manifest.py",
        "if asked != made:",
        'if asked != made and key != "held_out":',
        _preparation("test_other_settings_are_refused_by_name"),
    ),
    Mutant(
        "ecdit/data/preparation.py",
        "if done is not None and done.stamp != task.stamp(index):",
        "if False:",
        _preparation("test_a_preparation_of_other_settings_or_input_does_not_go_on"),
        "half of the records are from before the input changed",
    ),
    Mutant(
        "ecdit/data/preparation.py",
        "if found.module != module:\n            told",
        "if False:\n            told",
        _preparation("test_a_mixture_whose_file_has_changed_is_read_again"),
        "a run trains at rates that its file no longer has",
    ),
    Mutant(
        "ecdit/data/tokens.py",
        "if pieces > config.vocab_size:",
        "if False:",
        _preparation("test_a_tokenizer_with_more_pieces_than_the_embedding_is_refused"),
        "the embedding of another token is read for the last pieces",
    ),
    Mutant(
        _COLUMNS,
        "if not (working / COLUMN).exists():  # else an earlier call was killed just before the rename",
        "if True:",
        _preparation("test_a_column_that_stops_at_its_end_computes_nothing_again"),
    ),
    Mutant(
        "ecdit/data/sources/tars.py",
        "        fields = {}",
        '        fields = self.__dict__.setdefault("last", {})',
        _fuzz("test_a_thousand_damaged_tars"),
        "an image without a text gets the text of the one before",
    ),
    Mutant(
        "ecdit/data/images.py",
        "except Exception as error:  # for example a palette that is missing",
        "except ValueError as error:",
        _fuzz("test_a_thousand_damaged_images[png]"),
        "one PNG without its palette ends a preparation of a billion pairs",
    ),
    Mutant(
        _FITTING,
        "captions, reason = _kept_captions(pair.captions, prepare.filters)",
        'captions, reason = _kept_captions(config.__dict__.setdefault("first", pair.captions), prepare.filters)',
        _fuzz("test_a_thousand_damaged_tars"),
        "every image of a part has the first one's captions",
    ),
    Mutant(
        "ecdit/data/shares.py",
        "with locked(lock, say, together=True), locked(own, say):",
        "with locked(lock, say), locked(own, say):",
        _shares("test_shares_run_together_but_not_with_themselves_or_with_a_call_that_joins"),
        "of all hosts one prepares at a time",
    ),
    Mutant(
        "ecdit/data/shares.py",
        "with locked(lock, say, together=True), locked(own, say):",
        "with locked(lock, say, together=True):",
        _shares("test_shares_run_together_but_not_with_themselves_or_with_a_call_that_joins"),
        "a share that is started twice removes the parts that it is writing",
    ),
    Mutant(
        "ecdit/data/shares.py",
        "if path.exists() and path.read_text() != str(share.count):",
        "if False:",
        _shares("test_shares_of_other_settings_or_another_number_are_refused"),
        "two processes write one part at once",
    ),
    Mutant(
        "ecdit/data/preparation.py",
        "        forget_count(working)",
        "        pass",
        _shares("test_shares_that_are_joined_have_the_bytes_of_one_process"),
    ),
    Mutant(
        _COLUMNS,
        'if _made_of(working) not in ("", key):',
        "if False:",
        _shares("test_a_column_begun_by_other_weights_or_in_other_shares_is_not_gone_on_with"),
        "a column has latents of two autoencoders",
    ),
    Mutant(
        _COLUMNS,
        "return int(Path(shard.name).parent.name)",
        "return shard.records",
        _shares("test_a_column_in_shares_has_the_bytes_of_one_process"),
        "shares of a column do not keep to their parts",
    ),
    Mutant(
        "ecdit/data/registry.py",
        "tf.random.set_seed(index)",
        "tf.random.set_seed(0)",
        _preprocessors("test_random_preprocessors_draw_the_same_each_time_and_another_number_in_each_part[1]"),
        "every part draws the same",
    ),
    Mutant(
        "ecdit/data/registry.py",
        "tf.random.set_seed(index)",
        "pass",
        _preprocessors("test_random_preprocessors_draw_the_same_each_time_and_another_number_in_each_part[1]"),
        "a preparation that was killed ends with other bytes",
    ),
    Mutant(
        "ecdit/data/registry.py",
        "            if at_once:\n",
        "            if True:\n",
        _preprocessors("test_the_quarantine_has_the_order_of_the_source_however_far_tensorflow_reads_ahead"),
    ),
    Mutant(
        _LOADER,
        "np.array([top, left]) - padding",
        "np.array([top, left])",
        _loader("test_crop_offsets_are_those_of_the_pixels_beside_the_stored_crop"),
        "sampling asks for images that are moved, with white above and at the left",
    ),
    Mutant(
        "ecdit/data/images.py",
        '{"L;2": 3, "L;4": 15}',
        '{"L;4": 15}',
        ("tests/data/test_images.py::test_a_transparent_grey_of_few_bits_is_that_of_its_pixels",),
        "the transparent grey stays, and another one turns white",
    ),
    Mutant(
        "ecdit/data/images.py",
        'if raw_mode == "RGB;16B":',
        "if False:",
        ("tests/data/test_images.py::test_a_transparent_colour_of_16_bits_is_rejected_because_8_bits_cannot_tell_it",),
        "an opaque colour turns white",
    ),
    Mutant(
        "ecdit/data/tokens.py",
        "parts = [(one.rate, one.fingerprint) for one in composition.components]",
        "parts = [one.fingerprint for one in composition.components]",
        ("tests/data/test_prepared_again.py::test_a_trained_tokenizer_that_stays_after_its_captions_changed_is_named",),
        "nobody learns that the pieces are those of other captions",
    ),
    Mutant(
        "ecdit/data/tokens.py",
        "rates = mixing([Fraction(one.rate) for one in composition.components])",
        "rates = mixing([Fraction(1) for one in composition.components])",
        ("tests/data/test_tokens.py::test_a_tokenizer_of_a_mixture_is_trained_on_its_captions_by_their_rates",),
        "a rare part of a mixture takes half of the pieces",
    ),
    Mutant(
        "ecdit/data/tokens.py",
        "reader[place * len(reader) // max(count, 1) % len(reader)]",
        "reader[place // 2 % len(reader)]",
        ("tests/data/test_tokens.py::test_a_tokenizer_of_a_mixture_is_trained_on_its_captions_by_their_rates",),
        "a large part is represented by its beginning",
    ),
    Mutant(
        "ecdit/data/copies.py",
        "found = [(kept(rows[:trained]), kept(rows[trained:]))",
        "found = [(kept(rows), kept(rows[trained:]))",
        _preparation("test_images_that_are_held_out_and_trained_on_are_counted"),
        "every held-out image counts as trained on",
    ),
    Mutant(
        _PARTS,
        "[row for rows in hashes.values() for row in rows]",
        "[row for rows in reversed(hashes.values()) for row in rows]",
        _preparation("test_images_that_are_held_out_and_trained_on_are_counted"),
    ),
    Mutant(
        "ecdit/data/preparation.py",
        "shutil.rmtree(scratch_of(working / part_name(index)), ignore_errors=True)",
        "pass",
        _shares("test_what_a_killed_share_has_begun_is_not_in_the_result"),
        "prepared data keeps half a part beside the whole one",
    ),
    Mutant(
        _COLUMNS,
        "scratch_of(working / shard.name).unlink(missing_ok=True)",
        "pass",
        _shares("test_a_column_in_shares_has_the_bytes_of_one_process"),
    ),
    Mutant(
        "ecdit/data/locks.py",
        'path.open("a+")',
        'path.open("w")',
        _shares("test_a_lock_fits_file_systems_that_lock_byte_ranges_or_nothing"),
        "shares on a network disk cannot hold their lock together",
    ),
)
