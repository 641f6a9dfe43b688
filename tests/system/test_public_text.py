"""Runs whose text encoder is a public one, of a folder: what it is, what is kept of it, and what is refused."""

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from ecdit.checkpoints import restore
from ecdit.checkpoints.arrays import read_records
from ecdit.checkpoints.read_errors import CheckpointError
from ecdit.components import TextWidths
from ecdit.config import ConfigError, to_dict
from ecdit.data import DataError
from ecdit.data.loader import make_loader
from ecdit.data.prepared import (
    check_text,
    empty_caption,
    open_prepared,
    prepare_captions,
    prepare_column,
    stored_records,
)
from ecdit.data.text_states import restore as restore_row
from ecdit.data.text_states import store
from ecdit.data.tokenizer import files_of, load_tokenizer
from ecdit.data.tokens import hash_files, tokenizer_path, truncated_captions
from ecdit.data.verification import verify
from ecdit.evaluation.flow_loss import fixed_rows, losses_by_time, make_loss_program
from ecdit.experiment import check_tokenizers, check_trainable, make_experiment
from ecdit.partitioning import MeshConfig, make_mesh
from ecdit.pretrained.config_json import WeightsError
from ecdit.runs.diffusers_folder import public_towers
from ecdit.runs.kept_tokenizer import keep_tokenizer, kept_files
from ecdit.runs.trained_run import open_run
from ecdit.runs.training_run import train
from ecdit.system import make_system
from ecdit.training.optimizer import make_optimizer
from ecdit.training.state import abstract_state, state_shardings
from ecdit.training.step import abstract_batch
from tests.data.example import module
from tests.forking import run_forked
from tests.models.helpers import jit
from tests.pretrained.test_t5x import t5x_arrays, write_checkpoint
from tests.pretrained.towers import CAPTIONS, CLIP_TOKENS, t5_params, write_clip, write_t5
from tests.runs import ROOT, command, random_params, save_ema, tiny, tiny_values

LENGTH = 12
QUIET = lambda _: None  # noqa: E731


@pytest.fixture(autouse=True)
def _package():
    pytest.importorskip("tokenizers", reason="needs the extra pretrained")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("weights")
    return {"clip": write_clip(place / "clip"), "t5": write_t5(place / "t5")}


def public(*folders, **changes):
    """A tiny experiment with the text encoders of these folders."""
    first, second = [*map(str, folders), ""][:2]
    named = {"text__weights": first, "text__second_weights": second, "text__frozen": True}
    tokenizers = {"data__tokenizer": first, "data__second_tokenizer": second, "data__caption_length": LENGTH}
    return tiny(**{**named, **tokenizers, **changes})


def states(experiment, tokens):
    """What the system's text encoder gives of tokens, with the weights of its folders."""
    system = make_system(experiment.system)
    mesh = make_mesh(MeshConfig(1, -1, 1, 1, 1))
    loaded = system.load(mesh)
    drawn = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), system.drawn(system.shapes()))
    return jit(lambda params: system.bind(params).text(tokens))({**drawn, **loaded})


def test_the_folder_says_what_the_encoder_is(folders):
    clip, t5 = (make_system(public(folders[name]).system).parts.text for name in ("clip", "t5"))
    assert (type(clip).__name__, clip.config.vocab_size, clip.config.width) == ("ClipText", CLIP_TOKENS, 32)
    assert type(t5).__name__ == "T5Encoder"
    projected = make_system(public(folders["clip"], text__clip_projection=True).system)
    assert projected.parts.text.widths == TextWidths(32, 16)
    # The denoiser's embedding of the caption is of the pooled state, its keys are of the states.
    shapes = projected.shapes()["denoiser"]
    assert shapes["caption"]["hidden"]["kernel"].shape[0] == 16
    assert shapes["pairs"]["odd"]["cross_attention"]["key"].shape[1] == 32


def test_two_encoders_follow_each_other(folders):
    both = public(folders["clip"], folders["t5"], text__clip_projection=True)
    tokenizers = [load_tokenizer(folders[name]) for name in ("clip", "t5")]
    tokens = [tokenizer.tokenize(CAPTIONS, LENGTH) for tokenizer in tokenizers]
    found = states(both, np.concatenate(tokens, axis=1))
    alone = [
        states(public(folders[name], text__clip_projection=True), one)
        for name, one in zip(("clip", "t5"), tokens, strict=True)
    ]
    assert make_system(both.system).parts.text.widths == TextWidths(32, 16 + 32)
    assert both.system.text_length == 2 * LENGTH
    np.testing.assert_allclose(found.pooled, np.concatenate([one.pooled for one in alone], axis=1), atol=1e-5)
    np.testing.assert_array_equal(found.mask, np.concatenate([one.mask for one in alone], axis=1))
    for n, one in enumerate(alone):
        np.testing.assert_allclose(found.states[:, n * LENGTH : (n + 1) * LENGTH], one.states, atol=1e-5)


