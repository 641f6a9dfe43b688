"""The paper's family: `configs/ec_dit.py:SIZE-FFN`, SIZE one of XL, XXL, 3XL, M.

    configs/ec_dit.py:XL-dense                 the dense baseline
    configs/ec_dit.py:M-64E                    8E, 16E, 32E or 64E: so many experts, which choose their tokens
    configs/ec_dit.py:XXL-16E-token_choice     tokens choose experts (GShard)

    python -m ecdit.plan --config=configs/ec_dit.py:M-64E        # counts parameters and FLOPs

The data task is a stand-in, noise under random words: a task of your own (docs/data.md) takes its place. So is the text
tower, random and frozen: name a folder of public weights in text.weights (docs/weights.md), or set
text.frozen_random_ok for a trial.

All fields, their meaning and the marks of certainty [P], [N] and [A] are in `ecdit/recipe.py`.
"""

from ml_collections import ConfigDict

from ecdit.errors import UserError
from ecdit.recipe import paper_recipe

SIZES = {
    # width, blocks of dense models, blocks of those with experts, heads, key-value heads: Table 1 [N]
    "XL": (1152, 28, 28, 18, 6),
    "XXL": (1536, 38, 38, 24, 6),
    "3XL": (2304, 42, 42, 36, 6),
    "M": (3072, 46, 38, 48, 12),
}
# Chips over which experts lie, or a dense model's weights: powers of two that leave shards of whole tiles (16 rows):
# 1152 / 4, 1536 / 16, 2304 / 16, 3072 / 64. Experts are sharded over all other chips too.
EXPERT_CHIPS = {"XL": 4, "XXL": 16, "3XL": 16, "M": 64}
EXPERTS = {"8E": 8, "16E": 16, "32E": 32, "64E": 64}  # [P]
DENSE, EXPERT_CHOICE, TOKEN_CHOICE = "dense", "expert_choice", "token_choice"


def names() -> list[str]:
    """Every argument that this file takes."""
    routed = [f"{size}-{experts}" for size in SIZES for experts in EXPERTS]
    return [f"{size}-{DENSE}" for size in SIZES] + routed + [f"{name}-{TOKEN_CHOICE}" for name in routed]


def get_config(name: str = "XL-32E") -> ConfigDict:
    if name not in names():
        variants = f"{'|'.join(SIZES)}-{DENSE}|{'|'.join(EXPERTS)}[-{TOKEN_CHOICE}]"
        raise UserError(f"configs/ec_dit.py:{name}: the argument must be {variants}")
    size, kind, *token_choice = name.split("-")
    width, dense_depth, sparse_depth, heads, kv_heads = SIZES[size]
    dense = kind == DENSE
    config = paper_recipe()
    config.model.width = width
    config.model.depth = dense_depth if dense else sparse_depth
    config.model.heads = heads
    config.model.kv_heads = kv_heads
    config.model.ffn = DENSE if dense else TOKEN_CHOICE if token_choice else EXPERT_CHOICE
    config.model.num_experts = 8 if dense else EXPERTS[kind]
    # M-64E has mesh.fsdp = 2 on 128 chips; on another slice set --config.model.expert_products=scattered.
    config.model.expert_products = "halves" if (size, kind) == ("M", "64E") else "scattered"
    config.mesh.data = -1 if dense else 1
    config.mesh.fsdp = EXPERT_CHIPS[size] if dense else -1
    config.mesh.expert = 1 if dense else min(EXPERT_CHIPS[size], config.model.num_experts)
    return config
