"""The paper's family: `configs/ec_dit.py:SIZE-FFN`, SIZE one of XL, XXL, 3XL, M.

    configs/ec_dit.py:XL-dense                 the dense baseline
    configs/ec_dit.py:M-64E                    8E, 16E, 32E or 64E: so many experts, which choose their tokens
    configs/ec_dit.py:XXL-16E-token_choice     tokens choose experts (GShard)

    python -m ecdit.plan --config=configs/ec_dit.py:M-64E        # counts parameters and FLOPs

The data task is a stand-in, noise under random words: a task of your own (docs/data.md) takes its place.

Marks of certainty: [P] the paper (arXiv 2410.02098), [N] notes of it by a third party, [S] sister papers on the same
base model (arXiv 2412.07730, 2503.10618), [A] arithmetic or inference, [?] unknown there, chosen here.
"""

from ml_collections import ConfigDict

from ecdit.errors import UserError

SIZES = {
    # width, blocks of dense models, blocks of those with experts, heads, key-value heads: Table 1 [N]
    "XL": (1152, 28, 28, 18, 6),
    "XXL": (1536, 38, 38, 24, 6),
    "3XL": (2304, 42, 42, 36, 6),
    "M": (3072, 46, 38, 48, 12),
}
# Chips over which experts lie, or a dense model's weights: powers of two that leave shards of whole tiles (16 rows):
# 1152 / 4, 1536 / 16, 2304 / 16, 3072 / 64. Experts are sharded over all other chips too.
EXPERT_CHIPS = {"XL": 4, "XXL": 16, "3XL": 16, "M": 64}
# What `ecdit.plan --table` plans: each size on the slice that it is meant for, and with 32 GB a chip.
SLICES = {"XL": "v5p:4x4x4", "XXL": "v5p:4x4x4", "3XL": "v5p:4x4x8", "M": "v5p:4x4x8"}
# With mesh.expert = 16 XL is faster wherever there are 16 chips; 4 goes on every slice.
WIDE = {"mesh.expert": 16}
PLANS = (
    ("M-64E", SLICES["M"]),
    *((f"{size}-dense", SLICES[size]) for size in ("XL", "XXL", "3XL")),
    *((f"XL-{kind}", SLICES["XL"], WIDE) for kind in ("32E", "16E", "64E")),
    *((f"{size}-32E", SLICES[size]) for size in ("XL", "XXL", "3XL")),
    ("M-64E", "v4:4x4x8", {"model.remat": "attention_out"}),
    *((f"{size}-64E", SLICES[size]) for size in ("XXL", "3XL")),
    ("M-dense", SLICES["M"]),
    ("XL-64E", "v4:4x4x8", WIDE),
    *((f"{size}-64E", "v4:4x4x8") for size in ("XXL", "3XL")),
    *((f"{size}-dense", "v4:4x4x8") for size in ("XL", "XXL", "3XL")),
    ("M-dense", "v4:4x4x8"),
)
EXPERTS = {"8E": 8, "16E": 16, "32E": 32, "64E": 64}  # [P]
# Exchanges of tokens go on behind matrix products, gathers of weights and reductions of gradients on the SparseCores
# (see configs/README.md).
TPU_OPTIONS = (
    "xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000",  # gathers, not rings of permutes behind small products
    "xla_enable_async_all_gather=true",
    "xla_tpu_enable_async_all_to_all=true",
    "xla_tpu_enable_async_collective_fusion=true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    "xla_tpu_overlap_compute_collective_tc=true",
    "xla_tpu_use_tc_device_shape_on_sc=true",
    "xla_sc_disable_megacore_partitioning=true",
    "xla_sc_enable_instruction_fusion=false",
    "xla_tpu_enable_sparse_core_collective_offload_all_gather=true",
    "xla_tpu_enable_all_gather_offload_tracing=true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=true",
    "xla_tpu_enable_reduce_scatter_offload_tracing=true",
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter=false",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce=true",
    "xla_tpu_sparse_core_all_reduce_offload_min_size_in_bytes=1",
    "xla_tpu_enable_all_reduce_offload_tracing=true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce=false",
)
DENSE, EXPERT_CHOICE, TOKEN_CHOICE = "dense", "expert_choice", "token_choice"