def test_a_checkpoint_of_t5x_is_an_encoder_as_its_folder_is(folders, tmp_path):
    """Its shapes do not say the largest distance, which is 128 in all published networks."""
    folder, params = write_t5(tmp_path / "t5"), t5_params()
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"relative_attention_max_distance": 128}))
    checkpoint = write_checkpoint(tmp_path / "checkpoint_7", t5x_arrays(params))
    plain, t5x = (public(one, data__tokenizer=str(folder)) for one in (folder, checkpoint))
    check_tokenizers(t5x)
    tokens = load_tokenizer(folder).tokenize(CAPTIONS, LENGTH)
    jax.tree.map(np.testing.assert_array_equal, states(t5x, tokens), states(plain, tokens))
    with pytest.raises(WeightsError, match="the tokenizer has 514 tokens, the text encoder's embedding 400 rows"):
        check_tokenizers(public(checkpoint, data__tokenizer=str(folders["clip"])))
    before = t5x.fingerprints()["text"]
    arrays = t5x_arrays(params)
    arrays["encoder.encoder_norm.scale"] = arrays["encoder.encoder_norm.scale"] + 1
    other = write_checkpoint(tmp_path / "other", arrays)
    assert public(other, data__tokenizer=str(folder)).fingerprints()["text"] != before
    with pytest.raises(WeightsError, match="is a checkpoint of T5X, which PyTorch's libraries do not read"):
        public_towers(t5x)


def test_a_pair_of_tokenizers_is_stored_in_one_row_and_told_apart(folders, tmp_path):
    for name in ("clip", "t5"):
        (tmp_path / {"clip": "first", "t5": "second"}[name]).symlink_to(folders[name])
    both, clip, t5 = (load_tokenizer(path) for path in (tmp_path, folders["clip"], folders["t5"]))
    for caption in (*CAPTIONS, "", "x" * 100):
        ids = both.encode(caption)
        assert ids.tolist() == [*clip.encode(caption), *t5.encode(caption)]
        for length in (2, 5, 40):
            expected = [*clip.fit(clip.encode(caption), length), *t5.fit(t5.encode(caption), length)]
            assert both.fit(ids, length).tolist() == expected
        assert [part.tolist() for part in both.split(ids)] == [
            clip.encode(caption).tolist(),
            t5.encode(caption).tolist(),
        ]
    assert clip.fit(clip.encode("ab"), 6).tolist()[-3:] == [CLIP_TOKENS - 1] * 3  # it pads with its end


@pytest.fixture(scope="module")
def run(folders, emoji_data, tmp_path_factory):
    """Three steps with CLIP's text encoder, sharded over two devices."""
    workdir = tmp_path_factory.mktemp("public") / "run"
    changes = {"data__directory": str(emoji_data), "train__num_steps": 3, "checkpoint__every": 2}
    experiment = public(folders["clip"], mesh__fsdp=2, **changes)
    assert train(experiment, workdir) == 0
    return experiment, workdir


def test_loaded_weights_are_sharded_and_outside_optimizer_ema_and_checkpoint(run):
    experiment, workdir = run
    mesh = make_mesh(experiment.mesh)
    system, optimizer = make_system(experiment.system), make_optimizer(experiment.optimizer)
    state = abstract_state(system, optimizer, state_shardings(system, optimizer, mesh))
    for part in (state.params, state.ema, restore.state_parts(state)["frozen"]):
        assert "text" not in part
    assert "clip_text" not in str(jax.tree_util.tree_structure(state.optimizer))
    matrix = state.loaded["text"]["layers"]["mlp"]["fc1"]["kernel"]
    assert np.prod(matrix.sharding.shard_shape(matrix.shape)) * 2 == np.prod(matrix.shape)
    with restore.open_reader(workdir) as manager:
        directory, meta = restore.step_directory(manager, 3), restore.read_meta(manager, 3)
    assert not [name for name in read_records(directory) if "text" in name.split("/")]
    assert meta.config["weights"] == experiment.fingerprints()
    assert len(meta.config["weights"]["text"]) == 64


