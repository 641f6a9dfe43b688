"""A run exported for PyTorch: its files, without PyTorch. `tests/parity` samples from such folders."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ecdit.config import to_dict
from ecdit.errors import UserError
from ecdit.interop import pytorch_parts
from ecdit.models.config import DiTConfig
from ecdit.pretrained.safetensors_folder import SafetensorsFolder
from ecdit.runs import diffusers_folder
from ecdit.runs.diffusers_folder import Tower, export_diffusers, model_index
from ecdit.runs.model_card import _sampling as model_card_sampling
from ecdit.runs.model_card import model_card
from ecdit.runs.trained_run import open_run
from ecdit.system import make_system
from tests.pretrained.towers import write_clip
from tests.runs import keep_small_tokenizer, save_ema, tiny

FILES = {
    "README.md",
    "model_index.json",
    "pipeline.py",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/text_tower.py",
    "tokenizer/captions.json",
    "tokenizer/captions.py",
    "tokenizer/spiece.model",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "transformer/ec_dit.py",
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of random EMA weights, whose data is not at hand."""
    workdir, experiment = tmp_path_factory.mktemp("diffusers") / "run", tiny(data__directory="nowhere")
    rng, shapes = np.random.default_rng(0), jax.eval_shape(make_system(experiment.system).init, jax.random.key(0))
    ema = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes)
    save_ema(workdir, ema, step=7, config=to_dict(experiment), vocabulary=keep_small_tokenizer(workdir))
    (workdir / "config.json").write_text(json.dumps(to_dict(experiment)))
    return workdir


@pytest.fixture(scope="module")
def opened(workdir):
    return open_run(workdir)


def export(opened, folder, shard_bytes=10**9):
    return export_diffusers(opened, folder, shard_bytes, "the card", with_towers=False)


