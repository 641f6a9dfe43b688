"""Tests the time that plans assume for attention's kernels against their schedules by the TPU compiler."""

import re
import subprocess
import sys
import textwrap

import pytest

from ecdit.chips import chip_named
from ecdit.planning.estimate import KERNEL_SHARE, KERNEL_SHARES
from tests.runs import ROOT

CORES = 2  # of a v5p, which share a kernel's grid
PROGRAM = textwrap.dedent("""
    import sys
    import jax, jax.numpy as jnp
    from ecdit.tuned import fused_attention as fused
    from ecdit.planning.compiler import find_target, target_devices, use_compiler

    use_compiler()
    heads, kv_heads, tokens = map(int, sys.argv[1:])
    device = jax.sharding.SingleDeviceSharding(target_devices(find_target("v5p:2x2x1"))[0])
    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=device)
    attended = tokens if heads > kv_heads else 128
    query, key = array(32, heads, 64, tokens), array(32, kv_heads, 64, attended)
    turn = (array(32, 32, tokens, dtype=jnp.float32),) * 2 if heads > kv_heads else None
    bias = None if turn else array(32, 1, 128, dtype=jnp.float32)
    inputs = query, key, key, (array(64, 1, dtype=jnp.float32),) * 2, turn, bias
    for kernel, arguments in ((fused.forward_kernel, inputs), (fused.backward_kernel, (*inputs, query))):
        jax.jit(lambda *x: kernel(*x)).lower(*arguments).compile()
    chunk = fused.chunk_heads(query, key)
    step = array(1, chunk * heads // kv_heads, 64, tokens), array(1, chunk, 64, attended)
    print(32 * kv_heads // fused.heads_together(*step))
""")


PACKED = textwrap.dedent("""
    import re, sys
    import jax, jax.numpy as jnp
    from ecdit.planning.compiler import find_target, target_devices, use_compiler
    from ecdit.planning.hlo import parse
    from ecdit.tuned import packed_attention as packed

    use_compiler()
    heads, tokens = map(int, sys.argv[1:])
    device = jax.sharding.SingleDeviceSharding(target_devices(find_target("v5p:2x2x1"))[0])
    head = jax.ShapeDtypeStruct((26, heads, 64, tokens), jnp.bfloat16, sharding=device)
    positions = jax.ShapeDtypeStruct((26, tokens), jnp.int32, sharding=device)
    module = parse(jax.jit(packed.packed_attention).lower(head, head, head, positions).compile().as_text())
    (flops,) = [one.kernel_flops for one in module.computations[module.entry] if one.kernel_flops]
    print(int(flops), 26 * heads // packed._largest_divisor(packed.step_heads(head), packed.HEADS_TOGETHER))
""")


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tokens", "slack"),
    [
        (48, 12, 128, 1.3),
        pytest.param(48, 48, 128, 1.3, marks=pytest.mark.slow),
        pytest.param(18, 6, 128, 1.3, marks=pytest.mark.slow),
        (18, 18, 128, 1.3),
        (48, 12, 256, 2.5),
        pytest.param(48, 48, 256, 1.6, marks=pytest.mark.slow),
    ],
)
def test_attention_is_priced_no_lower_than_its_schedules(tmp_path, cpu_env, heads, kv_heads, tokens, slack):
    """Of M and XL, as if all of a kernel were run for each of its loop's iterations; twice as dear on all tokens."""
    chip, (iterations,) = chip_named("v5p"), compiled(PROGRAM, (heads, kv_heads, tokens), tmp_path, cpu_env)
    for kernel, products in (("forward", 2), ("backward", 5)):
        bundles = scheduled_bundles(tmp_path, f"{kernel}_attention")
        flops = 2 * products * 32 * heads * tokens * (tokens if heads > kv_heads else 128) * 64
        priced = flops / (KERNEL_SHARE * chip.peak_flops)
        scheduled = iterations * bundles / CORES / chip.clock
        assert scheduled <= priced <= slack * scheduled, kernel


@pytest.mark.parametrize(
    ("heads", "tokens", "slack"),
    [
        (20, 128, 1.3),
        pytest.param(12, 77, 1.5, marks=pytest.mark.slow),
        pytest.param(16, 128, 1.5, marks=pytest.mark.slow),
    ],
)
def test_attention_of_packed_captions_is_priced_no_lower_than_its_schedule(tmp_path, cpu_env, heads, tokens, slack):
    """Of XL's tower, of CLIP-L and of CLIP-H, as if all of the kernel were run for each of its loop's iterations."""
    chip, (flops, iterations) = chip_named("v5p"), compiled(PACKED, (heads, tokens), tmp_path, cpu_env)
    priced = flops / (KERNEL_SHARES["packed_attention"] * chip.peak_flops)
    scheduled = iterations * scheduled_bundles(tmp_path, "packed_attention") / CORES / chip.clock
    assert scheduled <= priced <= slack * scheduled


def compiled(program, arguments, folder, cpu_env):
    """Runs a program that compiles kernels and keeps their schedules in a folder; returns the numbers it prints."""
    dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    environment = cpu_env() | {"LIBTPU_INIT_ARGS": dump, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return tuple(map(int, run.stdout.split()))


def scheduled_bundles(folder, kernel):
    """Returns the instruction bundles of a kernel's schedule."""
    (schedule,) = folder.glob(f"*{kernel}*schedule-analysis_final_bundles.txt")
    return int(re.search(r"total scheduled bundles:\s+(\d+)", schedule.read_text()).group(1))
