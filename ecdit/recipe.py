"""The paper's recipe as a config: every field, with what it means and where its value comes from.

A config file takes it and changes what is its own: `configs/ec_dit.py` the sizes, `configs/emoji.py` what is small.
The values are those of XL with 32 experts.

Marks of certainty: [P] the paper (arXiv 2410.02098), [N] notes of it by a third party, [S] sister papers on the same
base model (arXiv 2412.07730, 2503.10618), [A] arithmetic or inference, [?] unknown there, chosen here.
"""

from ml_collections import ConfigDict

from ecdit.tuned.compiler_options import TPU_OPTIONS


def paper_recipe() -> ConfigDict:
    """Returns a new config of the paper's XL with 32 experts, on latents that the data holds."""
    config = ConfigDict()
    config.seed = 0
    config.denoiser = "ec_dit"  # the paper's, or FILE.py:Class, one of your own (docs/model.md)
    _set_model(config)
    _set_inputs(config)
    _set_training(config)
    _set_machines(config)
    return config


def _set_model(config: ConfigDict) -> None:
    """Sets the denoiser."""
    config.model = model = ConfigDict()
    model.latent_size = 32  # latent pixels along a side: 256 px [P] / 8
    model.latent_channels = 8  # [S]; 4 in the public SD VAE
    model.patch_size = 2  # latent pixels: 256 tokens [P]
    model.width = 1152
    model.depth = 28  # blocks, dense and sparse in turn [P]
    model.extra_blocks = 2  # dense blocks on all tokens, after unmasking [S]
    model.heads = 18  # of 64 [A]
    model.kv_heads = 6  # of self-attention
    model.rope_theta = 1e4  # [?]
    model.attention = "fused"  # plain | fused: by a kernel of its own on TPUs | cudnn: on GPUs
    model.projections = "tokens_last"  # around attention: plain | tokens_last: faster on TPUs, slower on CPUs
    model.absolute_positions = False  # [?]
    model.ffn_multiplier = 4  # hidden width of an FFN and of each expert, in widths [N]
    model.ffn = "expert_choice"  # of the sparse blocks: dense | token_choice | expert_choice [P]
    model.even_ffn_multiplier = 4  # of even blocks where ffn is dense; 8: as many activated FLOPs as experts at f_c 2
    model.num_experts = 32  # 8 to 64 [P]
    model.capacity_factor = 2.0  # f_c [N]
    model.token_choice_dropless = False  # [?]
    model.balance_loss_weight = 0.01  # of token choice [?]
    model.expert_width = 0  # hidden units of an expert; 0: ffn_multiplier widths
    model.num_shared_experts = 0  # work on every token, ungated
    model.router_input = "modulated"  # [A] | decoupled
    model.gate_norm = "none"  # [N] | renormalized: a token's gates sum to route_scale
    model.route_scale = 1.0
    model.router_z_loss = 0.0
    model.router_init_std = 0.006  # [?]
    model.group = "1024"  # tokens that compete in training: eight masked images [N]
    model.sampling_group = "image"  # in sampling: an image must not depend on its neighbours [A]; 512 in the paper [N]
    model.dispatch = "gather"  # gather | one_hot: the same result
    # plain | scattered, halves: for TPUs with mesh.fsdp above 1; halves: with mesh.fsdp = 2 alone. See docs/model.md.
    model.expert_products = "scattered"
    model.moe_output_norm = "expert"  # sandwich [S] | none | expert [?]: compared in docs/emoji.md
    model.mask_ratio = 0.5  # share of tokens dropped in training [P]
    model.block_table = True  # a learned offset of the shared modulation in every block [?]
    model.gate_init = 0.2  # where that offset's gates start [?]
    model.remat = "minimal"  # none | minimal | offload | attention_out | full
    model.scan_unroll = 1  # pairs of blocks in one iteration of the loop over them
    model.dtype = "bfloat16"  # of activations [?]; parameters are float32


