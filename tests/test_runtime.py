"""Tests the compiler options of a process, and which failures to join the others restart a run."""

import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ecdit.config import ConfigError, build
from ecdit.errors import OutageError
from ecdit.exit_codes import OUTAGE
from ecdit.runtime import RuntimeConfig, TpuOptions, compiler_options, configure
from ecdit.tuned.compiler_options import NO_TPU_OPTIONS
from tests.runs import ROOT

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


# Joins the hosts of two slices as JAX does on GKE. The name of the first host never resolves, and time passes at once.
JOINS = """
import itertools, socket, time
from jax._src.clusters import cloud_tpu_cluster
from ecdit import runtime
from ecdit.command_line import run_command
from ecdit.tuned.compiler_options import NO_TPU_OPTIONS
cloud_tpu_cluster.running_in_cloud_tpu_vm = True
def unknown(name):
    clock = itertools.count(time.time() + 300)
    time.time = lambda: next(clock)
    raise socket.gaierror(-2, "Name or service not known")
socket.gethostbyname, time.sleep = unknown, lambda seconds: None
def main(argv):
    runtime.configure(runtime.RuntimeConfig((), runtime.TpuOptions(**NO_TPU_OPTIONS), False, "", True, 100))
run_command(main)
"""


def test_a_first_host_whose_name_does_not_exist_yet_is_an_outage_after_which_launchers_restart():
    hosts = {"TPU_WORKER_HOSTNAMES": "slice-1-0", "TPU_WORKER_ID": "0", "MEGASCALE_NUM_SLICES": "2"}
    environment = os.environ | hosts | {"MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "slice-0-0"}
    command = [sys.executable, "-c", JOINS]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    said = "the other processes of the run cannot be reached: Failed to recognize coordinator address slice-0-0"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (OUTAGE, f"error: {said}")


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (RuntimeError("Failed to recognize coordinator address a"), OutageError),
        (jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: no answer"), OutageError),
        (RuntimeError("distributed.initialize should only be called once."), RuntimeError),
        (ValueError("process_id and num_processes must be nonnegative"), ValueError),
    ],
)
def test_only_processes_that_cannot_be_reached_are_an_outage(monkeypatch, raised, expected):
    def initialize(**given):
        raise raised

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(expected) as caught:
        configure(RuntimeConfig((), TpuOptions(**NO_TPU_OPTIONS), False, "", True, 100))
    assert type(caught.value) is expected