def names() -> list[str]:
    """Every argument that this file takes."""
    routed = [f"{size}-{experts}" for size in SIZES for experts in EXPERTS]
    return [f"{size}-{DENSE}" for size in SIZES] + routed + [f"{name}-{TOKEN_CHOICE}" for name in routed]


def get_config(name: str = "XL-32E") -> ConfigDict:
    if name not in names():
        variants = f"{'|'.join(SIZES)}-{DENSE}|{'|'.join(EXPERTS)}[-{TOKEN_CHOICE}]"
        raise UserError(f"configs/ec_dit.py:{name}: the argument must be {variants}")
    size, kind, *token_choice = name.split("-")
    width, dense_depth, sparse_depth, heads, kv_heads = SIZES[size]
    dense = kind == DENSE
    config = ConfigDict()
    config.seed = 0

    config.denoiser = "ec_dit"  # the paper's, or FILE.py:Class, one of your own (docs/model.md)
    config.model = model = ConfigDict()
    model.latent_size = 32  # latent pixels along a side: 256 px [P] / 8
    model.latent_channels = 8  # [S]; 4 in the public SD VAE
    model.patch_size = 2  # latent pixels: 256 tokens [P]
    model.width = width
    model.depth = dense_depth if dense else sparse_depth
    model.extra_blocks = 2  # dense blocks on all tokens, after unmasking [S]
    model.heads = heads  # of 64 [A]
    model.kv_heads = kv_heads
    model.rope_theta = 1e4  # [?]
    model.attention = "fused"  # plain | fused: by a kernel of its own on TPUs | cudnn: on GPUs
    model.absolute_positions = False  # [?]
    model.ffn_multiplier = 4  # hidden width of an FFN and of each expert, in widths [N]
    model.ffn = DENSE if dense else TOKEN_CHOICE if token_choice else EXPERT_CHOICE
    model.even_ffn_multiplier = 4  # of even blocks where ffn is dense; 8: as many activated FLOPs as experts at f_c 2
    model.num_experts = 8 if dense else EXPERTS[kind]
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
    model.moe_output_norm = "expert"  # sandwich [S] | none | expert [?]: compared in docs/emoji.md
    model.mask_ratio = 0.5  # share of tokens dropped in training [P]
    model.block_table = True  # a learned offset of the shared modulation in every block [?]
    model.gate_init = 0.2  # where that offset's gates start [?]
    model.remat = "minimal"  # none | minimal | offload | attention_out | full
    model.scan_unroll = 1  # pairs of blocks in one iteration of the loop over them
    model.dtype = "bfloat16"  # of activations [?]; parameters are float32

    config.text = text = ConfigDict()
    text.vocab_size = 32128  # T5's [P], rows of the embedding
    text.width = 1280  # [S]
    text.layers = 32  # [S]
    text.heads = 20  # [S]
    text.activation = "gelu"  # gelu | quick_gelu
    text.frozen = True  # [S]
    text.remat = "minimal"  # as model.remat
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
    train.pictures_every = 0  # steps between pictures; latents alone draw none
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

    config.mesh = mesh = ConfigDict()  # sizes; -1 is what the devices leave
    mesh.slices = 1
    mesh.data = -1 if dense else 1
    mesh.fsdp = EXPERT_CHIPS[size] if dense else -1
    mesh.expert = 1 if dense else min(EXPERT_CHIPS[size], model.num_experts)
    mesh.tensor = 1

    config.sampling = sampling = ConfigDict()
    sampling.solver = "euler"  # euler | heun [?]
    sampling.num_steps = 50  # [?]
    sampling.guidance = ConfigDict()
    sampling.guidance.scale = 7.5  # [S]; 1 is the conditional model
    sampling.guidance.mode = "plain"  # plain | renormalized [S]
    sampling.original_size = 256  # pixels, the micro-condition
    sampling.batch_size = 1024  # pictures
    sampling.seed = 0
    sampling.num_grid = 36  # pictures of the grid that training draws

    config.runtime = runtime = ConfigDict()
    runtime.xla_flags = ()
    runtime.tpu_options = TPU_OPTIONS  # of the training step's compilation
    runtime.keep_host_memory = False  # for training on CPU
    runtime.compilation_cache = "~/.cache/ecdit"  # "" for none
    runtime.distributed = True  # a pod; False for one host
    runtime.heartbeat_seconds = 100  # of silence until a process counts as dead and the others end
    return config
