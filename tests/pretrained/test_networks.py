import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ecdit.config import ConfigError
from ecdit.partitioning import MeshConfig, abstract_mesh, batch_sharding, make_mesh, param_shardings
from ecdit.pretrained.autoencoder_kl import AutoencoderKL, read_autoencoder
from ecdit.pretrained.clip_text import ClipText, read_clip_text
from ecdit.pretrained.config_json import WeightsError
from ecdit.pretrained.t5_encoder import T5Encoder, read_t5, relative_buckets
from tests.models.helpers import Model, close, jit
from tests.pretrained.folders import CLIP, CLIP_JSON, T5, T5_JSON, VAE, VAE_JSON, clip, t5, vae

CUBE = MeshConfig(slices=1, data=2, fsdp=2, expert=1, tensor=2)
# Ends: 31 for CLIP, whose largest id it is, and 1 for T5.
CLIP_TOKENS = np.array([[5, 9, 2, 7, 3, 31], [4, 8, 31, 0, 0, 0], [31] * 6, [1, 2, 31, 31, 31, 31]], np.int32)
T5_TOKENS = np.array([[5, 9, 2, 7, 3, 1], [4, 8, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [9, 9, 9, 1, 0, 0]], np.int32)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (4, 8, 12, 3)).astype(np.float32)


def encode(model, tokens):
    return jax.tree.map(np.asarray, jit(lambda params, tokens: model(params)(tokens))(model.params, tokens))


def folder_with(path, values):
    (path / "config.json").write_text(json.dumps(values))
    return path


def test_clip_ends_where_the_largest_id_first_stands():
    text = encode(clip(), CLIP_TOKENS)
    np.testing.assert_array_equal(text.mask.sum(axis=1), [6, 3, 1, 3])
    assert text.pooled.shape == (4, CLIP.projection_width)
    assert text.states.shape == (4, 6, CLIP.width)


def test_clip_s_pooled_state_is_projected_from_its_end():
    plain = Model(lambda rngs: ClipText(dataclasses.replace(CLIP, projection_width=0), 6, rngs))
    params = {name: value for name, value in clip().params.items() if name != "text_projection"}
    text = jit(lambda params, tokens: plain(params)(tokens))(params, CLIP_TOKENS)
    for row, end in enumerate([5, 2, 0, 2]):
        np.testing.assert_array_equal(text.pooled[row], text.states[row, end])
    close(encode(clip(), CLIP_TOKENS).pooled, text.pooled @ clip().params["text_projection"]["kernel"], 1e-5)


def test_what_follows_the_end_changes_nothing_in_clip():
    changed = CLIP_TOKENS.copy()
    changed[1, 3:] = [7, 31, 9]
    plain, other = encode(clip(), CLIP_TOKENS), encode(clip(), changed)
    np.testing.assert_array_equal(plain.states[plain.mask], other.states[other.mask])
    np.testing.assert_array_equal(plain.pooled, other.pooled)


def test_padding_changes_nothing_in_t5():
    plain, short = encode(t5(), T5_TOKENS), encode(t5(), T5_TOKENS[1:3, :3])
    close(short.states, plain.states[1:3, :3], 1e-5)
    close(short.pooled, plain.pooled[1:3], 1e-5)
    np.testing.assert_array_equal(plain.mask, T5_TOKENS > 0)
    close(plain.pooled[3], plain.states[3, :4].mean(axis=0), 1e-5)


def test_buckets_of_eight_by_hand():
    """Four a side: distances 0 and 1, then 2 to 5 (up to 2 sqrt(16 / 2)), and all from 6."""
    row = relative_buckets(20, 8, 16)[10]
    np.testing.assert_array_equal(row[10:], [0, 5, 6, 6, 6, 6, 7, 7, 7, 7])
    np.testing.assert_array_equal(row[:11], [3, 3, 3, 3, 3, 2, 2, 2, 2, 1, 0])


@pytest.mark.parametrize("network", ["clip", "t5"])
def test_a_sharded_encoder_gives_what_one_device_gives(network):
    model, tokens = (clip(), CLIP_TOKENS) if network == "clip" else (t5(), T5_TOKENS)
    mesh = make_mesh(CUBE)
    with jax.set_mesh(mesh):
        params = jax.device_put(model.params, param_shardings(model.abstract, mesh))
        sharded = jit(lambda params, tokens: model(params)(tokens))(
            params, jax.device_put(tokens, batch_sharding(mesh))
        )
    close(sharded, encode(model, tokens), 1e-5)


def test_a_sharded_autoencoder_gives_what_one_device_gives():
    model, keys = vae(), jax.random.split(jax.random.key(1), 4)
    both = np.concatenate([IMAGES, IMAGES], axis=-1)

    def run(params, images, keys):
        return model(params).encode(images[..., :3], keys), model(params).decode(images[..., :4])

    expected = jit(run)(model.params, both, keys)
    mesh = make_mesh(CUBE)
    with jax.set_mesh(mesh):
        params = jax.device_put(model.params, param_shardings(model.abstract, mesh))
        sharded = jit(run)(params, *jax.device_put((both, keys), batch_sharding(mesh)))
    close(sharded, expected, 1e-5)


