"""Makes small networks, and folders with their weights in the libraries' form."""

import json

import jax
import numpy as np
from safetensors.numpy import save_file

from ecdit.pretrained.autoencoder_kl import AUTOENCODER_LAYOUT, AutoencoderConfig, AutoencoderKL
from ecdit.pretrained.clip_text import CLIP_TEXT_LAYOUT, ClipText, ClipTextConfig
from ecdit.pretrained.layout import tensor_axes
from ecdit.pretrained.t5_encoder import T5_LAYOUT, T5Config, T5Encoder
from tests.models.helpers import Model

CLIP = ClipTextConfig(
    vocab_size=32, width=32, mlp_width=64, layers=3, heads=4, positions=12, projection_width=16, activation="gelu",
    epsilon=1e-5, states="last", dtype="float32",
)  # fmt: skip
CLIP_JSON = {
    "model_type": "clip_text_model", "vocab_size": 32, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 12, "projection_dim": 16,
    "hidden_act": "gelu",
}  # fmt: skip
T5 = T5Config(
    vocab_size=32, width=32, mlp_width=64, layers=3, heads=4, head_width=4, buckets=8, max_distance=16,
    mlp="gated-gelu", epsilon=1e-6, dtype="float32",
)  # fmt: skip
T5_JSON = {
    "model_type": "t5", "vocab_size": 32, "d_model": 32, "d_kv": 4, "d_ff": 64, "num_layers": 3, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
VAE = AutoencoderConfig(
    widths=(4, 8, 8), resnets=1, latent_channels=4, norm_groups=2, quant_convs=True, shift=0.1, scale=0.5,
    posterior="sample", dtype="float32",
)  # fmt: skip
VAE_JSON = {
    "_class_name": "AutoencoderKL", "block_out_channels": [4, 8, 8], "layers_per_block": 1, "norm_num_groups": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
    "latent_channels": 4, "scaling_factor": 0.5, "shift_factor": 0.1,
}  # fmt: skip


def clip(**changes):
    return Model(lambda rngs: ClipText(CLIP, CLIP.positions, rngs))


def t5(config=T5):
    return Model(lambda rngs: T5Encoder(config, 8, rngs))


def vae(config=VAE):
    return Model(lambda rngs: AutoencoderKL(config, rngs))


NETWORKS = {
    "clip": (clip, CLIP_TEXT_LAYOUT, CLIP_JSON),
    "t5": (t5, T5_LAYOUT, T5_JSON),
    "vae": (vae, AUTOENCODER_LAYOUT, VAE_JSON),
}


def tensors(model, layout):
    """The tensors of a model's parameters, by the names that the libraries give them."""
    found = {}
    for path, value in jax.tree_util.tree_flatten_with_path(model.params)[0]:
        path = [key.key for key in path]
        name = layout.tensor_name(path)
        for layer, part in enumerate(value if "{layer}" in name else [value]):
            axes = tensor_axes(path, part.ndim)
            part = part.transpose([axes.index(axis) for axis in range(part.ndim)])
            found[name.format(layer=layer)] = np.ascontiguousarray(part)
    return found


def write_folder(folder, weights, config, files=1):
    """Writes weights and a config.json; several files get an index."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if files == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    names = sorted(weights)
    index = {name: f"model-{n % files + 1:05}-of-{files:05}.safetensors" for n, name in enumerate(names)}
    for file in set(index.values()):
        save_file({name: weights[name] for name in names if index[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder
