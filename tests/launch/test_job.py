"""Tests the description of a job, and refusals before anything starts."""

import dataclasses
import re
import types

import pytest

from ecdit.config import ConfigError
from ecdit.exit_codes import INTERRUPTED, PREEMPTED
from ecdit.experiment import check_mesh
from ecdit.partitioning import ShardingError, abstract_mesh
from ecdit.planning.counts import count
from ecdit.runs.inputs import inputs_line
from ecdit.topology import GENERATIONS, find_slice, usual_shapes
from launch.check import check_pod
from launch.job import MAX_NAME, RESTART_CODES, LaunchError, check_name, describe, job_name
from tests.launch.jobs import WORKDIR, experiment, job, placed
from tests.runs import ROOT

MESH_OF_TWO = {"slices": 2, "data": 1, "fsdp": 32, "expert": 4, "tensor": 1}


def test_xl_goes_on_every_slice_up_to_512_devices_that_divide_its_512_groups():
    tested = experiment("XL-32E")
    sizes = {
        devices
        for chip, generation in GENERATIONS.items()
        for chips in usual_shapes(chip)
        if 4 <= (devices := chips * generation.devices_per_chip) <= 512 and 512 % devices == 0
    }
    assert sizes == {4, 8, 16, 32, 64, 128, 256, 512}
    for devices in sizes:
        check_mesh(tested, abstract_mesh(tested.mesh, devices))


@pytest.mark.parametrize("accelerator", ["v4-8", "v5p-1024"])
def test_its_parameters_can_be_laid_out_there(accelerator):
    assert job(accelerator).slice == find_slice(accelerator)


