"""The paper's recipe as a config: every field with its meaning, and the source of its value where it matters.

Config files start from it and change some fields; `configs/ec_dit.py` changes the sizes. `configs/emoji.py`,
`configs/emoji_styles.py` and `configs/shapes.py` start from `small_recipe`, for small images on two CPU cores.
The values are those of XL with 32 experts.

Marks of certainty: [P] the paper (arXiv 2410.02098), [N] third-party notes on it, [S] sister papers on the same base
model (arXiv 2412.07730, 2503.10618), [A] arithmetic or inference, [?] not stated there, chosen here.
"""

from typing import Any

from ml_collections import ConfigDict

from ecdit.tuned.compiler_options import NO_TPU_OPTIONS, TPU_OPTIONS


def paper_recipe() -> ConfigDict:
    """Returns a new config of the paper's XL with 32 experts, on latents stored in the data."""
    config = ConfigDict()
    config.seed = 0
    config.denoiser = "ec_dit"  # the paper's denoiser, or FILE.py:Class for your own (docs/model.md)
    _set_model(config)
    _set_inputs(config)
    _set_training(config)
    _set_machines(config)
    return config


def small_recipe(image_size: int) -> ConfigDict:
    """Returns a new config of 2.9 million parameters for small images without an autoencoder, for two CPU cores.

    Config files set the data, the number of steps and related fields.
    """
    config: Any = paper_recipe()  # Any, because ml_collections gives groups of keys no types

    model = config.model
    model.latent_size = image_size  # pixels, because the autoencoder is the identity
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
    model.absolute_positions = True  # in addition to RoPE, with which alone images come out shuffled
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
    text.packed_attention = "plain"
    text.remat = "none"
    text.projections = "plain"
    text.dtype = "float32"

    config.autoencoder = "identity"
    config.vae.dtype = "float32"

    data = config.data
    data.image_size = image_size
    data.latent_channels = 0  # the data holds images
    data.flip_probability = 0.0  # flips would make captions of arrows, flags and "left of" false
    data.num_threads = 1
    data.prefetch = 2

    config.flow.time_mean = 1.5  # favours noisy times, at which the caption matters most
    config.flow.time_std = 1.3  # wide, to include low noise, at which fine detail is drawn

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
    runtime.tpu_options = ConfigDict(NO_TPU_OPTIONS)
    runtime.keep_host_memory = True  # reuses freed memory, because the kernel's fresh pages cost half of a step on CPU
    runtime.distributed = False
    return config


def _set_model(config: ConfigDict) -> None:
    """Sets the denoiser's fields."""
    config.model = model = ConfigDict()
    model.latent_size = 32  # latent pixels along a side: 256 px [P] / 8
    model.latent_channels = 8  # [S]; 4 in the public SD VAE
    model.patch_size = 2  # latent pixels: 256 tokens [P]
    model.width = 1152
    model.depth = 28  # blocks, dense and sparse in turn [P]
    model.extra_blocks = 2  # dense blocks on all tokens, after unmasking [S]
    model.heads = 18  # heads of width 64 [A]
    model.kv_heads = 6  # key-value heads of self-attention
    model.rope_theta = 1e4  # [?]
    model.prediction = "velocity"  # velocity | data: for runs on pixels (docs/model.md)
    model.attention = "fused"  # plain | fused: this project's kernel on TPUs | cudnn: on GPUs
    model.projections = "tokens_last"  # plain | tokens_last: faster on TPUs, slower on CPUs
    model.absolute_positions = False  # [?]
    model.ffn_multiplier = 4  # hidden width of an FFN and of each expert, in widths [N]
    model.ffn = "expert_choice"  # even blocks: dense | token_choice | expert_choice [P]
    model.even_ffn_multiplier = 4  # for even blocks if ffn is dense; 8 has the activated FLOPs of experts at f_c 2
    model.num_experts = 32  # 8 to 64 [P]
    model.capacity_factor = 2.0  # f_c [N]
    model.token_choice_dropless = False  # [?]
    model.balance_loss_weight = 0.01  # only for token choice [?]
    model.expert_width = 0  # hidden units of an expert; 0: ffn_multiplier widths
    model.num_shared_experts = 0  # experts on every token, without gates
    model.router_input = "modulated"  # [A] | decoupled
    model.gate_norm = "none"  # [N] | renormalized: a token's gates sum to route_scale
    model.route_scale = 1.0
    model.router_z_loss = 0.0
    model.router_init_std = 0.006  # [?]
    model.group = "1024"  # tokens that compete for experts in training: eight masked images [N]
    model.sampling_group = "image"  # so that an image does not depend on its neighbours [A]; 512 in the paper [N]
    model.dispatch = "gather"  # gather | one_hot: the same result
    # plain | scattered: for TPUs with mesh.fsdp above 1 | halves: for TPUs with mesh.fsdp = 2. See docs/model.md.
    model.expert_products = "scattered"
    model.moe_output_norm = "expert"  # sandwich [S] | none | expert [?]: compared in docs/emoji.md
    model.mask_ratio = 0.5  # share of tokens dropped in training [P]
    model.block_table = True  # every block adds a learned offset to the shared modulation [?]
    model.gate_init = 0.2  # initial value of that offset's gates [?]
    model.remat = "minimal"  # none | minimal | offload | attention_out | full
    model.scan_unroll = 1  # pairs of blocks in one iteration of the loop over them
    model.dtype = "bfloat16"  # dtype of activations [?]; parameters are float32


