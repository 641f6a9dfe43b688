"""Mutants of public networks, of reading their weights, and of their tokenizers, which die without PyTorch."""

from tests.mutants.mutant import Mutant

_CLIP, _T5, _VAE = (f"ecdit/pretrained/{name}.py" for name in ("clip_text", "t5_encoder", "autoencoder_kl"))
_WEIGHTS, _FOLDER, _T5X = (
    f"ecdit/pretrained/{name}.py" for name in ("weights", "safetensors_folder", "t5x_checkpoint")
)
_TOKENIZERS, _AGREEMENT = "ecdit/pretrained/tokenizers.py", "ecdit/pretrained/agreement.py"
_ENCODERS, _SYSTEM, _TOKENIZER = "ecdit/pretrained/text_encoders.py", "ecdit/system.py", "ecdit/data/tokenizer.py"
_TEXT, _AUTOENCODER = "tests/system/test_public_text.py", "tests/system/test_public_autoencoder.py"


def _tests(file: str, *names: str) -> tuple[str, ...]:
    return tuple(f"tests/pretrained/test_{file}.py::{name}" for name in names)


MUTANTS = (
    Mutant(
        _CLIP,
        "end, packing = jnp.argmax(tokens, axis=1), ",
        "end, packing = (tokens != 0).sum(axis=1) - 1, ",
        _tests("networks", "test_clip_ends_where_the_largest_id_first_stands"),
        "captions that are padded with the end's id, as SD's are, get a state of padding",
    ),
    Mutant(
        _CLIP,
        "mask = jnp.arange(tokens.shape[1])[None] <= end[:, None]",
        "mask = jnp.arange(tokens.shape[1])[None] < end[:, None]",
        _tests("networks", "test_clip_ends_where_the_largest_id_first_stands"),
    ),
    Mutant(
        _CLIP,
        "seen, placed = jnp.tril(jnp.ones((length, length), bool))",
        "seen, placed = jnp.triu(jnp.ones((length, length), bool))",
        _tests("networks", "test_what_follows_the_end_changes_nothing_in_clip"),
    ),
    Mutant(
        _T5,
        "bias = jnp.where(mask[:, None, None, :], positions,",
        "bias = jnp.where(mask[:, None, :, None], positions,",
        _tests("networks", "test_padding_changes_nothing_in_t5"),
        "captions see their padding",
    ),
    Mutant(
        _T5,
        "half * (offset > 0)",
        "half * (offset < 0)",
        _tests("networks", "test_buckets_of_eight_by_hand"),
        "what is ahead is taken for what is behind",
    ),
    Mutant(
        _T5,
        "matrices = 3 if config.mlp",
        "matrices = 2 if config.mlp",
        _tests("networks", "test_flops_are_those_of_the_products"),
    ),
    Mutant(
        _VAE,
        "z = mean + jnp.exp(0.5 * log_variance) * noise",
        "z = mean + jnp.exp(log_variance) * noise",
        _tests("networks", "test_latents_are_drawn_with_each_image_s_own_key"),
    ),
    Mutant(
        _VAE,
        "return (z - self.config.shift) * self.config.scale",
        "return z * self.config.scale - self.config.shift",
        _tests("networks", "test_latents_are_scaled_and_decoded_to_images"),
    ),
    Mutant(
        _VAE,
        'config.choose("mid_block_add_attention", (True,))',
        'config.choose("mid_block_add_attention", (True, False))',
        _tests("networks", "test_other_architectures_are_refused_by_name"),
    ),
    Mutant(
        _WEIGHTS,
        "step = max(PIECE_BYTES // max(layer, 1), 1) * size",
        "step = max(part.stop, 1)",
        _tests("weights", "test_every_value_is_read_once_in_small_pieces"),
        "a second copy of a whole tensor is in memory",
    ),
    Mutant(
        _WEIGHTS,
        "nans += int((~np.isfinite(piece)).sum())",
        "nans += int((~np.isfinite(piece)).any())",
        _tests("weights", "test_nans_are_warned_of_and_counted"),
    ),
    Mutant(
        _WEIGHTS,
        "nans += int((~np.isfinite(piece)).sum())",
        "nans += int(np.isnan(piece).sum())",
        _tests("weights", "test_nans_are_warned_of_and_counted"),
        "a run begins with weights that float16 could not hold, and nothing says so",
    ),
    Mutant(
        "ecdit/pretrained/config_json.py",
        "return ConfigJson(self.path, {**older, **values}, defaults)",
        "return ConfigJson(self.path, values, defaults)",
        _tests("networks", "test_a_whole_clip_s_older_config_is_read"),
        "an old CLIP gets the sizes and the activation of the smallest one",
    ),
    Mutant(
        _FOLDER,
        'if any((folder / f"{stem}.safetensors").exists() for stem in STEMS):',
        "if False:",
        _tests("weights", "test_a_variant_s_index_counts_where_it_is_alone"),
    ),
    Mutant(
        _WEIGHTS,
        "PartitionSpec(*sharding.spec[1:])",
        "PartitionSpec()",
        _tests("weights", "test_a_host_reads_its_part_alone"),
        "hosts read what they do not hold",
    ),
    Mutant(
        _WEIGHTS,
        "if name not in needed and not layout.is_unused(name)",
        "if False",
        _tests("weights", "test_all_that_does_not_fit_is_listed_at_once"),
    ),
    Mutant(
        _WEIGHTS,
        "for name in tensors.names():\n        shape, dtype",
        "for name in tensors.names()[1:]:\n        shape, dtype",
        _tests("weights", "test_a_fingerprint_is_of_values_and_config_however_they_are_split"),
    ),
    Mutant(
        _FOLDER,
        "outside = [name for name in names if Path(name).name != name]",
        "outside = [name for name in names if not name]",
        _tests("weights", "test_an_index_must_name_what_is_there"),
    ),
    Mutant(
        _T5X,
        'TRANSPOSED = (".kernel", ".rel_embedding")',
        'TRANSPOSED = (".kernel",)',
        _tests("t5x", "test_a_checkpoint_of_t5x_is_read"),
    ),
    Mutant(
        _AGREEMENT,
        "if (found - copies * sums[name]) % 2**64:",
        "if False:",
        _tests("agreement", "test_a_process_that_has_read_other_weights_is_refused_by_all"),
        "hosts train with other weights than the checkpoint says",
    ),
    Mutant(
        _AGREEMENT,
        "for folder in folders if jax.process_index() == 0 else ():",
        "for folder in folders:",
        _tests("agreement", "test_only_the_first_process_reads_whole_folders"),
        "each of 32 hosts reads all weights",
    ),
    Mutant(
        "ecdit/pretrained/slice_sums.py",
        "+ np.uint64((axis + 1) << 48)",
        "* np.uint64(0)",
        _tests("agreement", "test_a_sum_changes_with_any_word_and_with_its_place"),
    ),
    Mutant(
        _TOKENIZERS,
        "    _check_whole(folder, vocabulary, pairs)\n",
        "",
        _tests("tokenizers", "test_merges_that_were_cut_are_refused"),
        "captions are encoded in pieces that CLIP has not seen them in",
    ),
    Mutant(
        _FOLDER,
        "if len(several) > 1:",
        "if False:",
        _tests("weights", "test_weights_under_several_names_are_refused"),
    ),
    Mutant(
        "ecdit/data/memory.py",
        "return free // each, f",
        "return wanted, f",
        ("tests/data/test_memory.py::test_as_many_processes_run_as_fit_and_at_least_one",),
        "processes with a copy of the weights each are killed for want of memory",
    ),
    Mutant(
        _TOKENIZERS,
        "min(len(row), length) for row in rows",
        "len(row) for row in rows",
        _tests("tokenizers", "test_a_long_caption_is_cut_before_its_end"),
    ),
    Mutant(
        _TOKENIZERS,
        'for name in ("special_tokens_map.json", "tokenizer_config.json")',
        'for name in ("special_tokens_map.json",)',
        _tests("tokenizers", "test_padding_is_the_folder_s"),
    ),
    Mutant(
        _TOKENIZERS,
        "if size > vocab_size or (exactly and size != vocab_size)",
        "if size > vocab_size",
        _tests("tokenizers", "test_a_clip_tokenizer_must_fit_the_embedding"),
    ),
    Mutant(
        _ENCODERS,
        "zip((self.first, self.second), jnp.split(tokens, 2, 1), strict=True)",
        "zip((self.first, self.second), jnp.split(tokens, 2, 1)[::-1], strict=True)",
        (f"{_TEXT}::test_two_encoders_follow_each_other",),
        "each of two encoders reads the other's tokens",
    ),
    Mutant(
        _ENCODERS,
        "jnp.concatenate([text.pooled for text in both], axis=1)",
        "jnp.concatenate([text.pooled for text in both[::-1]], axis=1)",
        (f"{_TEXT}::test_two_encoders_follow_each_other",),
    ),
    Mutant(
        _CLIP,
        "TextWidths(self.config.width, self.config.projection_width or self.config.width)",
        "TextWidths(self.config.width, self.config.width)",
        (f"{_TEXT}::test_the_folder_says_what_the_encoder_is",),
    ),
    Mutant(
        _TOKENIZER,
        "end = int(np.argmax(np.asarray(ids) == part.end)) + 1",
        "end = int(np.argmax(np.asarray(ids) == part.end))",
        (f"{_TEXT}::test_a_pair_of_tokenizers_is_stored_in_one_row_and_told_apart",),
    ),
    Mutant(
        "ecdit/experiment.py",
        "bool(trained) or text.frozen_random_ok,",
        "bool(trained) or bool(text.weights),",
        (f"{_TEXT}::test_a_frozen_random_tower_trains_only_where_the_config_says_so",),
        "a run spends its steps on the states of a tower that nobody has trained",
    ),
    Mutant(
        "ecdit/experiment.py",
        "tokenizer.check_fits(encoder.config.vocab_size)",
        "tokenizer.check_fits(tokenizer.size)",
        (f"{_TEXT}::test_what_does_not_fit_is_refused",),
        "captions are encoded by another encoder's ids",
    ),
    Mutant(
        "ecdit/checkpoints/restore.py",
        'if field.name != "loaded"}',
        'if field.name != "none"}',
        (f"{_TEXT}::test_loaded_weights_are_sharded_and_outside_optimizer_ema_and_checkpoint",),
        "each checkpoint has a copy of the public weights",
    ),
    Mutant(
        "ecdit/runs/trained_run.py",
        "if saved.get(part) != digest:",
        "if part not in saved:",
        (f"{_TEXT}::test_it_resumes_and_samples_with_the_same_weights_alone",),
        "images are drawn with another text encoder's states",
    ),
    Mutant(
        _VAE,
        "return self.latents(mean, log_variance, keys)",
        "return self.latents(log_variance, mean, keys)",
        (f"{_AUTOENCODER}::test_prepared_latents_are_those_of_online_encoding",),
    ),
    Mutant(
        "ecdit/data/latents.py",
        "moments(to_unit(images))",
        "moments(images.astype(jnp.float32))",
        (f"{_AUTOENCODER}::test_prepared_latents_are_those_of_online_encoding",),
    ),
    Mutant(
        "ecdit/data/prepared.py",
        "read_column(part.directory, part.manifest, part.latents.name, made_by)",
        'read_column(part.directory, part.manifest, part.latents.name, "")',
        (f"{_AUTOENCODER}::test_latents_of_other_weights_are_refused",),
        "a run trains on latents that its autoencoder cannot decode",
    ),
    Mutant(
        _SYSTEM,
        "untrained = total_flops([text, *others] if self.config.text.frozen else others)",
        "untrained = total_flops([text] if self.config.text.frozen else [])",
        (f"{_AUTOENCODER}::test_parameters_and_work_are_counted",),
    ),
    Mutant(
        _SYSTEM,
        'self.autoencoder == "vae" and self.vae.encode == "prepared"',
        'self.autoencoder == "vae"',
        (f"{_AUTOENCODER}::test_what_does_not_fit_is_refused",),
    ),
    Mutant(
        "ecdit/data/shards.py",
        "except RuntimeError as error:  # ArrayRecord's, of whatever the disk refuses",
        "except KeyError as error:  # ArrayRecord's, of whatever the disk refuses",
        (f"{_AUTOENCODER}::test_a_full_disk_leaves_no_column_and_the_same_command_goes_on",),
    ),
    Mutant(
        "ecdit/data/text_states.py",
        'mask = (np.arange(length)[None] < row["lengths"][:, None]).reshape(-1)',
        'mask = np.arange(length * len(row["lengths"])) < row["lengths"].sum()',
        (f"{_TEXT}::test_a_state_is_stored_at_its_true_length",),
        "the second encoder's states stand behind the first's, without the padding that training knows",
    ),
    Mutant(
        "ecdit/data/text_states.py",
        "scale = np.maximum(np.abs(kept).max(axis=1), 1e-30)",
        "scale = np.maximum(np.abs(kept).max(keepdims=True)[0], 1e-30)",
        (f"{_TEXT}::test_a_state_is_stored_at_its_true_length",),
        "one large token takes the precision of all others",
    ),
    Mutant(
        "ecdit/data/prepared.py",
        "read_column(part.directory, part.manifest, part.text.name, made_by)",
        'read_column(part.directory, part.manifest, part.text.name, "")',
        (f"{_TEXT}::test_prepared_states_are_those_of_online_encoding",),
        "a run trains on other states than it is sampled with",
    ),
    Mutant(
        "ecdit/data/latents.py",
        "if not np.isfinite(latents).all():",
        "if False:",
        ("tests/system/test_public_autoencoder.py::test_latents_must_be_finite_and_images_whole",),
        "a run trains on latents that float16 could not hold",
    ),
    Mutant(
        "ecdit/data/loader.py",
        "caption = text(tokenizer.empty if empty is None else empty)",
        "caption = text(tokenizer.empty if empty is None else next(iter(found.tokens.values())))",
        (f"{_TEXT}::test_prepared_states_are_those_of_online_encoding",),
        "prepared captions are never dropped, and guidance has nothing to go by",
    ),
    Mutant(
        "ecdit/runs/diffusers_folder.py",
        'values["text_config"] |= {"projection_dim": tower.projection}',
        'values |= {"projection_dim": tower.projection}',
        (
            "tests/ecdit_runs/test_diffusers_folder.py::test_a_whole_clip_s_projection_is_told_where_its_text_config_has_another",
        ),
        "transformers refuses the folder's text encoder",
    ),
    Mutant(
        "ecdit/runs/diffusers_folder.py",
        'shutil.copyfile(index, target / f"{tower.stem}{INDEX}")',
        "shutil.copyfile(index, target / index.name)",
        (
            "tests/ecdit_runs/test_diffusers_folder.py::test_public_weights_in_several_files_are_copied_with_their_index",
        ),
    ),
    Mutant(
        "ecdit/data/tokens.py",
        "{field: max(map(len, tokenizer.split(row))) for field, row in tokens.items()}",
        "{field: len(row) for field, row in tokens.items()}",
        (f"{_TEXT}::test_a_caption_counts_as_cut_where_one_of_two_encoders_cuts_it",),
        "a run with two text encoders says that captions are cut which are not",
    ),
    Mutant(
        _T5X,
        "shape = tuple(array.chunk_layout.read_chunk.shape)",
        "shape = tuple(array.shape)",
        _tests("t5x", "test_every_chunk_is_read_once_and_few_at_a_time"),
        "a second copy of a whole matrix is in memory",
    ),
    Mutant(
        "ecdit/checkpoint.py",
        "    check_public_weights(workdir, run)\n",
        "",
        (f"{_TEXT}::test_an_export_beside_other_public_weights_is_refused",),
        "an export names public weights that the run was not trained with",
    ),
)