def test_the_folder_has_every_weight_as_pytorch_s_modules_hold_it(opened, tmp_path):
    assert export(opened, tmp_path / "out") == ["diffusion_pytorch_model.safetensors"]
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == FILES
    assert (tmp_path / "out/README.md").read_text() == "the card"
    weights = load_file(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors")
    ours = opened.params["denoiser"]
    numbers = lambda arrays: sum(np.size(array) for array in arrays)  # noqa: E731
    assert numbers(weights.values()) == numbers(jax.tree.leaves(ours))
    odd, even = ours["pairs"]["odd"], ours["pairs"]["even"]
    # Of two pairs of blocks, counted from 0 here, blocks 0 and 2 are dense; linear layers are transposed there.
    for name, expected in {
        "blocks.0.feed_forward.up.weight": odd["feed_forward"]["up"][0].T,
        "blocks.2.attention.query.weight": odd["attention"]["query"][1].T,
        "blocks.1.experts.router": even["experts"]["router"][0],
        "blocks.3.experts.up": even["experts"]["up"][1],
        "blocks.3.table": even["table"][1],
        "extra.1.cross_attention.key_scale": ours["extra"]["cross_attention"]["key_scale"][1],
        "modulation.weight": np.concatenate([ours["modulation"][:, row].T for row in range(6)]),
        "modulation.bias": np.concatenate(list(ours["modulation_bias"])),
        "head.weight": ours["head"]["kernel"].T,
        "mask_token": ours["mask_token"],
    }.items():
        np.testing.assert_array_equal(weights[name], expected, err_msg=name)
    text = load_file(tmp_path / "out/text_encoder/model.safetensors")
    blocks = opened.params["text"]["blocks"]
    np.testing.assert_array_equal(text["tokens.weight"], opened.params["text"]["tokens"])
    np.testing.assert_array_equal(text["blocks.0.attention.value.bias"], blocks["attention"]["value_bias"][0])
    np.testing.assert_array_equal(text["blocks.0.ffn_norm.weight"], blocks["ffn_norm"]["scale"][0])
    assert numbers(text.values()) == numbers(jax.tree.leaves(opened.params["text"]))


def test_the_configs_say_what_the_run_is(opened, tmp_path):
    export(opened, tmp_path / "out")
    read = lambda name: json.loads((tmp_path / "out" / name).read_text())  # noqa: E731
    config = read("transformer/config.json")
    known = {"width": 32, "depth": 4, "ffn": "expert_choice", "num_experts": 4, "text_width": 32, "pooled_width": 32}
    assert known.items() <= config.items()
    tower = {"vocab_size": 2048, "width": 32, "layers": 1, "heads": 2, "activation": "gelu", "length": 16}
    assert read("text_encoder/config.json") == tower
    assert read("tokenizer/captions.json") == {"length": 16, "public": False}
    index = read("model_index.json")
    assert index["transformer"] == ["ec_dit", "Denoiser"]
    assert index["text_encoder"] == ["text_tower", "TextTower"]
    assert index["vae"] == [None, None]
    expected = {
        "num_steps": 2,
        "guidance_scale": 3.0,
        "original_size": 72,
        "solver": "euler",
        "autoencoder": "identity",
    }
    assert expected.items() <= index.items()
    assert read("scheduler/scheduler_config.json")["shift"] == 1.0


def test_large_weights_are_split_and_an_index_names_them_as_diffusers_does(opened, tmp_path):
    names = export(opened, tmp_path / "out", shard_bytes=100_000)
    assert len(names) > 2
    assert names[0] == f"diffusion_pytorch_model-00001-of-{len(names):05d}.safetensors"
    assert (tmp_path / "out/transformer/diffusion_pytorch_model.safetensors.index.json").exists()
    with safe_open(tmp_path / "out/transformer" / names[-1], "numpy") as file:
        assert file.metadata()["step"] == "7"
    found = SafetensorsFolder(tmp_path / "out/transformer")
    assert found.shape("blocks.3.experts.down") == (4, 128, 32)


def test_an_error_in_the_middle_leaves_no_folder_and_one_that_holds_something_is_refused(opened, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes").write_text("mine")
    with pytest.raises(UserError, match="full holds other files; name a folder that is missing or empty"):
        export(opened, tmp_path / "full")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(UserError, match=r"writing .*/out failed: .*No space left"):
        export(opened, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "notes"]


def test_a_group_of_more_images_than_a_pipeline_draws_is_refused(opened, tmp_path):
    tokens = opened.experiment.model.num_tokens
    for images in (2, 4):
        model = dataclasses.replace(opened.experiment.model, sampling_group=str(images * tokens))
        experiment = dataclasses.replace(opened.experiment, model=model)
        run = dataclasses.replace(opened, experiment=experiment, system=make_system(experiment.system))
        if images == 2:
            export(run, tmp_path / "two")
            continue
        with pytest.raises(UserError, match=r"model\.sampling_group = '\d+': joins 4 images"):
            export(run, tmp_path / "four")
    assert [path.name for path in tmp_path.iterdir()] == ["two"]


def test_what_the_pytorch_file_does_not_know_is_refused_by_name(opened):
    system = opened.experiment.system
    fields = {field.name for field in dataclasses.fields(DiTConfig)}
    assert fields == {*pytorch_parts._COMPUTED, *pytorch_parts._OTHERS}

    @dataclasses.dataclass(frozen=True)
    class Later(DiTConfig):
        registers: int = 4

    later = dataclasses.replace(system, model=Later(**to_dict(system.model)))
    with pytest.raises(UserError, match=r"the PyTorch file does not know model\.registers"):
        pytorch_parts.denoiser_values(later)
    own = dataclasses.replace(system, denoiser="mine.py:Mine")
    with pytest.raises(UserError, match=r'denoiser = "mine\.py:Mine": there is a PyTorch file of "ec_dit" alone'):
        pytorch_parts.denoiser_values(own)


def test_public_weights_are_named_with_their_fingerprint_or_copied(opened, tmp_path):
    vae = tmp_path / "my-vae"
    vae.mkdir()
    (vae / "config.json").write_text("{}")
    save_file({"a": np.float32([1])}, vae / "odd-name.safetensors")
    tower = Tower("vae", vae, "diffusers", "AutoencoderKL", "ab12")
    index = model_index(opened.experiment, (tower,), with_towers=False)
    assert index["vae"] == [None, None]
    named = {"class": "diffusers.AutoencoderKL", "name": vae.as_posix(), "fingerprint": "ab12"}
    assert index["towers"] == {"vae": named}
    index = model_index(opened.experiment, (tower,), with_towers=True)
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert "towers" not in index
    diffusers_folder._copy(tower, tmp_path / "one")
    copied = ["config.json", "diffusion_pytorch_model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == copied


@pytest.mark.parametrize(("stem", "index"), [("model", "index"), ("model.fp16", "index.fp16")])
def test_public_weights_in_several_files_are_copied_with_their_index(tmp_path, stem, index):
    """A variant's index is copied under the name that is looked for."""
    folder = tmp_path / "t5"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    names = [f"{stem}-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name, tensor in zip(names, ("a", "b"), strict=True):
        save_file({tensor: np.float32([1])}, folder / name)
    places = {"weight_map": {"a": names[0], "b": names[1]}}
    (folder / f"model.safetensors.{index}.json").write_text(json.dumps(places))
    diffusers_folder._copy(Tower("text_encoder", folder, "transformers", "T5EncoderModel", ""), tmp_path / "copy")
    expected = ["config.json", *names, "model.safetensors.index.json"]
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == sorted(expected)


@pytest.mark.parametrize(("beside", "told"), [(16, None), (512, 16), (None, 16)])
def test_a_whole_clip_s_projection_is_told_where_its_text_config_has_another(tmp_path, beside, told):
    """transformers' text encoder takes that of text_config, 512 by default; the weights have the other one."""
    clip = write_clip(tmp_path / "clip")
    values = json.loads((clip / "config.json").read_text())
    text = {key: value for key, value in values.items() if key not in ("model_type", "projection_dim")}
    text |= {} if beside is None else {"projection_dim": beside}
    (clip / "config.json").write_text(json.dumps({"model_type": "clip", "projection_dim": 16, "text_config": text}))
    named = {"text__weights": str(clip), "data__tokenizer": str(clip), "data__caption_length": 12}
    experiment = tiny(text__frozen=True, text__clip_projection=True, **named)
    (tower,) = diffusers_folder.public_towers(experiment)
    assert tower.projection == told
    script = model_card_sampling(experiment, [tower])
    assert f'from_pretrained("{clip}"{"" if told is None else ", projection_dim=16"})' in script
    diffusers_folder._copy(tower, tmp_path / "copy")
    found = json.loads((tmp_path / "copy/config.json").read_text())
    assert found["text_config"]["projection_dim"] == found["projection_dim"] == 16
    plain = tiny(text__frozen=True, **named)
    assert diffusers_folder.public_towers(plain)[0].projection is None


def test_the_card_has_the_run_s_scores_and_says_what_is_not_at_hand(opened, workdir):
    (workdir / "evaluations").mkdir(exist_ok=True)
    for step, overall in ((4, 0.25), (7, 0.5), (9, 1.0)):  # the last one is of a later checkpoint
        record = {"step": step, "loss": {"mean": 0.125, "by_time": [0.5]}, "shapes": {"overall": overall, "kinds": {}}}
        (workdir / f"evaluations/step_{step:08d}.json").write_text(json.dumps(record))
    (workdir / "evaluations/loss.json").write_text("{")  # of another program
    card = model_card(opened, workdir, "Tiny", with_towers=False)
    assert card.startswith("# Tiny\n")
    scores = card.split("## Scores")[1]
    assert "Of step 7." in scores
    assert "| eval/shapes/overall | 0.5 |" in scores
    assert "| eval/loss | 0.125 |" in scores
    assert "t_0" not in scores
    assert "The data was not at hand at the export" in card.split("## Data")[1]
    assert "| experts in every second block | 4, expert choice |" in card
    assert "| step of the EMA weights | 7 |" in card
    assert card.count("```python") == 2
    assert "## Public weights" not in card


def test_the_card_of_a_run_on_latents_alone_draws_latents(opened, workdir):
    """Nothing decodes them, so the script saves no image."""
    experiment = opened.experiment
    data = dataclasses.replace(experiment.data, latent_channels=experiment.model.latent_channels, image_size=256)
    experiment = dataclasses.replace(experiment, autoencoder="latents", data=data)
    card = model_card(dataclasses.replace(opened, experiment=experiment), workdir, "Tiny", with_towers=False)
    sample = card.split("## Sample")[1].split("## Model")[0]
    assert sample.count("```python") == 1
    assert 'latents = pipeline("a red heart", generator=noise, output_type="latent").images\n```' in sample
    assert "save(" not in sample


def test_the_card_names_the_makers_and_the_licence_of_generated_data(opened, workdir, monkeypatch):
    prepared = type("P", (), {})()
    prepared.fingerprint = opened.dataset
    stored = type("S", (), {"manifest": type("M", (), {"attribution": "Images: A. Maker, CC BY 4.0"})()})()
    components = tuple(type("C", (), {"task": name})() for name in ("photos", "shapes"))
    prepared.composition, prepared.stored = type("K", (), {"components": components})(), (stored, None)
    monkeypatch.setattr("ecdit.runs.model_card.open_prepared", lambda data: prepared)
    card = model_card(opened, workdir, "Tiny", with_towers=False)
    assert "- `photos`: Images: A. Maker, CC BY 4.0" in card
    assert "- `shapes`: made by rule" in card
