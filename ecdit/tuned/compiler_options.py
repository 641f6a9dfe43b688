"""Lists the options of the TPU compiler for the plans of the paper's family (configs/README.md)."""

_ALL = (
    "xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000",  # gathers instead of permutes behind small products
    "xla_enable_async_all_gather=true",
    "xla_tpu_enable_async_all_to_all=true",
    "xla_tpu_enable_async_collective_fusion=true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    "xla_tpu_overlap_compute_collective_tc=true",
    "xla_tpu_use_tc_device_shape_on_sc=true",
    "xla_sc_disable_megacore_partitioning=true",
    "xla_sc_enable_instruction_fusion=false",
    "xla_tpu_enable_sparse_core_collective_offload_all_gather=true",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather=true",  # over two mesh axes
    "xla_tpu_enable_all_gather_offload_tracing=true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=true",
    "xla_tpu_enable_reduce_scatter_offload_tracing=true",
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter=false",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce=true",
    "xla_tpu_sparse_core_all_reduce_offload_min_size_in_bytes=1",
    "xla_tpu_enable_all_reduce_offload_tracing=true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce=false",
)
# By kind of chip, whose options replace those of `all`: see `runtime.TpuOptions`.
TPU_OPTIONS = {
    # They hide all-to-alls behind matrix products, and gather weights and reduce gradients on the SparseCores.
    "all": _ALL,
    # On a v4 collectives on the SparseCores are in each other's way: 3XL-dense takes 0.949 s with all of them there,
    # 0.803 s without gathers, and 0.790 s without reductions too.
    "v4": (
        "xla_tpu_enable_sparse_core_collective_offload_all_gather=false",
        "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather=false",
        "xla_tpu_enable_all_gather_offload_tracing=false",
        "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=false",
        "xla_tpu_enable_reduce_scatter_offload_tracing=false",
    ),
    "v5e": (),
    "v5p": (),
    "v6e": (),
    "tpu7x": (),
}
NO_TPU_OPTIONS = dict.fromkeys(TPU_OPTIONS, ())
