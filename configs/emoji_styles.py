"""EC-DIT on emoji in nine styles, a tenth of them held out (docs/emoji_styles.md), for two CPU cores.

    python -m ecdit.fetch_emoji_styles                                                     # once, by npm
    python -m ecdit.train --config=configs/emoji_styles.py --workdir=runs/styles           # :32px
    python -m ecdit.train --config=configs/emoji_styles.py:64px --workdir=runs/styles_64   # as many tokens, larger ones

All other fields are those of `small_recipe` in `ecdit/recipe.py`.
"""

from ml_collections import ConfigDict

from ecdit.errors import UserError
from ecdit.recipe import small_recipe

SIZES = {
    # side, patch: 64 tokens
    "32px": (32, 4),
    "64px": (64, 8),
}


def get_config(size: str = "32px") -> ConfigDict:
    if size not in SIZES:
        raise UserError(f"configs/emoji_styles.py:{size}: the argument must be one of {', '.join(SIZES)}")
    side, patch = SIZES[size]
    config = small_recipe(image_size=side)
    config.model.patch_size = patch

    data = config.data
    data.task = "emoji_styles"
    data.directory = "data" if side == 32 else f"data_{size}"
    data.caption_length = 28
    data.vocab_size = 2048
    data.prepare.image_format = "png"
    data.prepare.held_out = 0.1  # of the pairs; each name and each style keeps one to train on
    config.text.vocab_size = 2048

    optimizer = config.optimizer  # its values: docs/emoji_styles.md
    optimizer.learning_rate = 2e-4
    optimizer.warmup_steps = 300
    optimizer.schedule = "warmup_stable_decay"
    optimizer.decay_begin = 4000
    optimizer.decay_steps = 800

    train = config.train
    train.num_steps = 4800
    train.ema_decay = 0.998
    train.images_every = 1000

    config.sampling.original_size = 128  # pixels of the drawings before they were made small
    return config