def test_captions_are_encoded_by_the_folder_s_tokenizer(run, folders):
    experiment, _ = run
    kept = tokenizer_path(experiment.data)
    assert sorted(path.name for path in kept.iterdir()) == ["merges.txt", "vocab.json"]  # and not the weights
    column = kept.parents[1] / "columns" / f"tokens-{kept.name}" / "column.json"
    assert json.loads(column.read_text())["made_by"]


def test_it_resumes_and_samples_with_the_same_weights_alone(run, folders, tmp_path):
    experiment, workdir = run
    moved = write_clip(tmp_path / "moved")
    text = dataclasses.replace(experiment.text, weights=str(moved))
    longer = dataclasses.replace(experiment.train, num_steps=4)
    assert train(dataclasses.replace(experiment, text=text, train=longer), workdir) == 0  # the same, elsewhere
    opened = open_run(workdir)
    stored = load_file(moved / "model.safetensors")["text_model.embeddings.token_embedding.weight"]
    np.testing.assert_array_equal(opened.params["text"]["token_embedding"], stored)
    write_clip(tmp_path / "other", seed=1)
    other = dataclasses.replace(experiment, text=dataclasses.replace(text, weights=str(tmp_path / "other")))
    with pytest.raises(CheckpointError, match=r"config\.weights\.text: saved '\w{64}', now '\w{64}'"):
        train(other, workdir)
    with pytest.raises(CheckpointError, match="was trained with other public weights of its text"):
        open_run(workdir, [f"text.weights={tmp_path}/other"])


def test_an_export_beside_other_public_weights_is_refused(tmp_path, cpu_env):
    """What is exported names the folder's fingerprint, though the run was trained with another one's weights."""
    clip, workdir = write_clip(tmp_path / "clip"), tmp_path / "run"
    experiment = public(clip, data__directory=str(tmp_path / "nowhere"))
    keep_tokenizer({name: path.read_bytes() for name, path in files_of(clip).items()}, workdir)
    config = to_dict(experiment)
    (workdir / "config.json").write_text(json.dumps(config))
    config |= {"weights": experiment.fingerprints()}
    ema = random_params(make_system(experiment.system))
    save_ema(workdir, ema, 7, config, vocabulary=hash_files(kept_files(workdir)))

    def export(form):
        out = tmp_path / form
        done = run_forked(
            command("checkpoint", "export", f"--workdir={workdir}", f"--out={out}", f"--format={form}"), cpu_env()
        )
        return done.returncode, done.stderr, out.exists()

    write_clip(clip, seed=1)
    for form in ("ecdit", "diffusers"):
        code, said, written = export(form)
        assert (code, written) == (2, False), said
        assert f"{workdir} was trained with other public weights of its text" in said
    write_clip(clip)
    assert export("diffusers") == (0, "", True)


def test_what_does_not_fit_is_refused(folders, tmp_path):
    with pytest.raises(ConfigError, match=r"text\.weights = '.*nowhere': there is no .*nowhere/config\.json"):
        make_system(public(tmp_path / "nowhere").system)
    with pytest.raises(ConfigError, match=r"text\.frozen = False: must be True"):
        public(folders["clip"], text__frozen=False)
    with pytest.raises(ConfigError, match=r"data\.tokenizer = '': must name the folder of a tokenizer for each of"):
        public(folders["clip"], data__tokenizer="")
    with pytest.raises(ConfigError, match=r"data\.second_tokenizer = '': must name the folder"):
        public(folders["clip"], folders["t5"], data__second_tokenizer="")
    with pytest.raises(ConfigError, match=r"data\.tokenizer = '.*clip': must be a \.model file"):
        tiny(data__tokenizer=str(folders["clip"]))
    with pytest.raises(ConfigError, match=r"data\.caption_length = 77: the text encoder's weights have 16 positions"):
        make_system(public(folders["clip"], data__caption_length=77).system)
    with pytest.raises(WeightsError, match="the tokenizer has 514 tokens, the text encoder's embedding 400 rows"):
        check_tokenizers(public(folders["t5"], data__tokenizer=str(folders["clip"])))
    # T5's ids all have a row in CLIP's embedding, so sizes do not tell.
    with pytest.raises(WeightsError, match=r"t5: its tokenizer is T5's, and .*/clip is another encoder"):
        check_tokenizers(public(folders["clip"], data__tokenizer=str(folders["t5"])))