def test_latents_are_scaled_and_decoded_to_images():
    model = vae(dataclasses.replace(VAE, posterior="mode"))
    params, keys = model.params, jax.random.split(jax.random.key(0), 4)

    @jit
    def run(params, images):
        network = model(params)
        mean, log_variance = network.moments(images)
        return mean, log_variance, network.encode(images, keys), network.decode(mean)

    mean, log_variance, latents, images = run(params, IMAGES)
    assert mean.shape == log_variance.shape == (4, 2, 3, 4)
    close(latents, (mean - 0.1) * 0.5, 1e-6)
    assert images.shape == IMAGES.shape
    assert model(params).downsampling == 4
    assert model(params).latent_shape(32) == (8, 8, 4)


def test_latents_are_drawn_with_each_image_s_own_key():
    network = vae()(vae().params)
    mean = jnp.zeros((3, 8, 8, 4))
    keys = jax.random.split(jax.random.key(2), 3)
    log_variance = jnp.full_like(mean, 2 * np.log(3.0))
    drawn = network.latents(mean, log_variance, keys)
    close(network.latents(mean[1:], log_variance[1:], keys[1:]), drawn[1:], 1e-6)
    z = np.asarray(drawn) / 0.5 + 0.1
    assert abs(z.mean()) < 0.3
    assert 2.7 < z.std() < 3.3  # of 768 numbers with deviation 3