def _set_inputs(config: ConfigDict) -> None:
    """Sets the fields of text encoder, autoencoder, data and flow."""
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
    text.packed_length = 0  # tokens of a caption on average where a frozen encoder packs them; 0 pads: docs/weights.md
    text.packed_attention = "fused"  # of packed captions. plain | fused: this project's kernel on TPUs
    text.remat = "minimal"  # as model.remat
    text.projections = "tokens_last"  # as model.projections
    text.dtype = "bfloat16"  # dtype of activations

    config.autoencoder = "latents"  # identity: pixels | latents: the data holds them, and nothing decodes them | vae
    config.vae = vae = ConfigDict()  # of autoencoder "vae", a public AutoencoderKL: docs/weights.md
    vae.weights = ""  # its folder
    vae.encode = "prepared"  # prepared: once, by ecdit.prepare --what=latents | online: in every step
    vae.posterior = "sample"  # sample: draw anew each time | mode: the mean
    vae.dtype = "bfloat16"

    config.data = data = ConfigDict()
    data.module = ""  # a Python file that registers tasks of your own (docs/data.md)
    data.task = "random_latents"  # a placeholder, random numbers: name your own
    data.placeholder_ok = False  # True lets several hosts train on it
    data.directory = "data"  # prepared data goes into <directory>/<task>
    data.image_size = 256  # pixels [P]
    data.prepare = prepare = ConfigDict()
    prepare.image_format = "webp"  # format of stored images: png | webp | jpeg
    prepare.quality = 95  # 1 to 100, for webp (lossless at 100) and jpeg
    prepare.background = "white"  # colour behind transparent images; "" rejects them
    prepare.max_pixels = 100_000_000  # larger images are rejected
    prepare.held_out = 0.001  # share of the keys that training never reads
    prepare.filters = filters = ConfigDict()
    filters.min_side = 0  # px; 0 for no limit, here and below
    filters.max_aspect = 0.0  # longer side over shorter side
    filters.min_caption = 0  # characters
    filters.max_caption = 0
    filters.columns = {}  # inclusive ranges of pairs' columns, such as {"aesthetic": (5.0, 10.0)}
    data.captions = {"caption": 1.0}  # rates at which a row's caption is drawn from these fields
    data.tokenizer = ""  # a SentencePiece .model file, or a public encoder's folder; "" trains one on the captions
    data.second_tokenizer = ""  # the folder of text.second_weights' tokenizer; "" for none
    data.vocab_size = 32128  # pieces at most
    data.caption_length = 128  # tokens with the end of sequence [?]
    data.latent_channels = 8  # [S], as model.latent_channels
    data.latents = ""  # <name> of the column latents-<name> that holds them
    data.text_states = ""  # <name> of the column text-<name> of text.encode "prepared"
    data.caption_dropout = 0.1  # share of captions replaced by the null caption [S]
    data.flip_probability = 0.0  # latents cannot be flipped
    data.crop_padding = 0  # pixels of white before a random crop
    data.num_threads = 16  # threads per host that read records
    data.prefetch = 4  # batches read ahead

    config.flow = flow = ConfigDict()
    flow.time_mean = 0.0  # times are sigmoid(N(mean, std)) [N, 0 and 1 ?]
    flow.time_std = 1.0
    flow.dropped_token_weight = 0.0  # weight of the error on dropped tokens [S]