def test_a_frozen_random_tower_trains_only_where_the_config_says_so(folders):
    frozen = tiny(text__frozen=True)
    with pytest.raises(ConfigError, match=r"text\.weights = 'random': a frozen text encoder must have been trained"):
        check_trainable(frozen)
    check_trainable(tiny(text__frozen=True, text__frozen_random_ok=True))
    check_trainable(tiny(text__frozen=True, checkpoint__init_from="runs/emoji"))
    check_trainable(tiny())
    check_trainable(public(folders["clip"]))
    del_weights = tiny_values()
    del del_weights.text["weights"]
    with pytest.raises(ConfigError, match=r"text\.weights = None: missing"):
        make_experiment(del_weights)


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """36 images and their captions, which are not prepared."""
    place = tmp_path_factory.mktemp("grey_text")
    task = {"data__module": module(place, "grey_text", "36"), "data__task": "grey_text"}
    return {**task, "data__directory": str(place / "data"), "data__vocab_size": 300}


def test_a_caption_counts_as_cut_where_one_of_two_encoders_cuts_it(folders, grey, tmp_path):
    """Not where both parts together are longer than the room of one."""
    both = public(folders["clip"], folders["t5"], **{**grey, "data__directory": str(tmp_path)})
    prepare_captions(both.data, 1, QUIET)
    prepared = open_prepared(both.data)
    (part,) = filter(None, prepared.stored)
    tokenizer = load_tokenizer(prepared.tokenizer)
    captions = [
        text
        for split in ("train", "held_out")
        for record in stored_records(prepared, split)
        for text in record.captions.values()
    ]
    longest = [max(len(one.rows([text])[0]) for one in tokenizer.parts) for text in captions]
    together = [len(tokenizer.encode(text)) for text in captions]
    assert max(longest) < min(together)
    for length in (min(longest) - 1, max(longest) - 1, max(longest)):
        assert truncated_captions(part.tokens.histograms, length) == sum(one > length for one in longest)


@pytest.mark.parametrize(("stored", "tolerance"), [("bfloat16", 2**-8), ("int8", 1 / 127)])
def test_prepared_states_are_those_of_online_encoding(folders, grey, stored, tolerance):
    """With dropped captions; two encoders share a row, and each fills its part of it."""
    both = folders["clip"], folders["t5"]
    named = {"text__encode": "prepared", "text__stored": stored, "data__text_states": stored}
    prepared, online = (public(*both, **{**grey, **more, "data__caption_dropout": 0.5}) for more in (named, {}))
    prepare_captions(prepared.data, 1, QUIET)
    with pytest.raises(DataError, match=rf"has no column text-{stored}: run .* --what=text"):
        open_prepared(prepared.data)
    column = prepared.text_column()
    prepare_column(prepared.data, column, 1, QUIET, column.constants)
    check_text(open_prepared(prepared.data), column.made_by)
    other = dataclasses.replace(column, config=dataclasses.replace(column.config, clip_states="penultimate"))
    with pytest.raises(DataError, match=f"text-{stored} was made from other tokenizer or weights"):
        check_text(open_prepared(prepared.data), other.made_by)

    of_states, of_tokens = (next(make_loader(one.data, 0, 16, 0, range(16))) for one in (prepared, online))
    assert "tokens" not in of_states
    shapes = abstract_batch(prepared.system, 16, make_mesh(MeshConfig(1, -1, 1, 1, 1)))
    found = {name: (x.shape, x.dtype) for name, x in of_states.items()}
    assert found == {name: (x.shape, x.dtype) for name, x in shapes.items()}
    expected = states(online, of_tokens["tokens"])
    np.testing.assert_array_equal(of_states["text_mask"], expected.mask)
    assert 2 <= (expected.mask.sum(axis=1) == 3).sum() <= 14  # empty captions: start and end of CLIP's, end of T5's
    kept, scale = np.asarray(expected.mask)[..., None], np.abs(expected.states).max(axis=-1, keepdims=True)
    difference = np.abs(np.float32(of_states["text_states"]) - expected.states) * kept
    assert (difference <= tolerance * scale + 1e-5).all()
    assert difference.max() > 0
    np.testing.assert_allclose(np.float32(of_states["text_pooled"]), expected.pooled, rtol=2**-7, atol=1e-5)


