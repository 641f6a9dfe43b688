import pytest

from ecdit.config import ConfigError
from ecdit.models.config import check_group, check_tuned, group_size
from ecdit.partitioning import MeshConfig, abstract_mesh
from tests.models.helpers import CONFIG, config


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("latent_size", {"latent_size": 0}),
        ("patch_size", {"patch_size": 3}),  # does not divide 8
        ("depth", {"depth": 3}),
        ("depth", {"depth": 0}),
        ("heads", {"heads": 3}),  # does not divide 16
        ("heads", {"heads": 8}),  # heads of 2: no room for two axes of pairs
        ("kv_heads", {"kv_heads": 3}),
        ("num_experts", {"num_experts": 0}),
        ("num_experts", {"num_experts": 1, "capacity_factor": 1.0, "ffn": "token_choice"}),
        ("capacity_factor", {"capacity_factor": 0.0}),
        ("capacity_factor", {"capacity_factor": 4.1}),  # more than every expert on every token
        ("mask_ratio", {"mask_ratio": 1.0}),
        ("mask_ratio", {"mask_ratio": -0.1}),
        ("extra_blocks", {"extra_blocks": 0}),  # with masking
        ("rope_theta", {"rope_theta": 0.0}),
        ("router_init_std", {"router_init_std": -1.0}),
        ("even_ffn_multiplier", {"even_ffn_multiplier": 0}),
        ("expert_width", {"expert_width": -1}),
        ("num_shared_experts", {"num_shared_experts": -1}),
        ("route_scale", {"route_scale": 0.0}),
        ("router_z_loss", {"router_z_loss": -1.0}),
        ("balance_loss_weight", {"balance_loss_weight": -1.0}),
        ("remat", {"remat": "some"}),
        ("scan_unroll", {"scan_unroll": 0}),
        ("group", {"group": "pixels"}),
        ("group", {"group": "0"}),
        ("group", {"group": "12"}),  # neither a multiple nor a divisor of the 8 kept tokens
    ],
)
def test_impossible_values_are_refused_by_name(key, changes):
    with pytest.raises(ConfigError, match=rf"config\.{key} = ") as error:
        config(**changes)
    assert error.value.key == key


def test_sizes_by_hand():
    values = config(latent_size=8, patch_size=2, width=16, heads=4, latent_channels=3, mask_ratio=0.75)
    assert (values.grid, values.num_tokens, values.num_kept, values.head_dim, values.patch_dim) == (4, 16, 4, 4, 12)
    assert config(mask_ratio=0.99).num_kept == 1
    assert config(width=16, ffn_multiplier=2).expert_hidden == 32
    assert config(width=16, ffn_multiplier=2, expert_width=24).expert_hidden == 24


def test_groups_are_an_image_or_a_number_of_tokens():
    assert group_size("image", 256) == 256
    assert group_size("1024", 256) == 1024
    for group in ("image", "4", "8", "16", "1024"):
        check_group("group", group, CONFIG.num_kept)


@pytest.mark.parametrize("fsdp", [1, 4])
def test_halves_of_experts_are_refused_where_they_are_not_on_two_chips(fsdp):
    halves, mesh = config(expert_products="halves"), MeshConfig(slices=1, data=1, fsdp=-1, expert=2, tensor=1)
    with pytest.raises(ConfigError, match=rf'"scattered" or "plain": .* mesh.fsdp = 2, not {fsdp}') as error:
        check_tuned(halves, abstract_mesh(mesh, 2 * fsdp))
    assert (error.value.key, error.value.value) == ("model.expert_products", "halves")
    check_tuned(halves, abstract_mesh(mesh, 4))
    for allowed in (config(expert_products="scattered"), config(expert_products="halves", ffn="dense")):
        check_tuned(allowed, abstract_mesh(mesh, 2 * fsdp))
