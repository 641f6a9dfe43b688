import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ecdit.config import ConfigError
from ecdit.encoders.autoencoder import VaeConfig
from ecdit.encoders.text_tower import TextConfig
from ecdit.partitioning import MeshConfig, make_mesh
from ecdit.system import SystemConfig, TextToImage, make_system
from tests.models.helpers import config, jit

LENGTH = 6
TEXT = TextConfig(
    weights="random", second_weights="", clip_states="last", clip_projection=False, encode="online",
    stored="bfloat16", frozen_random_ok=False, packed_length=0, packed_attention="plain",
    vocab_size=20, width=12, layers=1, heads=2, activation="gelu", frozen=False, remat="none", projections="plain",
    dtype="float32",
)  # fmt: skip

VAE = VaeConfig(weights="", encode="prepared", posterior="sample", dtype="float32")


def system_config(**changes):
    return SystemConfig("ec_dit", config(**changes), TEXT, "identity", VAE, caption_length=LENGTH)


SYSTEM = make_system(system_config())
INIT = jit(SYSTEM.init)


def test_the_autoencoder_must_fit_the_denoiser():
    with pytest.raises(ConfigError, match=r"model\.latent_channels = 4: the identity autoencoder has 3"):
        system_config(latent_channels=4)
    assert system_config(latent_size=16).image_size == 16


def test_init_draws_what_the_structure_promises():
    params = INIT(jax.random.key(0))
    promised = nnx.to_pure_dict(SYSTEM.abstract)
    assert jax.tree.structure(params) == jax.tree.structure(promised)
    for (path, leaf), abstract in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(promised), strict=True
    ):
        assert (leaf.shape, leaf.dtype) == (abstract.shape, jnp.float32), jax.tree_util.keystr(path)


def test_the_key_decides_the_draw():
    first, again, other = (INIT(jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    one, two = (np.asarray(params["denoiser"]["patches"]["kernel"]) for params in (first, other))
    assert (one != two).all()


def test_bound_parameters_are_the_models():
    params = jax.tree.map(lambda p: np.full(p.shape, 0.5, np.float32), nnx.to_pure_dict(SYSTEM.abstract))
    model = SYSTEM.bind(params)
    assert isinstance(model, TextToImage)
    tokens = np.array([[5, 1, 0, 0, 0, 0]], np.int32)
    text = jit(lambda params: SYSTEM.bind(params).text(tokens))(params)
    # A norm of equal numbers is its bias, up to rounding divided by the root of its epsilon.
    np.testing.assert_allclose(text.states, np.full((1, LENGTH, TEXT.width), 0.5), atol=0.01)


@pytest.mark.parametrize("ffn", ["dense", "token_choice", "expert_choice"])
@pytest.mark.parametrize("block_table", [False, True])
def test_every_parameter_has_axes_with_rules(ffn, block_table):
    system = make_system(system_config(ffn=ffn, block_table=block_table))
    mesh = make_mesh(MeshConfig(slices=1, data=1, fsdp=2, expert=2, tensor=2))
    shardings = system.shardings(mesh)
    abstract = nnx.to_pure_dict(system.abstract)
    assert jax.tree.structure(shardings) == jax.tree.structure(abstract)
    for (path, sharding), leaf in zip(
        jax.tree_util.tree_leaves_with_path(shardings), jax.tree.leaves(abstract), strict=True
    ):
        used = [name for axes in sharding.spec for name in ((axes,) if isinstance(axes, str) else axes or ())]
        assert len(used) == len(set(used)), jax.tree_util.keystr(path)
        sharding.shard_shape(leaf.shape)  # raises where a size does not divide


def test_large_parameters_are_split_over_all_of_fsdp_expert_and_tensor():
    """No matrix of the blocks, and none that modulates them, may lie whole on several devices.

    But those from the text, which are small and not split over tensor.
    """
    mesh = make_mesh(MeshConfig(slices=1, data=1, fsdp=2, expert=2, tensor=2))
    system = make_system(system_config(width=64, heads=8, kv_heads=4, num_experts=8))
    shardings, abstract = system.shardings(mesh)["denoiser"], nnx.to_pure_dict(system.abstract)["denoiser"]
    matrices = 0
    for (path, sharding), leaf in zip(
        jax.tree_util.tree_leaves_with_path(shardings), jax.tree.leaves(abstract), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.split("/")[-1] in ("query", "key", "value", "out", "up", "down", "modulation", "head_modulation"):
            matrices += 1
            copies = 2 if "cross_attention/key" in name or "cross_attention/value" in name else 1
            assert np.prod(sharding.shard_shape(leaf.shape)) * 8 == np.prod(leaf.shape) * copies, name
    assert matrices == 3 * (8 + 2) + 2
