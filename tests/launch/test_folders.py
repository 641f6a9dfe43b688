"""Tests what a launcher says and brings of the folders that hosts read: weights, tokenizers and prepared data."""

import dataclasses
import importlib.metadata
import re
import shutil

import pytest

from ecdit.data import DataError
from ecdit.pretrained.config_json import WeightsError
from ecdit.topology import find_slice
from launch.backends import jobset, tpu_vm
from launch.check import check_pod, make_job
from launch.job import LaunchError
from tests.launch import test_jobset, test_tpu_vm
from tests.launch.jobs import WORKDIR
from tests.pretrained.towers import write_clip, write_t5
from tests.runs import ROOT, tiny

CONFIG = "configs/emoji.py"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A directory with weights, as a user has them beside the code."""
    pytest.importorskip("tokenizers", reason="needs the extra pretrained")
    place = tmp_path_factory.mktemp("checkout")
    write_clip(place / "weights/clip")
    write_t5(place / "weights/t5")
    return place


@pytest.fixture(autouse=True)
def _there(checkout, monkeypatch):
    monkeypatch.chdir(checkout)


def public(folder="weights/clip", tokenizer="weights/clip", **changes):
    named = {"text__weights": str(folder), "text__frozen": True, "data__tokenizer": str(tokenizer)}
    return tiny(**{**named, "data__caption_length": 12, "data__directory": "prepared", **changes})


def job(experiment):
    return make_job(experiment, {"config": CONFIG, "overrides": {}}, find_slice("v4-8"), 1, WORKDIR)


def test_a_job_brings_the_tokenizers_of_the_checkout_and_names_the_folders_that_hosts_read():
    made = job(public())
    assert made.files == (CONFIG, "weights/clip/vocab.json", "weights/clip/merges.txt")
    read = {"text.weights": "weights/clip", "data.tokenizer": "weights/clip", "data.directory": "prepared"}
    assert made.folders == {key: (path,) for key, path in read.items()}
    script = tpu_vm.script(made, test_tpu_vm.OPTIONS)
    (copied,) = (line for line in script.splitlines() if line.startswith("tar -cf"))
    assert {"weights/clip/vocab.json", "weights/clip/merges.txt", "--dereference"} <= set(copied.split())
    assert "model.safetensors" not in copied


def test_folders_of_every_phase_are_named():
    phases = [{"after": 1, "changes": {"data.directory": "larger"}}]
    assert job(public(phases=phases)).folders["data.directory"] == ("prepared", "larger")


def test_a_tokenizer_that_is_missing_or_does_not_fit_is_refused_at_launch():
    with pytest.raises(DataError, match=r"data\.tokenizer = 'weights/none': must be a \.model file or a folder with"):
        job(public(tokenizer="weights/none"))
    with pytest.raises(WeightsError, match="t5: its tokenizer is T5's, and weights/clip is another encoder"):
        job(public(tokenizer="weights/t5"))


def test_a_pod_gets_no_tokenizer_from_beside_the_checkout(checkout, tmp_path, monkeypatch):
    shutil.copytree(checkout / "weights", tmp_path / "weights")
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    beside = public(tokenizer="../weights/clip", folder="../weights/clip")
    config_there = dataclasses.replace(job(beside), files=job(beside).files[1:])
    with pytest.raises(LaunchError, match=r"config\.data\.tokenizer=\.\./weights/clip/vocab\.json: must be a path in"):
        check_pod(config_there, beside, CONFIG)


@pytest.mark.parametrize(
    ("key", "experiment"),
    [("text.weights", {}), ("data.directory", {"folder": "absolute", "tokenizer": "absolute"})],
)
def test_workers_without_an_image_refuse_folders_that_would_be_missing_there(key, experiment, checkout):
    absolute = checkout / "weights/clip"
    made = job(public(**{name: absolute for name in experiment}))
    path = made.folders[key][0]
    with pytest.raises(LaunchError, match=re.escape(f"config.{key}={path}: would be missing on the workers")):
        tpu_vm.check_folders(made, test_tpu_vm.OPTIONS)
    tpu_vm.check_folders(made, dataclasses.replace(test_tpu_vm.OPTIONS, image=test_jobset.IMAGE))


def test_workers_must_have_what_is_at_absolute_paths_and_the_launcher_says_so(checkout):
    absolute = checkout / "weights/clip"
    made = job(public(folder=absolute, tokenizer=absolute, data__directory="/mnt/data"))
    tpu_vm.check_folders(made, test_tpu_vm.OPTIONS)
    named = f"text.weights {absolute}, data.tokenizer {absolute}, data.directory /mnt/data"
    where = "on every worker, where nothing is mounted or copied to"
    assert tpu_vm.needs(made, test_tpu_vm.OPTIONS) == [f"hosts need  {where}: {named}"]
    assert made.files == (CONFIG,)
    made = job(public(folder=absolute, data__directory="/mnt/data"))
    assert "data.tokenizer" not in tpu_vm.needs(made, test_tpu_vm.OPTIONS)[0]  # it is brought


def test_pods_find_folders_in_the_mounted_bucket_or_the_image(monkeypatch, checkout):
    made = job(public())
    image = "in the image, though launch/Dockerfile copies none"
    named = "text.weights weights/clip, data.tokenizer weights/clip"
    assert jobset.needs(made, test_jobset.OPTIONS) == [f"hosts need  {image}: {named}, data.directory prepared"]
    mounted = dataclasses.replace(test_jobset.OPTIONS, data="gs://bucket/data")
    assert jobset.needs(made, mounted) == [f"hosts need  {image}: {named}"]
    monkeypatch.setattr(jobset, "DATA_MOUNT", str(checkout))
    made = job(public(folder=checkout / "weights/clip"))
    assert jobset.needs(made, mounted) == [
        f"hosts need  in gs://bucket/data, mounted at {checkout}: text.weights {checkout}/weights/clip",
        f"hosts need  {image}: data.tokenizer weights/clip",
    ]


def test_the_mount_takes_the_place_of_the_first_phase_s_data_alone():
    mounted = dataclasses.replace(test_jobset.OPTIONS, data="gs://bucket/data")

    def listed(*directories):
        phases = [{"after": i, "changes": {"data.directory": path}} for i, path in enumerate(directories, 1)]
        return "\n".join(jobset.needs(job(public(phases=phases)), mounted))

    assert "data.directory" not in listed()
    assert listed("larger").endswith(", data.tokenizer weights/clip, data.directory larger")
    assert listed("larger", "prepared").endswith(", data.directory prepared, data.directory larger")
    below = f"{jobset.DATA_MOUNT}/larger"
    place = f"hosts need  in gs://bucket/data, mounted at {jobset.DATA_MOUNT}"
    assert f"{place}: data.directory {below}" in listed(below)


def test_files_that_only_the_image_can_bring_are_named():
    files = ("./configs/emoji.py", "my_config.py", "mine/tasks.py", "weights/clip/vocab.json")
    made = dataclasses.replace(job(public()), files=files)
    line = "hosts need  in the image, at the same paths (see launch/Dockerfile): my_config.py, mine/tasks.py"
    in_image = dataclasses.replace(test_tpu_vm.OPTIONS, image=test_jobset.IMAGE)
    assert jobset.needs(made, test_jobset.OPTIONS)[-1] == line
    assert tpu_vm.needs(made, in_image)[-1] == line
    assert line not in tpu_vm.needs(made, test_tpu_vm.OPTIONS)  # they are copied
    assert line not in jobset.needs(job(public()), test_jobset.OPTIONS)


def test_pods_of_several_slices_do_not_get_the_service_account():
    with_account = dataclasses.replace(test_jobset.OPTIONS, service_account="trainer")
    says = "the bucket for their node pool's account, not for --service-account=trainer"
    made = job(public())
    assert says in jobset.needs(dataclasses.replace(made, slices=2), with_account)[-1]
    assert says not in "\n".join(jobset.needs(made, with_account))


def test_hosts_have_the_packages_of_public_tokenizers():
    """CLIP's tokenizer needs those of the extra."""
    locked = set(re.findall(r"^([a-z0-9-]+)==", (ROOT / "launch/requirements.lock").read_text(), re.MULTILINE))
    wanted = [line for line in importlib.metadata.requires("ecdit") or () if 'extra == "pretrained"' in line]
    assert len(wanted) >= 2
    assert {re.match(r"[a-z0-9-]+", line)[0] for line in wanted} <= locked