def _set_training(config: ConfigDict) -> None:
    """Sets the fields of optimizer, training, phases and checkpoints."""
    config.optimizer = optimizer = ConfigDict()
    optimizer.name = "rmsprop"  # rmsprop [P] | adamw | adafactor
    optimizer.learning_rate = 1e-4  # [P]
    optimizer.warmup_steps = 20_000  # [P]
    optimizer.schedule = "constant"  # after warm-up: constant [P] | cosine | warmup_stable_decay: docs/configs.md
    optimizer.decay_begin = 0  # updates before the decay of warmup_stable_decay
    optimizer.decay_steps = 0  # updates that a decay takes
    optimizer.end_factor = 0.0  # rate after it, in learning rates
    optimizer.learning_rate_factors = {}  # of parts: {"denoiser/pairs/even/experts/router": 0.1}
    optimizer.clip_norm = 1.0  # [S]
    optimizer.moment_dtype = "float32"  # float32 | bfloat16: half the memory, for decays up to 0.99 [?]
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
    train.accumulation = 1  # microbatches per step
    train.ema_decay = 0.9999  # [S]
    train.max_bad_steps = 5  # skipped steps in a row before the run stops
    train.spike_factor = 0.0  # skips steps whose loss exceeds its running mean by this factor; 0: only non-finite ones
    train.watchdog_seconds = 1200  # longest wait for a step or its batch before exit code 43; 0 for no watchdog
    train.watchdog = ConfigDict()  # the same for other activities; 0: ten times train.watchdog_seconds
    train.watchdog.start = 0  # joining all processes and finding devices
    train.watchdog.prepare = 0  # preparing data
    train.watchdog.restore = 0  # reading a checkpoint, or drawing parameters
    train.watchdog.compile = 0  # the first steps of a start or a phase
    train.watchdog.save = 0  # waiting for a save
    train.watchdog.draw = 0  # drawing images
    train.slow_host_factor = 1.2  # warns about a host whose steps stay this many times as long as those of others
    train.replay_every = 0  # steps between replays, which detect silent hardware errors; 0 for none
    train.log_every = 100  # steps between printed lines and between points in TensorBoard
    train.images_every = 0  # steps between sample grids; 0: only at the end; stored latents alone draw none
    train.profile_start = 20  # the first step of the profile, from 1
    train.profile_steps = 0  # steps to profile; 0 for none
    train.wandb_project = ""  # project in Weights & Biases (the extra wandb); "" for none

    # Changes after some steps: {"after": 750_000, "changes": {"model.mask_ratio": 0.0}}. See docs/configs.md.
    config.phases = ()

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every = 2000  # steps between checkpoints
    checkpoint.keep = 3  # number of newest checkpoints to keep
    checkpoint.keep_every = 0  # also keeps checkpoints at multiples of this step forever; 0 for none
    checkpoint.init_from = ""  # workdir of a run with whose EMA weights to start
    checkpoint.verify = "always"  # always | background | never: compares restored arrays with their checksums
    checkpoint.max_failed_saves = 3  # failed saves in a row that a run tolerates


def _set_machines(config: ConfigDict) -> None:
    """Sets the fields of mesh, sampling and runtime."""
    config.mesh = mesh = ConfigDict()  # sizes; -1 is all remaining devices
    mesh.slices = 1
    mesh.data = 1
    mesh.fsdp = -1
    mesh.expert = 4
    mesh.tensor = 1

    config.sampling = sampling = ConfigDict()
    sampling.solver = "euler"  # euler | heun | multistep | stochastic_heun [?]: see docs/sampling.md
    sampling.num_steps = 50  # [?]
    sampling.time_shift = 1.0  # above 1: more steps at high noise [?]
    sampling.churn = 0.0  # noise that stochastic_heun adds [?]
    sampling.guidance = ConfigDict()
    sampling.guidance.scale = 7.5  # [S]; 1 is the conditional model
    sampling.guidance.mode = "plain"  # plain | renormalized [S]
    sampling.guidance.interval_low = 0.0  # times from this one on [?]
    sampling.guidance.interval_high = 1.0  # up to this one are guided [?]
    sampling.original_size = 256  # pixels, the micro-condition
    sampling.batch_size = 1024  # images
    sampling.seed = 0
    sampling.num_grid = 36  # images of the grid that training draws

    config.evaluation = evaluation = ConfigDict()  # of the EMA weights while they are trained: docs/watching.md
    evaluation.every = 0  # steps; 0 for never
    evaluation.loss_images = 0  # for the flow loss by time; 0 for none
    evaluation.prompts = ""  # a text file, a prompt a line, drawn with the same noise every time; "" for none
    evaluation.score = "none"  # none | shapes | retrieval
    evaluation.split = "held_out"  # train | held_out: of the loss's images and the score's captions
    evaluation.captions = 50  # of the score; of shapes for each kind

    config.runtime = runtime = ConfigDict()
    runtime.xla_flags = ()
    runtime.tpu_options = ConfigDict(TPU_OPTIONS)  # compiler options of the training step on TPUs, by kind of chip
    runtime.keep_host_memory = False  # for training on CPU
    runtime.compilation_cache = "~/.cache/ecdit"  # "" for none
    runtime.distributed = True  # for a pod; False for one host
    runtime.heartbeat_seconds = 100  # seconds of silence after which a process counts as dead and the others end
