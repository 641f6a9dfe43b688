"""EC-DIT on 1913 emoji and their names, for two CPU cores.

    python -m ecdit.train --config=configs/emoji.py --workdir=runs/emoji              # :quick, 2000 steps
    python -m ecdit.train --config=configs/emoji.py:long --workdir=runs/emoji_long    # :long, three times as many steps

All other fields are those of `small_recipe` in `ecdit/recipe.py`.
"""

from ml_collections import ConfigDict

from ecdit.errors import UserError
from ecdit.recipe import small_recipe

LENGTHS = {
    # steps, warm-up steps, EMA decay, steps between images
    "quick": (2000, 100, 0.995, 500),
    "long": (6000, 300, 0.998, 1000),
}


def get_config(length: str = "quick") -> ConfigDict:
    if length not in LENGTHS:
        raise UserError(f"configs/emoji.py:{length}: the argument must be one of {', '.join(LENGTHS)}")
    config = small_recipe(image_size=32)

    data = config.data
    data.task = "emoji"
    data.caption_length = 16
    data.vocab_size = 2048
    data.prepare.image_format = "png"
    data.prepare.held_out = 0.0  # this run measures memory: it is to have seen every emoji
    config.text.vocab_size = 2048

    train = config.train
    train.num_steps, config.optimizer.warmup_steps, train.ema_decay, train.images_every = LENGTHS[length]

    config.sampling.original_size = 72  # pixels of the images before they were made small
    return config
