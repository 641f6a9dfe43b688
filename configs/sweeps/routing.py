"""Who chooses: nobody, tokens, or experts; and the sizes of the groups in which experts choose.

    python -m launch.sweep --sweep=configs/sweeps/routing.py --workdir=runs/routing

The wider dense point has as many activated FLOPs as two experts a token. Groups are of whole images: of one, and of
four, which are 256 tokens of the emoji model.
"""

CONFIG = "configs/emoji.py"
SERIES = ("config.model.ffn",)


def get_hyper(hyper):
    routing = "config.model.ffn"
    return hyper.chainit(
        [
            hyper.product(
                [hyper.fixed(routing, "dense"), hyper.sweep("config.model.even_ffn_multiplier", [4, 8])],
            ),
            hyper.product(
                [hyper.fixed(routing, "token_choice"), hyper.sweep("config.model.token_choice_dropless", [False, True])]
            ),
            hyper.product([hyper.fixed(routing, "expert_choice"), hyper.sweep("config.model.group", ["image", "256"])]),
        ]
    )
