"""EC-DIT on your own images with a public text encoder and a public autoencoder (docs/weights.md).

    python -m ecdit.prepare --config=configs/public_towers.py:64px                    # records and tokens
    python -m ecdit.prepare --config=configs/public_towers.py:64px --what=latents     # what the autoencoder encodes
    python -m ecdit.train --config=configs/public_towers.py:64px --workdir=runs/64px
    python -m ecdit.sample --workdir=runs/64px --prompt="a red fox in the snow" --out=fox

`:64px` is a smoke run for one machine, `:256px` is the paper's XL with 32 experts. `-t5` behind the size takes T5 v1.1
XXL in place of CLIP-L, `-sdxl` SDXL's autoencoder in place of SD's: `:256px-t5-sdxl`. T5 v1.1 XXL takes 82 % of the
FLOPs of a forward pass; `text.encode = "prepared"` and `data.text_states` spare a step that work (docs/weights.md).

The images are those of the task `mine` in `my_tasks.py` (docs/data.md). Into `weights/` belong

    hf download openai/clip-vit-large-patch14 config.json model.safetensors vocab.json merges.txt \
        tokenizer_config.json special_tokens_map.json --local-dir weights/clip-l
    hf download stabilityai/sd-vae-ft-mse config.json diffusion_pytorch_model.safetensors --local-dir weights/sd-vae

and for `-t5` and `-sdxl`

    hf download stabilityai/stable-diffusion-3-medium-diffusers --include "text_encoder_3/config.json" \
        "text_encoder_3/model-*" "text_encoder_3/model.safetensors.index.json" "tokenizer_3/*" --local-dir weights/sd3
    hf download stabilityai/sdxl-vae config.json diffusion_pytorch_model.safetensors --local-dir weights/sdxl-vae

All other fields are those of `ecdit/recipe.py`.
"""

from ml_collections import ConfigDict

from ecdit.errors import UserError
from ecdit.recipe import paper_recipe, small_recipe

SIZES = ("64px", "256px")
# text encoder, tokenizer, tokens of a caption
TEXTS = {
    "": ("weights/clip-l", "weights/clip-l", 77),
    "t5": ("weights/sd3/text_encoder_3", "weights/sd3/tokenizer_3", 128),
}
AUTOENCODERS = {"": "sd-vae", "sdxl": "sdxl-vae"}


def get_config(name: str = "64px") -> ConfigDict:
    size, *options = name.split("-")
    if size not in SIZES or len(set(options)) < len(options) or not {*options} <= {"t5", "sdxl"}:
        raise UserError(f"configs/public_towers.py:{name}: the argument must be {'|'.join(SIZES)}[-t5][-sdxl]")
    side = int(size.removesuffix("px"))
    config = small_recipe(image_size=side) if side == 64 else paper_recipe()
    config.model.latent_size = side // 8
    config.model.latent_channels = 4
    if side == 64:
        _set_smoke_run(config)

    text = config.text
    text.weights, config.data.tokenizer, config.data.caption_length = TEXTS["t5" if "t5" in options else ""]
    text.frozen = True
    text.clip_states = "penultimate"  # as SDXL and SD3 take them
    text.clip_projection = True

    autoencoder = AUTOENCODERS["sdxl" if "sdxl" in options else ""]
    config.autoencoder = "vae"
    config.vae.weights = f"weights/{autoencoder}"

    data = config.data
    data.module = "my_tasks.py"
    data.task = "mine"
    data.image_size = side
    data.latent_channels = 4
    data.latents = autoencoder
    data.flip_probability = 0.0  # latents cannot be flipped
    return config


def _set_smoke_run(config: ConfigDict) -> None:
    """Sets what differs from the other small runs: a latent of 8 x 8 pixels, each a token."""
    config.model.patch_size = 1
    config.train.num_steps = 2000
    config.train.ema_decay = 0.995
    config.train.images_every = 500
    config.optimizer.warmup_steps = 100
