"""configs/public_towers.py on folders that the real libraries write, as its downloads have them, at random weights."""

import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecdit.data.record import Record, unpack
from ecdit.data.tokenizer import load_tokenizer
from ecdit.encoders.autoencoder import to_unit
from ecdit.experiment import check_tokenizers, make_experiment
from ecdit.partitioning import MeshConfig, make_mesh
from ecdit.system import make_system
from tests.data.example import png
from tests.models.helpers import jit
from tests.parity.networks import ORDER, draw, relative_error, report
from tests.parity.test_tokenizers import write_clip_vocabulary
from tests.runs import config_file

TOLERANCE = 1e-5  # of the spread of a text encoder's output, as in test_text_encoders
LATENTS = 1e-3  # of latents, which the column has in float16
DECODED = 1e-4
CAPTIONS = ["", "a red heart", "The owl's moon, 12 cakes!", "a photo of a tiger " * 40]
SIDE = 64
END = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}


def write_clip_l(torch, transformers, open_clip, folder):
    """openai/clip-vit-large-patch14, made small: a whole CLIP, its legacy end id and its old text_config_dict."""
    text = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        text_config=text | {"projection_dim": 20, "eos_token_id": 2, "vocab_size": 49408},
        vision_config=text | {"image_size": 16, "patch_size": 8, "projection_dim": 20},
        projection_dim=20,
    )
    draw(torch, transformers.CLIPModel(config)).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"text_config_dict": text | {"projection_dim": 20}}))
    write_clip_vocabulary(open_clip, folder)
    (folder / "special_tokens_map.json").write_text(json.dumps({key: {"content": one} for key, one in END.items()}))
    (folder / "tokenizer_config.json").write_text(json.dumps(END | {"tokenizer_class": "CLIPTokenizer"}))


def write_t5_xxl(torch, transformers, folder):
    """SD3's text_encoder_3 and tokenizer_3, made small: float16 in several files, and more rows than pieces."""
    import sentencepiece

    config = transformers.T5Config(
        vocab_size=400, d_model=40, d_kv=12, d_ff=72, num_layers=3, num_heads=5, feed_forward_proj="gated-gelu"
    )
    encoder = draw(torch, transformers.T5EncoderModel(config)).half()
    encoder.save_pretrained(folder / "text_encoder_3", max_shard_size="30KB")
    (folder / "tokenizer_3").mkdir()
    words = random.Random(0)
    lines = ["".join(words.choices("abcdefghijklmnopqrstuvwxyz ,.!'0123456789THO", k=60)) for _ in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*CAPTIONS[1:], *lines]), model_prefix=str(folder / "tokenizer_3/spiece"),
        vocab_size=200, model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    values = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}
    (folder / "tokenizer_3/tokenizer_config.json").write_text(json.dumps(values))


def write_autoencoder(torch, diffusers, folder, scale):
    """SD's with the names and the short config of its time, without a scale; SDXL's in float16."""
    from safetensors.torch import load_file, save_file

    network = diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16, 16), layers_per_block=2, norm_num_groups=4, scaling_factor=scale or 0.18215,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    network = draw(torch, network)
    (network.half() if scale else network).save_pretrained(folder)
    if scale:
        return
    file, config = folder / "diffusion_pytorch_model.safetensors", folder / "config.json"
    weights = load_file(file)
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        weights = {name.replace(f".{new}.", f".{old}."): value for name, value in weights.items()}
    save_file(weights, file)
    of_its_time = ("_class_name", "act_fn", "block_out_channels", "down_block_types", "in_channels", "latent_channels")
    of_its_time += ("layers_per_block", "norm_num_groups", "out_channels", "sample_size", "up_block_types")
    values = json.loads(config.read_text())
    config.write_text(json.dumps({key: values[key] for key in of_its_time}))


