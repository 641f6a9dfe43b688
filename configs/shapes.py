"""EC-DIT on coloured shapes whose captions a judge can check (docs/shapes.md), for two CPU cores.

    python -m ecdit.train --config=configs/shapes.py --workdir=runs/shapes                        # plain ground
    python -m ecdit.train --config=configs/shapes.py:textured --workdir=runs/shapes_textured

Rows are made when they are read, and none comes twice: there is nothing to prepare but the tokenizer. All other fields
are those of `small_recipe` in `ecdit/recipe.py`.
"""

from ml_collections import ConfigDict

from ecdit.errors import UserError
from ecdit.recipe import small_recipe

TASKS = {"plain": "shapes", "textured": "shapes_textured"}


def get_config(ground: str = "plain") -> ConfigDict:
    if ground not in TASKS:
        raise UserError(f"configs/shapes.py:{ground}: the argument must be one of {', '.join(TASKS)}")
    config = small_recipe(image_size=32)

    data = config.data
    data.task = TASKS[ground]
    data.caption_length = 16
    data.vocab_size = 512
    config.text.vocab_size = 512

    config.model.prediction = "data"  # plain colours stay plain: docs/shapes.md
    config.flow.time_std = 1.0  # fewer times at which only fine detail is missing

    optimizer = config.optimizer
    optimizer.learning_rate = 2e-4
    optimizer.warmup_steps = 300
    optimizer.schedule = "cosine"
    optimizer.decay_steps = 4700

    train = config.train
    train.num_steps = 5000
    train.ema_decay = 0.998
    train.images_every = 500
    return config