@pytest.mark.parametrize(
    ("accelerator", "slices", "says"),
    [
        (
            "v5p-2048",
            1,
            "config.model.group = '1024': must divide a device's tokens per microbatch, 4 images x 128 tokens",
        ),
        (
            "v5p-1024",
            2,
            "config.model.group = '1024': must divide a device's tokens per microbatch, 4 images x 128 tokens",
        ),
        ("v5p-384", 1, "config.train.batch_size = 4096: must be a multiple of 192"),
        ("tpu7x-384", 1, "config.train.batch_size = 4096: must be a multiple of 384"),
        ("v6e-1", 1, "config.mesh = 'slices 1 x data 1 x fsdp -1 x expert 4 x tensor 1': must multiply to the number"),
    ],
)
def test_other_slices_are_refused_with_the_reason(accelerator, slices, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        job(accelerator, slices)


@pytest.mark.parametrize(
    ("overrides", "error", "says"),
    [
        ({"mesh__fsdp": 2}, ConfigError, "must multiply to the number of devices, 128"),
        ({"mesh__expert": 3}, ConfigError, "must multiply to the number of devices, 128"),
        ({"mesh__slices": 2}, ConfigError, "config.mesh.slices = 2: must be the number of slices, 1"),
        ({"train__batch_size": 4000}, ConfigError, "config.train.batch_size = 4000: must be a multiple of 128"),
        ({"sampling__batch_size": 100}, ConfigError, "config.sampling.batch_size = 100: must be a multiple of the 128"),
        ({"mesh__expert": 64}, ShardingError, "of size 32"),
        ({"mesh__tensor": 16}, ConfigError, "config.model.heads = 18: must be a multiple of mesh.tensor, 16"),
    ],
)
def test_values_that_do_not_divide_are_refused(overrides, error, says):
    with pytest.raises(error, match=re.escape(says)):
        job("v5p-256", **overrides)


def test_the_mesh_gets_as_many_slices_as_are_asked_for():
    two = job("v5p-256", 2)
    assert two.mesh == MESH_OF_TWO
    assert two.hosts == 64
    assert "--config.mesh.slices=2" in two.train_flags
    assert "--config.mesh.slices=2" not in job("v5p-256").train_flags


def test_a_mesh_is_of_devices_and_a_host_of_chips():
    """64 chips of TPU7x in 16 hosts are 128 devices, as many as 128 chips of v5p."""
    ironwood = job("tpu7x-128")
    assert ironwood.mesh == job("v5p-256").mesh
    assert ironwood.hosts == 16
    says = "1 x tpu7x-128 (4x4x4), each: chips 64, hosts 16, chips a host 4, devices a host 8"
    assert any(says in line for line in describe(ironwood))


def test_a_mesh_that_was_given_its_slices_keeps_them():
    with pytest.raises(ConfigError, match=re.escape("config.mesh.slices = 1: must be the number of slices, 2")):
        job("v5p-256", 2, mesh__slices=1)
    assert job("v5p-256", 2, mesh__slices=2, mesh__fsdp=32).mesh == MESH_OF_TWO


def test_the_command_is_the_one_that_one_would_type():
    made = job("v5p-256", train__batch_size=8192, checkpoint__every=500)
    assert made.train_flags == (
        "--config=configs/ec_dit.py:XL-32E",
        f"--workdir={WORKDIR}",
        "--config.checkpoint.every=500",
        "--config.train.batch_size=8192",
    )
    assert " ".join(made.train_flags) in describe(made)[1]


def test_a_faster_mesh_that_is_known_is_told():
    (line,) = (line for line in describe(job("v5p-256")) if line.startswith("faster "))
    assert "--config.mesh.expert=16" in line
    assert not [line for line in describe(job("v5p-256", mesh__expert=16)) if line.startswith("faster ")]


def test_the_documents_phases_go_on_xl_32e():
    """All phases are checked against the slice, as `ecdit.plan` and the launcher do."""
    (example,) = re.findall(r"```python\n(config\.phases.*?)```", (ROOT / "docs/configs.md").read_text(), re.DOTALL)
    config = types.SimpleNamespace()
    exec(example, {"config": config})
    phased = experiment("XL-32E", phases=config.phases)
    for accelerator in ("v5p-128", "v5p-256"):
        check_mesh(phased, abstract_mesh(phased.mesh, find_slice(accelerator).devices))
    assert [phase.experiment.data.image_size for phase in phased.resolved_phases()] == [256, 256, 512]


def test_a_checkpoint_has_16_bytes_a_trained_parameter_and_4_a_frozen_one():
    """Parameters, EMA and two moments, float32; a few counters beside them."""
    counts = count(experiment("XL-32E"))
    expected = 16 * counts.denoiser_params + 4 * counts.text_params
    assert 0 <= job("v5p-256").checkpoint_bytes - expected < 100


def test_hosts_share_the_writing():
    one, two = job("v5p-256"), job("v5p-256", 2)
    assert one.save_seconds(1e9) == pytest.approx(one.checkpoint_bytes / 32 / 1e9)
    assert two.save_seconds(1e9) == pytest.approx(one.save_seconds(1e9) / 2)


def test_a_run_has_one_name_and_another_run_another():
    assert job_name("gs://bucket/runs/m-64e") == job_name("gs://bucket/runs/m-64e/")
    assert job_name("gs://bucket/runs/m-64e") != job_name("gs://other/runs/m-64e")
    assert job_name("gs://bucket/runs/m-64e").startswith("m-64e-")


@pytest.mark.parametrize(
    "workdir", ["gs://b/" + "x" * 99, "gs://b/Größe_7", "runs/-", "gs://b/64e", ".", "gs://b/a.B_c"]
)
def test_names_made_of_workdirs_are_legal(workdir):
    assert check_name(job_name(workdir)) == job_name(workdir)
    assert len(job_name(workdir)) <= MAX_NAME


@pytest.mark.parametrize("name", ["", "Upper", "1st", "dash-", "under_score", "x" * (MAX_NAME + 1), "a\n"])
def test_other_names_are_refused(name):
    with pytest.raises(LaunchError, match="must be lower-case"):
        check_name(name)


@pytest.mark.parametrize(
    "workdir", ["runs/m", "/data/m", "s3://bucket/m", "gs://", "gs:///m", "gs://bucket", "gs://bucket/", "file:///m"]
)
def test_a_pod_needs_a_workdir_in_a_bucket(workdir):
    with pytest.raises(LaunchError, match=re.escape(f"--workdir={workdir}: must be gs://BUCKET/PATH")):
        check_pod(dataclasses.replace(job("v5p-256"), workdir=workdir), experiment(), "configs/ec_dit.py:XL-32E")


@pytest.mark.parametrize("path", ["/tmp/mine.py", "../mine.py"])
def test_a_pod_needs_files_that_its_hosts_have(path):
    """A config, or a denoiser of the user's own."""
    made, config = job("v5p-256"), "configs/ec_dit.py:XL-32E"
    with pytest.raises(LaunchError, match=f"--config={path}: must be a path inside the checkout"):
        check_pod(dataclasses.replace(made, files=(path,)), experiment(), f"{path}:x")
    with pytest.raises(LaunchError, match=f"config.denoiser={path}: must be a path inside the checkout"):
        check_pod(dataclasses.replace(made, files=("configs/ec_dit.py", path)), experiment(), config)


@pytest.mark.parametrize("key", ["workdir", "override"])
def test_a_value_with_a_newline_is_refused(key):
    values = {"workdir": "gs://bucket/a\nb"} if key == "workdir" else {"train__wandb_project": "a\nb"}
    with pytest.raises(LaunchError, match="must have no control characters"):
        job("v5p-256", **values)


def test_a_job_has_the_files_that_its_config_names():
    assert job("v5p-256").files == ("configs/ec_dit.py",)


def test_hosts_that_would_not_join_are_refused():
    alone = experiment(runtime__distributed=False)
    with pytest.raises(
        ConfigError, match=re.escape("config.runtime.distributed = False: must be True, or each of 32 hosts")
    ):
        check_pod(job("v5p-256"), alone, "configs/ec_dit.py:XL-32E")
    check_pod(placed("v4-8"), alone, "configs/ec_dit.py:XL-32E")


def test_what_training_ends_with_after_a_save_is_restarted():
    assert PREEMPTED in RESTART_CODES
    assert not {0, 1, 2} & set(RESTART_CODES)


def test_a_run_that_somebody_ended_by_sigint_is_not_restarted():
    """Launchers, Kubernetes and systemd send SIGTERM, whose code is PREEMPTED."""
    assert INTERRUPTED not in RESTART_CODES
    assert {128 + 6, 128 + 9, 128 + 15} <= set(RESTART_CODES)


def test_the_documentation_lists_each_exit_code_once_with_what_follows_it():
    text = (ROOT / "docs/launching.md").read_text()
    follows = {}
    for codes, restarts in re.findall(r"^\| (\d[\d, to]*) \|.*\| (yes|no|) ?\|$", text, re.MULTILINE):
        for first, _, last in (part.partition(" to ") for part in codes.split(", ")):
            for code in range(int(first), int(last or first) + 1):
                assert code not in follows
                follows[code] = restarts
    assert sorted(follows) == list(range(256))
    assert {code for code, restarts in follows.items() if restarts == "yes"} == set(RESTART_CODES)


def test_a_job_says_what_it_trains_on_and_placeholder_data_is_refused_on_several_hosts():
    assert describe(job("v5p-256"))[0] == inputs_line(experiment())
    assert "data: random_latents (PLACEHOLDER, " in describe(job("v5p-256"))[0]
    unsaid = {"data__placeholder_ok": False}
    with pytest.raises(
        ConfigError, match=r"config\.data\.placeholder_ok = False: must be True: 32 hosts would train on"
    ):
        job("v5p-256", **unsaid)
    with pytest.raises(ConfigError, match="64 hosts would train on"):
        job("v5p-256", slices=2, **unsaid)
    assert job("v4-8", **unsaid).hosts == 1