def theirs_of(name, torch, transformers):
    """Returns the captions' ids, states and pooled states by the libraries; T5 has no pooled state."""
    if "t5" not in name:
        tokenizer = transformers.CLIPTokenizer.from_pretrained("weights/clip-l")
        encoder = transformers.CLIPTextModelWithProjection.from_pretrained("weights/clip-l", dtype=torch.float32)
        tokens = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
        found = encoder.eval()(tokens["input_ids"], output_hidden_states=True)
        return tokens["input_ids"], found.hidden_states[-2], found.text_embeds
    tokenizer = transformers.T5Tokenizer.from_pretrained("weights/sd3/tokenizer_3", extra_ids=0)
    encoder = transformers.T5EncoderModel.from_pretrained("weights/sd3/text_encoder_3", dtype=torch.float32)
    tokens = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=128, return_tensors="pt")
    return tokens["input_ids"], encoder.eval()(**tokens).last_hidden_state, None


def latents_of(experiment, images):
    """Returns the stored means and log variances of images, as the preparation makes them."""
    size = np.full(2, SIDE, np.int32)
    records = [Record(str(n), png(image), size, 0 * size, {"caption": "a"}) for n, image in enumerate(images)]
    return np.stack([unpack(data)["latents"] for data, _ in experiment.latents_column().values(records)])


@pytest.mark.parametrize("name", ["64px", "64px-t5-sdxl"], ids=ORDER[:2])
def test_the_config_reads_what_the_libraries_write(
    torch, transformers, diffusers, open_clip, name, tmp_path, monkeypatch, record_property
):
    write_clip_l(torch, transformers, open_clip, tmp_path / "weights/clip-l")
    write_t5_xxl(torch, transformers, tmp_path / "weights/sd3")
    write_autoencoder(torch, diffusers, tmp_path / "weights/sd-vae", None)
    write_autoencoder(torch, diffusers, tmp_path / "weights/sdxl-vae", 0.13025)
    monkeypatch.chdir(tmp_path)
    experiment = make_experiment(config_file("public_towers").get_config(name))
    check_tokenizers(experiment)
    system = make_system(experiment.system)
    with torch.no_grad():
        ids, states, pooled = theirs_of(name, torch, transformers)
        vae = diffusers.AutoencoderKL.from_pretrained(experiment.vae.weights).float().eval()
        images = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)
        posterior = vae.encode(torch.tensor(np.asarray(to_unit(images))).permute(0, 3, 1, 2)).latent_dist
        decoded = vae.decode(posterior.mean).sample.permute(0, 2, 3, 1)

    tokens = load_tokenizer(tmp_path / experiment.data.tokenizer).tokenize(CAPTIONS, experiment.data.caption_length)
    np.testing.assert_array_equal(tokens, ids)
    drawn = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), system.drawn(system.shapes()))
    params = {**drawn, **system.load(make_mesh(MeshConfig(1, -1, 1, 1, 1), jax.devices()[:1]))}
    text = jit(lambda params, tokens: system.bind(params).text(tokens))(params, tokens)
    errors = [relative_error(text.states, states), *([] if pooled is None else [relative_error(text.pooled, pooled)])]
    report(record_property, f"public_towers.py:{name}, text", f"{len(CAPTIONS)} captions", max(errors))
    assert max(errors) <= TOLERANCE

    stored = latents_of(experiment, images)
    expected = np.concatenate([x.permute(0, 2, 3, 1) for x in (posterior.mean, posterior.logvar)], axis=-1)
    latent_error = relative_error(stored, expected)
    mean = expected[..., :4] * {"64px": 0.18215, "64px-t5-sdxl": 0.13025}[name]
    image_error = relative_error(
        jit(lambda params, z: system.bind(params).autoencoder.decode(z))(params, mean), decoded
    )
    report(record_property, f"public_towers.py:{name}, stored latents", "2 images", latent_error)
    report(record_property, f"public_towers.py:{name}, decoded images", "2 images", image_error)
    assert latent_error <= LATENTS
    assert image_error <= DECODED
