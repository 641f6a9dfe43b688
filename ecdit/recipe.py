"""The paper's recipe as a config: every field, with what it means and where its value comes from.

A config file takes it and changes what is its own: `configs/ec_dit.py` the sizes. `small_recipe` is the same for small
images on two CPU cores, from which `configs/emoji.py`, `configs/emoji_styles.py` and `configs/shapes.py` begin.
The values are those of XL with 32 experts.

Marks of certainty: [P] the paper (arXiv 2410.02098), [N] notes of it by a third party, [S] sister papers on the same
base model (arXiv 2412.07730, 2503.10618), [A] arithmetic or inference, [?] unknown there, chosen here.
"""

from typing import Any

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


def small_recipe(image_size: int) -> ConfigDict:
    """Returns a new config of 2.9 million parameters for small images without an autoencoder, for two CPU cores.

    The data, the number of steps and what goes with it are a config file's own.
    """
    config: Any = paper_recipe()  # ml_collections types a group of keys as any value

    model = config.model
    model.latent_size = image_size  # pixels here, as the autoencoder is the identity
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
    text.width = 128
    text.layers = 2
    text.heads = 4
    text.frozen = False
    text.remat = "none"
    text.projections = "plain"
    text.dtype = "float32"

    config.autoencoder = "identity"
    config.vae.dtype = "float32"

    data = config.data
    data.image_size = image_size
    data.latent_channels = 0  # the data holds images
    data.flip_probability = 0.0  # arrows, flags and "left of" would lie
    data.num_threads = 1
    data.prefetch = 2

    config.flow.time_mean = 1.5  # noisy times are where the caption decides
    config.flow.time_std = 1.3  # a wide spread, for the fine detail that is drawn at low noise

    train = config.train
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
    sampling.original_size = image_size
    sampling.batch_size = 32

    runtime = config.runtime
    runtime.xla_flags = ("--xla_cpu_enable_fast_math=true",)  # reorders sums; infinities and NaN are still honoured
    runtime.tpu_options = ()
    runtime.keep_host_memory = True  # reuse freed memory: on CPU the kernel's fresh pages cost half of a step
    runtime.distributed = False
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
    text.weights = "random"  # or a folder of CLIP's or T5's public weights, which sets the sizes: docs/weights.md
    text.second_weights = ""  # a folder of an encoder beside that one; "" for none
    text.clip_states = "last"  # last | penultimate: of a folder of CLIP
    text.clip_projection = False  # of CLIP's pooled state
    text.encode = "online"  # online: in every step | prepared: once, by ecdit.prepare --what=text
    text.stored = "bfloat16"  # bfloat16 | int8, of prepared states
    text.frozen_random_ok = False  # True trains on a frozen tower that was drawn at random: for trials alone
    text.vocab_size = 32128  # T5's [P], rows of the embedding
    text.width = 1280  # [S]
    text.layers = 32  # [S]
    text.heads = 20  # [S]
    text.activation = "gelu"  # gelu | quick_gelu
    text.frozen = True  # [S]
    text.remat = "minimal"  # as model.remat
    text.projections = "tokens_last"  # as model.projections
    text.dtype = "bfloat16"  # of activations

    config.autoencoder = "latents"  # identity: pixels | latents: the data holds them, and nothing decodes them | vae
    config.vae = vae = ConfigDict()  # of autoencoder "vae", a public AutoencoderKL: docs/weights.md
    vae.weights = ""  # its folder
    vae.encode = "prepared"  # prepared: once, by ecdit.prepare --what=latents | online: in every step
    vae.posterior = "sample"  # sample: draw anew each time | mode: the mean
    vae.dtype = "bfloat16"

    config.data = data = ConfigDict()
    data.module = ""  # a Python file that registers tasks of your own (docs/data.md)
    data.task = "random_latents"
    data.directory = "data"  # prepared data goes into <directory>/<task>
    data.image_size = 256  # pixels [P]
    data.prepare = prepare = ConfigDict()
    prepare.image_format = "webp"  # png | webp | jpeg, of stored images
    prepare.quality = 95  # 1 to 100, of webp, which is lossless at 100, and of jpeg
    prepare.background = "white"  # what transparent images are put on; "" leaves them out
    prepare.max_pixels = 100_000_000  # an image with more is left out
    prepare.held_out = 0.001  # share of the keys that training never reads
    prepare.filters = filters = ConfigDict()
    filters.min_side = 0  # px; 0 for no limit, here and below
    filters.max_aspect = 0.0  # longer side over shorter side
    filters.min_caption = 0  # characters
    filters.max_caption = 0
    filters.columns = {}  # {"aesthetic": (5.0, 10.0)}: what a pair's own columns must be, ends included
    data.captions = {"caption": 1.0}  # rates at which a row's caption is drawn from these fields
    data.tokenizer = ""  # a SentencePiece .model file, or a public encoder's folder; "" trains one on the captions
    data.second_tokenizer = ""  # the folder of text.second_weights' tokenizer; "" for none
    data.vocab_size = 32128  # pieces at most
    data.caption_length = 128  # tokens with the end of sequence [?]
    data.latent_channels = 8  # [S], as model.latent_channels
    data.latents = ""  # the column latents-<name> that holds them
    data.text_states = ""  # the column text-<name> of text.encode "prepared"
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
    train.watchdog_seconds = 1200  # in a step or waiting for its batch until exit code 43; 0 for no watchdog
    train.watchdog = ConfigDict()  # seconds of other phases; 0: ten times train.watchdog_seconds
    train.watchdog.start = 0  # until all processes have joined and devices are there
    train.watchdog.prepare = 0  # preparing data
    train.watchdog.restore = 0  # reading a checkpoint, or drawing parameters
    train.watchdog.compile = 0  # the first steps of a start or phase
    train.watchdog.save = 0  # waiting for a save
    train.watchdog.draw = 0  # drawing images
    train.slow_host_factor = 1.2  # warn of a host whose steps stay so many times as long as those of the others
    train.replay_every = 0  # steps between replays, which look for silent errors of the hardware; 0 for none
    train.log_every = 100  # steps between printed lines and TensorBoard's points
    train.images_every = 0  # steps between images; latents alone draw none
    train.profile_start = 20  # the first step of the profile, from 1
    train.profile_steps = 0  # steps to profile; 0 for none
    train.wandb_project = ""  # of Weights & Biases (the extra wandb); "" for none

    # What changes after so many steps: {"after": 750_000, "changes": {"model.mask_ratio": 0.0}}, see docs/configs.md.
    config.phases = ()

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every = 2000  # steps
    checkpoint.keep = 3  # the newest ones
    checkpoint.keep_every = 0  # steps; also keep the checkpoints of its multiples, for ever. 0 for none
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
