"""Tests the compiler options of a process."""

from types import SimpleNamespace

import numpy as np
import pytest

from ecdit.config import ConfigError, build
from ecdit.runtime import RuntimeConfig, TpuOptions, compiler_options
from ecdit.tuned.compiler_options import NO_TPU_OPTIONS

FUSED = "xla_tpu_enable_async_collective_fusion_fuse_all_gather"


def options(*chosen, platform="tpu", kind="TPU v5", **of_chips):
    config = RuntimeConfig((), TpuOptions(**NO_TPU_OPTIONS | {"all": chosen} | of_chips), False, "", False, 100)
    device = SimpleNamespace(platform=platform, device_kind=kind)
    return compiler_options(config, SimpleNamespace(devices=np.array([device])))


def test_options_go_to_the_compiler_for_tpus_alone():
    assert options("xla_a=1", "xla_b=x=y") == {"xla_a": "1", "xla_b": "x=y"}
    assert options() is None
    assert options("xla_a=1", platform="cpu", kind="cpu") is None


def test_an_option_that_may_give_wrong_results_is_refused_where_it_may():
    with pytest.raises(ConfigError) as error:
        options("xla_a=1", f"{FUSED}=true")
    assert str(error.value) == (
        f"config.runtime.tpu_options = '{FUSED}=true': may give wrong results on TPU v5: allowed only on TPU v5 lite"
    )
    assert options(f"{FUSED}=true", kind="TPU v5 lite") == {FUSED: "true"}
    assert options(f"{FUSED}=false") == {FUSED: "false"}


def test_the_options_of_a_chip_replace_those_of_all():
    of_chips = {"v4": ("xla_b=3", "xla_c=4"), "v5p": ("xla_d=5",)}
    assert options("xla_a=1", "xla_b=2", kind="TPU v4", **of_chips) == {"xla_a": "1", "xla_b": "3", "xla_c": "4"}
    assert options("xla_a=1", kind="TPU v5", **of_chips) == {"xla_a": "1", "xla_d": "5"}
    assert options("xla_a=1", kind="TPU v9", **of_chips) == {"xla_a": "1"}
    assert options(kind="TPU v6 lite", **of_chips) is None


def test_an_option_that_is_none_is_refused():
    with pytest.raises(ConfigError, match=r"config.v4 = 'a=1': each option must be xla_...=value"):
        options(v4=("a=1",))


def test_the_paper_s_configs_have_no_unsafe_option():
    from tests.runs import config_file

    chosen = build(TpuOptions, config_file("ec_dit").get_config("M-64E").runtime.tpu_options)
    for kind in ("TPU v4", "TPU v5", "TPU v6 lite", "TPU7x"):
        of_chips = {"v4": chosen.v4}
        assert options(*chosen.all, kind=kind, **of_chips)
