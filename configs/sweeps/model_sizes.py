"""Three sizes of the emoji model, each dense, with tokens that choose experts, and with experts that choose tokens.

    python -m launch.sweep --sweep=configs/sweeps/model_sizes.py --workdir=runs/sizes
    python -m launch.sweep --sweep=configs/sweeps/model_sizes.py --workdir=runs/sizes --collect  # table and plots

The text tower stays as it is. At a width, two experts a token have up to a quarter more activated FLOPs than the dense
model: the plots are against FLOPs and parameters, not against width.
"""

CONFIG = "configs/emoji.py"
SERIES = ("config.model.ffn",)
# Heads of 32 wide, as in the config.
SIZES = {"config.model.width": [32, 64, 128], "config.model.heads": [1, 2, 4], "config.model.kv_heads": [1, 1, 2]}


def get_hyper(hyper):
    return hyper.product(
        [
            hyper.fixed("config.train.num_steps", 300),
            hyper.fixed("config.train.images_every", 0),
            hyper.zipit([hyper.sweep(key, values) for key, values in SIZES.items()]),
            hyper.sweep("config.model.ffn", ["dense", "token_choice", "expert_choice"]),
        ]
    )