def test_prepared_states_take_no_work_in_a_step_and_need_a_folder(folders, grey):
    online, prepared = (
        make_system(public(folders["clip"], **{**grey, **more}).system)
        for more in ({}, {"text__encode": "prepared", "data__text_states": "x"})
    )
    work = online.parts.text.flops(LENGTH).flops
    assert work > 0
    assert online.training_flops() - prepared.training_flops() == work
    assert online.forward_flops("sample") == prepared.forward_flops("sample")
    with pytest.raises(ConfigError, match=r"text\.encode = 'prepared': must be \"online\""):
        tiny(text__encode="prepared", data__text_states="x")
    with pytest.raises(ConfigError, match=r"data\.text_states = '': must name the column"):
        public(folders["clip"], text__encode="prepared")


def test_a_state_is_stored_at_its_true_length():
    """One token of [3, -1] and a second encoder's of [0.5, 0.25]: int8 of a 127th of the largest number."""
    rows = np.array([[3, -1], [9, 9], [0.5, 0.25], [9, 9]], np.float32)
    mask = np.array([True, False, True, False])
    stored = store(rows, mask, np.float32([1, 2]), 2, "int8")
    assert stored["states"].tolist() == [[127, -42], [127, 64]]
    np.testing.assert_allclose(stored["scale"], [3 / 127, 0.5 / 127], rtol=1e-6)
    found = restore_row(stored, 2)
    assert found.mask.tolist() == mask.tolist()
    np.testing.assert_allclose(np.float32(found.states), [[3, -0.992], [0, 0], [0.5, 0.252], [0, 0]], rtol=4e-3)


def test_prepare_takes_what_text_and_says_which_config_it_is_for(cpu_env):
    flags = [f"--config={ROOT}/configs/emoji.py", "--what=text"]
    done = subprocess.run(command("prepare", *flags), capture_output=True, text=True, env=cpu_env())
    assert done.returncode == 2
    assert done.stderr == "error: config.text.encode = 'online': must be \"prepared\" for --what=text\n"


def test_the_loss_of_prepared_states_is_that_of_online_encoding(folders, grey):
    named = {"text__encode": "prepared", "text__stored": "bfloat16", "data__text_states": "bfloat16"}
    online, prepared = (public(folders["clip"], folders["t5"], **{**grey, **more}) for more in ({}, named))
    prepare_captions(prepared.data, 1, QUIET)
    column = prepared.text_column()
    prepare_column(prepared.data, column, 1, QUIET, column.constants)
    mesh = make_mesh(MeshConfig(1, -1, 1, 1, 1))
    params = random_params(make_system(online.system))
    found = []
    for one in (online, prepared):
        system = make_system(one.system)
        whole = {**system.drawn(params), **system.load(mesh)}
        rows = fixed_rows(open_prepared(one.data), 8, "train")
        found.append(losses_by_time(make_loss_program(system, mesh, 8), whole, rows))
    np.testing.assert_allclose(found[1], found[0], rtol=0.02)
    assert (found[1] != found[0]).any()  # states were rounded


def test_a_damaged_empty_caption_is_refused_and_found_by_verify(folders, grey):
    """Training puts its states in the place of a tenth of the captions."""
    named = {"text__encode": "prepared", "text__stored": "int8", "data__text_states": "verified"}
    experiment = public(folders["clip"], **{**grey, **named})
    prepare_captions(experiment.data, 1, QUIET)
    column = experiment.text_column()
    prepare_column(experiment.data, column, 1, QUIET, column.constants)
    verify(experiment.data, QUIET)
    (path,) = Path(experiment.data.directory).rglob("text-verified/empty_caption")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"empty_caption is damaged: delete .*text-verified and prepare it again"):
        empty_caption(open_prepared(experiment.data))
    with pytest.raises(DataError, match=r"shards are damaged:\n  .*empty_caption is damaged"):
        verify(experiment.data, QUIET)


def test_a_tokenizer_at_another_place_is_the_one_that_the_data_was_prepared_with(folders, grey, tmp_path):
    experiment = public(folders["clip"], **grey)
    path = prepare_captions(experiment.data, 1, QUIET) and tokenizer_path(experiment.data)
    shutil.copytree(folders["clip"], tmp_path / "moved")
    moved = dataclasses.replace(experiment.data, tokenizer=str(tmp_path / "moved"))
    assert tokenizer_path(moved) == path
    assert open_prepared(moved).fingerprint == open_prepared(experiment.data).fingerprint
    other = dataclasses.replace(experiment.data, tokenizer=str(folders["t5"]))
    assert tokenizer_path(other) != path