@pytest.mark.parametrize("network", ["clip", "t5"])
def test_bfloat16_stays_near_float32(network):
    narrow = Model(lambda rngs: ClipText(dataclasses.replace(CLIP, dtype="bfloat16"), 6, rngs))
    wide, tokens = clip(), CLIP_TOKENS
    if network == "t5":
        narrow, wide, tokens = t5(dataclasses.replace(T5, dtype="bfloat16")), t5(), T5_TOKENS
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), wide.params)
    text = jit(lambda params, tokens: narrow(params)(tokens))(params, tokens)
    assert text.states.dtype == text.pooled.dtype == jnp.bfloat16
    expected = encode(wide, tokens).states
    error = np.linalg.norm(np.asarray(text.states, np.float32) - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.1


@pytest.mark.parametrize("network", ["clip", "t5"])
def test_flops_are_those_of_the_products(network):
    """Two for each multiplication and addition; here all products of one layer, counted by hand."""
    length = 6
    if network == "clip":
        part = clip()(clip().params).flops(length)
        layer = length * (4 * 32 * 32 + 2 * 32 * 64) + 2 * length * length * 32
    else:
        part = t5()(t5().params).flops(length)
        layer = length * (4 * 32 * 16 + 3 * 32 * 64) + 2 * length * length * 16
    assert part.flops == 2 * 3 * layer
    assert part.tokens == 3 * length


def test_heads_must_divide_over_the_mesh():
    mesh = abstract_mesh(MeshConfig(slices=1, data=1, fsdp=1, expert=1, tensor=8), 8)
    for model in (clip(), t5()):
        with pytest.raises(ConfigError, match=r"config.text.heads = 4: must be a multiple of mesh.tensor, 8"):
            model(model.params).check_layout(mesh)


def test_captions_must_fit_the_positions():
    with pytest.raises(ConfigError, match="caption_length = 13: the text encoder's weights have 12 positions"):
        Model(lambda rngs: ClipText(CLIP, 13, rngs))


def read_clip(folder):
    return read_clip_text(folder, projection=True, states="last", dtype="float32")


def read_vae(folder):
    return read_autoencoder(folder, "sample", "float32")


def read_t5_float32(folder):
    return read_t5(folder, "float32")


def test_configs_are_read(tmp_path):
    assert read_clip(folder_with(tmp_path, CLIP_JSON)) == CLIP
    assert read_t5_float32(folder_with(tmp_path, T5_JSON)) == T5
    assert read_vae(folder_with(tmp_path, VAE_JSON)) == VAE


def test_a_whole_clip_s_config_is_read(tmp_path):
    text = {key: value for key, value in CLIP_JSON.items() if key not in ("model_type", "projection_dim")}
    whole = {"model_type": "clip", "projection_dim": 16, "text_config": text, "vision_config": {"hidden_size": 7}}
    assert read_clip(folder_with(tmp_path, whole)) == CLIP


def test_a_whole_clip_s_older_config_is_read(tmp_path):
    """Older versions of transformers wrote text_config_dict, alone or beside text_config."""
    text = {key: value for key, value in CLIP_JSON.items() if key not in ("model_type", "projection_dim")}
    whole = {"model_type": "clip", "projection_dim": 16}
    alone = whole | {"text_config": None, "text_config_dict": text}
    assert read_clip(folder_with(tmp_path, alone)) == CLIP
    sizes = {"hidden_size": 32, "projection_dim": 7}  # the projection is the one beside both
    assert read_clip(folder_with(tmp_path, whole | {"text_config": text, "text_config_dict": sizes})) == CLIP
    other = whole | {"text_config": text, "text_config_dict": {"hidden_act": "quick_gelu"}}
    message = "text_config has hidden_act = 'gelu' and text_config_dict has 'quick_gelu': must be equal"
    with pytest.raises(WeightsError, match=message):
        read_clip(folder_with(tmp_path, other))
    with pytest.raises(WeightsError, match=r"text_config_dict = \[1\]: must be an object"):
        read_clip(folder_with(tmp_path, whole | {"text_config_dict": [1]}))


@pytest.mark.parametrize(
    ("read", "values", "change", "message"),
    [
        (read_clip, CLIP_JSON, {"hidden_act": "relu"}, "hidden_act = 'relu': must be 'quick_gelu' or 'gelu'"),
        (read_clip, T5_JSON, {}, "model_type = 't5': must be 'clip_text_model' or 'clip'"),
        (read_clip, CLIP_JSON, {"hidden_size": "big"}, "hidden_size = 'big': must be int, at least 1"),
        (read_clip, CLIP_JSON, {"num_attention_heads": 5}, "json: heads = 5: must divide the width, 32"),
        (
            read_vae,
            VAE_JSON,
            {"norm_num_groups": 3},
            r"json: widths = \(4, 8, 8\): must be multiples of norm_groups, 3",
        ),
        (read_t5_float32, T5_JSON, {"feed_forward_proj": "gated-silu"}, "feed_forward_proj = 'gated-silu'"),
        (read_t5_float32, T5_JSON, {"model_type": "umt5"}, "model_type = 'umt5': must be 't5'"),
        (read_t5_float32, T5_JSON, {"num_layers": 0}, "num_layers = 0: must be int, at least 1"),
        (read_vae, VAE_JSON, {"_class_name": "AsymmetricAutoencoderKL"}, "_class_name = 'AsymmetricAutoencoderKL'"),
        (read_vae, VAE_JSON, {"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "down_block_types = "),
        (read_vae, VAE_JSON, {"mid_block_add_attention": False}, "mid_block_add_attention = False"),
        (read_vae, VAE_JSON, {"use_post_quant_conv": False}, "use_post_quant_conv = False: must be True"),
        (read_vae, VAE_JSON, {"latents_mean": [0.1]}, r"latents_mean = \[0.1\]"),
        (read_vae, VAE_JSON, {"scaling_factor": float("nan")}, "scaling_factor = nan: must be float"),
        (read_vae, VAE_JSON, {"shift_factor": float("inf")}, "shift_factor = inf: must be float"),
        (read_vae, VAE_JSON, {"block_out_channels": 8}, "block_out_channels = 8: must be a list of int, each at least"),
        (read_vae, VAE_JSON, {"block_out_channels": [4, 8, -8]}, r"block_out_channels = \[4, 8, -8\]: must be a list"),
    ],
)
def test_other_architectures_are_refused_by_name(read, values, change, message, tmp_path):
    with pytest.raises(WeightsError, match=message) as error:
        read(folder_with(tmp_path, values | change))
    assert str(tmp_path / "config.json") in str(error.value)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"config.json: the file does not exist"):
        read_clip(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(WeightsError, match="must hold a JSON object"):
        read_clip(tmp_path)


def test_an_autoencoder_s_widths_divide_into_groups():
    with pytest.raises(ConfigError, match="widths"):
        AutoencoderKL(dataclasses.replace(VAE, norm_groups=3), None)


def test_t5_xxl_is_split_over_a_slice_and_compiles():
    """Of 64 devices each holds a 64th, but for norms; 24 layers are one loop, so that the program is small."""
    config = dataclasses.replace(
        T5, vocab_size=32128, width=4096, mlp_width=10240, layers=24, heads=64, head_width=64, dtype="bfloat16"
    )
    with nnx.use_eager_sharding(False):
        graphdef, abstract = nnx.split(nnx.eval_shape(lambda: T5Encoder(config, 128, nnx.Rngs(0))), nnx.Param)
    mesh = abstract_mesh(MeshConfig(slices=1, data=1, fsdp=32, expert=1, tensor=2), 64)
    shapes, shardings = nnx.to_pure_dict(abstract), param_shardings(abstract, mesh)
    held = jax.tree.map(lambda p, s: np.prod(s.shard_shape(p.shape)), shapes, shardings)
    whole = sum(np.prod(p.shape) for p in jax.tree.leaves(shapes))
    assert whole / 64 <= sum(jax.tree.leaves(held)) <= 1.01 * whole / 64
    lowered = jax.jit(lambda params, tokens: nnx.merge(graphdef, nnx.State(params))(tokens)).lower(
        shapes, jax.ShapeDtypeStruct((2, 128), jnp.int32)
    )
    assert lowered.as_text().count("stablehlo.dot_general") == 4 + 2 + 3  # projections, attention and MLP, once