def _set_inputs(config: ConfigDict) -> None:
    """Sets text encoder, autoencoder, data and flow."""
    config.text = text = ConfigDict()
    text.vocab_size = 32128  # T5's [P], rows of the embedding
    text.width = 1280  # [S]
    text.layers = 32  # [S]
    text.heads = 20  # [S]
    text.activation = "gelu"  # gelu | quick_gelu
    text.frozen = True  # [S]
    text.remat = "minimal"  # as model.remat
    text.projections = "tokens_last"  # as model.projections
    text.dtype = "bfloat16"  # of activations

    config.autoencoder = "latents"  # the data holds them

    config.data = data = ConfigDict()
    data.task = "random_latents"
    data.directory = "data"  # prepared data goes into <directory>/<task>
    data.source = ""
    data.image_size = 256  # pixels [P]
    data.latent_channels = 8  # [S], as model.latent_channels
    data.caption_length = 128  # tokens with the end of sequence [?]
    data.vocab_size = 32128  # pieces at most
    data.caption_dropout = 0.1  # share of captions replaced by the empty one [S]
    data.flip_probability = 0.0  # latents cannot be flipped
    data.crop_padding = 0  # pixels
    data.num_threads = 16  # of a host
    data.prefetch = 4  # batches

    config.flow = flow = ConfigDict()
    flow.time_mean = 0.0  # times are sigmoid(N(mean, std)) [N, 0 and 1 ?]
    flow.time_std = 1.0
    flow.dropped_token_weight = 0.0  # of the error on dropped tokens [S]


def _set_training(config: ConfigDict) -> None:
    """Sets optimizer, steps, phases and checkpoints."""
    config.optimizer = optimizer = ConfigDict()
    optimizer.name = "rmsprop"  # rmsprop [P] | adamw | adafactor
    optimizer.learning_rate = 1e-4  # [P]
    optimizer.warmup_steps = 20_000  # [P]
    optimizer.clip_norm = 1.0  # [S]
    optimizer.moment_dtype = "float32"  # float32 | bfloat16: half of the moments' memory [?]
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
    train.num_steps = 800_000  # [P]
    train.batch_size = 4096  # images [P]
    train.accumulation = 1  # microbatches of a step
    train.ema_decay = 0.9999  # [S]
    train.max_bad_steps = 5  # skipped steps in a row before the run stops
    train.spike_factor = 0.0  # skip steps whose loss is above so many times its running mean; 0: only if not finite
    train.watchdog_seconds = 1200  # without progress until a process ends with exit code 43; 0 for no watchdog
    train.log_every = 100  # steps between printed lines and TensorBoard's points
    train.images_every = 0  # steps between images; latents alone draw none
    train.profile_start = 20  # the first step of the profile, from 1
    train.profile_steps = 0  # steps to profile; 0 for none
    train.wandb_project = ""  # of Weights & Biases (the extra wandb); "" for none

    # What changes after so many steps: {"after": 750_000, "changes": {"model.mask_ratio": 0.0}}, see docs/configs.md.
    config.phases = ()

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every = 2000  # steps
    checkpoint.keep = 3
    checkpoint.init_from = ""  # a workdir whose EMA weights to start from
    checkpoint.verify = "always"  # always | background | never: compare what is restored with its checksums
    checkpoint.max_failed_saves = 3  # in a row that the run goes on after


def _set_machines(config: ConfigDict) -> None:
    """Sets the mesh, sampling and the process."""
    config.mesh = mesh = ConfigDict()  # sizes; -1 is what the devices leave
    mesh.slices = 1
    mesh.data = 1
    mesh.fsdp = -1
    mesh.expert = 4
    mesh.tensor = 1

    config.sampling = sampling = ConfigDict()
    sampling.solver = "euler"  # euler | heun [?]
    sampling.num_steps = 50  # [?]
    sampling.guidance = ConfigDict()
    sampling.guidance.scale = 7.5  # [S]; 1 is the conditional model
    sampling.guidance.mode = "plain"  # plain | renormalized [S]
    sampling.original_size = 256  # pixels, the micro-condition
    sampling.batch_size = 1024  # images
    sampling.seed = 0
    sampling.num_grid = 36  # images of the grid that training draws

    config.runtime = runtime = ConfigDict()
    runtime.xla_flags = ()
    runtime.tpu_options = TPU_OPTIONS  # of the training step's compilation
    runtime.keep_host_memory = False  # for training on CPU
    runtime.compilation_cache = "~/.cache/ecdit"  # "" for none
    runtime.distributed = True  # a pod; False for one host
    runtime.heartbeat_seconds = 100  # of silence until a process counts as dead and the others end
