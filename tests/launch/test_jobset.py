"""Tests that the JobSet is valid, describes the job, and restarts after the right exit codes."""

import dataclasses
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from ecdit.errors import UserError
from ecdit.runs.checked import refuse_other
from ecdit.topology import GENERATIONS, find_slice
from launch.backends import jobset
from launch.errors import LaunchError
from tests.launch.jobs import HOSTILE, IMAGE, experiment, install, job, placed
from tests.runs import ROOT

OPTIONS = jobset.Options(
    image=IMAGE,
    namespace="default",
    queue="multislice-queue",
    priority="medium",
    service_account="",
    max_restarts=5,
    grace_seconds=300,
    write_rate=0.5e9,
    data="",
    env=(),
)
EVERYTHING = dataclasses.replace(
    OPTIONS,
    data="gs://bucket/data/noise",
    env=("WANDB_MODE=offline", "A=b=c"),
    service_account="trainer",
    secret_env=("WANDB_API_KEY",),
    secret="keys",
)
SCHEMA = next((p / "shared/schemas/jobset-crd.yaml" for p in ROOT.parents if (p / "shared/schemas").is_dir()), None)
XPK = os.environ.get("ECDIT_XPK", "")  # an executable of xpk 1.16.0, in an environment of its own


def manifest(accelerator="v5p-256", slices=1, options=OPTIONS):
    """As the reader of the file gets it."""
    return yaml.safe_load(jobset.text(placed(accelerator, slices), options))


def replicated(found):
    (only,) = found["spec"]["replicatedJobs"]
    return only


def pod(found):
    return replicated(found)["template"]["spec"]["template"]


def container(found):
    (only,) = pod(found)["spec"]["containers"]
    return only


def after(found, code):
    """What a JobSet does when one of its containers ends with `code`: "done", "restart" or "fail"."""
    if code == 0:
        return "done"
    (rule,) = replicated(found)["template"]["spec"]["podFailurePolicy"]["rules"]
    codes = rule["onExitCodes"]
    assert (rule["action"], codes["operator"]) == ("FailJob", "NotIn")
    assert codes["containerName"] == container(found)["name"]
    failed = code not in codes["values"]
    # A rule of the failure policy is for the reason that such a Job fails with; all others restart the JobSet.
    (policy,) = found["spec"]["failurePolicy"]["rules"]
    assert (policy["action"], policy["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    return "fail" if failed else "restart"


def closed(schema):
    """The schema with fields that it does not name refused: Kubernetes drops them silently."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made["additionalProperties"] = False
    return made


@pytest.fixture(scope="module")
def validator():
    jsonschema = pytest.importorskip("jsonschema")
    if SCHEMA is None or not SCHEMA.exists():
        pytest.skip("no shared/schemas/jobset-crd.yaml beside the checkout")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    (version,) = yaml.load(SCHEMA.read_text(), loader)["spec"]["versions"]
    assert version["name"] == "v1alpha2"
    return jsonschema.Draft7Validator(closed(version["schema"]["openAPIV3Schema"]))


MANIFESTS = [("v5p-256", 1), ("v5p-256", 2), ("v4-8", 1), ("v5litepod-16", 2), ("v6e-8", 1), ("v6e-4", 1)]
MANIFESTS += [("tpu7x-8", 1), ("tpu7x-128", 2)]


@pytest.mark.parametrize("options", [OPTIONS, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize(("accelerator", "slices"), MANIFESTS)
def test_it_passes_the_schema_of_the_resource(validator, accelerator, slices, options):
    errors = validator.iter_errors(manifest(accelerator, slices, options))
    assert [error.message for error in errors] == []


def test_the_schema_refuses_what_is_wrong(validator):
    found = manifest()
    found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["hostNetwrk"] = True
    found["spec"]["failurePolicy"]["maxRestarts"] = "five"
    messages = " ".join(error.message for error in validator.iter_errors(found))
    assert "hostNetwrk" in messages
    assert "five" in messages


@pytest.mark.parametrize("options", [OPTIONS, EVERYTHING], ids=["plain", "everything"])
def test_each_of_its_jobs_is_a_valid_job_of_kubernetes(options):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for accelerator, slices in MANIFESTS:
        spec = replicated(manifest(accelerator, slices, options))["template"]["spec"]
        as_job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, "spec": spec}
        kubernetes_validate.validate(as_job, "1.32", strict=True)


@pytest.mark.parametrize("chip", GENERATIONS)
def test_a_slice_is_a_job_and_a_host_a_pod(chip):
    for size in ("2x2", "4x4", "8x8") if GENERATIONS[chip].dimensions == 2 else ("2x2x1", "2x2x4", "4x4x8"):
        where = find_slice(f"{chip}:{size}")
        found = manifest(f"{chip}:{size}", slices := 1 if where.hosts == 1 else 2)
        spec = replicated(found)["template"]["spec"]
        assert replicated(found)["replicas"] == slices
        assert spec["parallelism"] == spec["completions"] == where.hosts
        assert spec["completions"] * container(found)["resources"]["limits"]["google.com/tpu"] == where.chips
        assert pod(found)["spec"]["nodeSelector"] == {
            "cloud.google.com/gke-tpu-accelerator": jobset.ACCELERATORS[chip],
            "cloud.google.com/gke-tpu-topology": size,
        }


def test_it_restarts_on_the_codes_of_preemption_hangs_and_signals_alone():
    """Not after 130, by which a run ends that a person has interrupted."""
    found = manifest()
    assert {code for code in range(256) if after(found, code) == "restart"} == {42, 43, 44, *range(127, 256)} - {130}
    assert {code for code in range(256) if after(found, code) == "done"} == {0}
    assert found["spec"]["failurePolicy"]["maxRestarts"] == 5 > 0
    assert replicated(found)["template"]["spec"]["backoffLimit"] == 0  # a Job whose pod failed is over
    assert pod(found)["spec"]["restartPolicy"] == "Never"
    (rule,) = found["spec"]["failurePolicy"]["rules"]
    assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])


def test_the_command_is_that_of_the_job():
    made = job("v5p-256", checkpoint__every=500)
    found = yaml.safe_load(jobset.text(made, OPTIONS))
    assert container(found)["args"] == ["python", "-m", "ecdit.train", *made.train_flags, made.checked_flag()]


def expanded(text, variables):
    """What Kubernetes makes of a text in command, args or env (its expand.go): $$ is $, $(NAME) a variable's value."""
    made, i = "", 0
    while i < len(text):
        if text[i] != "$" or i + 1 == len(text):
            made, i = made + text[i], i + 1
        elif text[i + 1] == "$":
            made, i = made + "$", i + 2
        elif text[i + 1] == "(" and ")" in text[i:]:
            end = text.index(")", i)
            name = text[i + 2 : end]
            made, i = made + variables.get(name, f"$({name})"), end + 1
        else:
            made, i = made + text[i : i + 2], i + 2
    return made


def test_kubernetes_expands_as_it_says():
    assert expanded("$(A) $$(A) $$$(A) $B $", {"A": "x"}) == "x $(A) $x $B $"


def test_no_value_is_rewritten_by_kubernetes_or_read_as_yaml_or_by_a_shell(tmp_path):
    """The container runs here, with a stand-in for python: each value arrives as it was given."""
    install(
        tmp_path / "bin",
        "python",
        "import json, os, sys; json.dump([sys.argv[1:], dict(os.environ)], open('seen', 'w'))",
    )
    flags = tuple(f"--config.key{i}={value}" for i, value in enumerate(HOSTILE))
    env = tuple(f"V{i}={value}" for i, value in enumerate(HOSTILE))
    made = dataclasses.replace(placed("v5p-256"), train_flags=(*flags, *HOSTILE))
    found = container(yaml.safe_load(jobset.text(made, dataclasses.replace(OPTIONS, env=env))))
    variables = {}
    for variable in found["env"]:
        variables[variable["name"]] = expanded(variable["value"], {"HOME": "WRONG"} | variables)
    command = [expanded(word, {"HOME": "WRONG"} | variables) for word in [*found["command"], *found["args"]]]
    # The test may not raise its limit of locked memory.
    assert command[2].startswith("ulimit -l unlimited && ")
    command[2] = command[2].removeprefix("ulimit -l unlimited && ")
    place = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "LC_ALL": "C.UTF-8"}
    subprocess.run(command, cwd=tmp_path, env=variables | place, check=True, timeout=120)
    arguments, seen = json.loads((tmp_path / "seen").read_text())
    assert arguments[2:-1] == [*flags, *HOSTILE]
    assert [seen[f"V{i}"] for i in range(len(HOSTILE))] == HOSTILE
    assert not (tmp_path / "hacked").exists()


def test_a_secret_is_named_and_stands_nowhere():
    found = container(manifest(options=EVERYTHING))
    (secret,) = (variable for variable in found["env"] if "value" not in variable)
    assert secret == {"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "WANDB_API_KEY"}}}
    for key in ("WANDB_API_KEY", "HF_TOKEN", "a_secret", "DB_PASSWORD"):
        with pytest.raises(LaunchError, match=f"--env={key}=...: looks like a secret") as caught:
            manifest(options=dataclasses.replace(OPTIONS, env=(f"{key}=sesame",)))
        assert "sesame" not in str(caught.value)
    with pytest.raises(LaunchError) as caught:
        manifest(options=dataclasses.replace(OPTIONS, secret_env=("WANDB_API_KEY=sesame",)))
    assert "sesame" not in str(caught.value)
    with pytest.raises(LaunchError, match="--secret is missing"):
        manifest(options=dataclasses.replace(EVERYTHING, secret=""))


def test_a_container_has_the_rights_that_the_chips_need_and_no_more():
    """Of capabilities the one that raises the limit of locked memory; the host's network for several slices alone."""
    found = container(manifest())
    assert found["securityContext"] == {
        "privileged": False,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"], "add": ["SYS_RESOURCE"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    older = container(manifest(options=dataclasses.replace(OPTIONS, privileged=True)))
    assert older["securityContext"] == {"privileged": True}
    assert "hostNetwork" not in pod(manifest())["spec"]
    assert pod(manifest(slices=2))["spec"]["hostNetwork"] is True


def test_an_image_without_a_digest_is_refused_unless_told():
    tagged = dataclasses.replace(OPTIONS, image="repository/ecdit:1")
    with pytest.raises(LaunchError, match="must end with @sha256:DIGEST"):
        manifest(options=tagged)
    assert container(manifest(options=dataclasses.replace(tagged, unpinned_image=True)))["image"] == tagged.image


def test_prepared_data_is_mounted_from_its_bucket():
    found = manifest(options=EVERYTHING)
    assert pod(found)["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    (volume,) = (volume for volume in pod(found)["spec"]["volumes"] if "csi" in volume)
    attributes = volume["csi"]["volumeAttributes"]
    assert volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
    assert attributes["bucketName"] == "bucket"
    options = attributes["mountOptions"].split(",")
    assert "only-dir=data/noise" in options
    assert {"implicit-dirs", "read_ahead_kb=64", "metadata-cache:ttl-secs:-1"} < set(options)
    (mount,) = (mount for mount in container(found)["volumeMounts"] if mount["name"] == volume["name"])
    assert f"--config.data.directory={mount['mountPath']}" in container(found)["args"]
    assert pod(manifest())["metadata"]["annotations"] == {}


def test_mounted_data_is_part_of_what_the_trainer_compares():
    """The flag that the backend adds, with what it does to the config that was checked."""
    found = container(manifest(options=EVERYTHING))
    values, there = found["args"], experiment("XL-32E", data__directory="/data")
    (checked,) = (word for word in values if word.startswith("--checked="))
    refuse_other(checked.removeprefix("--checked="), there)
    with pytest.raises(UserError, match=r"config\.data\.directory: checked '/data', here "):
        refuse_other(checked.removeprefix("--checked="), experiment("XL-32E"))


def test_every_mount_has_its_volume_and_shared_memory_is_one():
    found = manifest(options=EVERYTHING)
    volumes = {volume["name"]: volume for volume in pod(found)["spec"]["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container(found)["volumeMounts"]}
    assert set(mounts.values()) == set(volumes)
    assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory"}


def test_the_environment_is_what_was_asked_for_on_top_of_the_fixed():
    variables = container(manifest(options=dataclasses.replace(EVERYTHING, secret_env=())))["env"]
    given = {variable["name"]: variable["value"] for variable in variables}
    assert given == {"JAX_PLATFORMS": "tpu,cpu", "PYTHONUNBUFFERED": "1", "WANDB_MODE": "offline", "A": "b=c"}


def test_the_grace_period_is_as_long_as_a_checkpoint_takes():
    made, unset = job("v5p-256", model="M-64E"), dataclasses.replace(OPTIONS, grace_seconds=0)
    writing = made.checkpoint_bytes / 32 / 0.5e9
    assert jobset.grace_seconds(made, unset) - writing == pytest.approx(jobset.SETTLE_SECONDS, abs=1)
    assert jobset.grace_seconds(job("v5p-256"), unset) == jobset.MIN_GRACE_SECONDS
    faster = dataclasses.replace(unset, write_rate=5e9)
    assert jobset.grace_seconds(made, faster) < jobset.grace_seconds(made, unset)


def test_a_grace_period_that_is_too_short_is_refused_with_what_it_takes():
    short = dataclasses.replace(OPTIONS, grace_seconds=30)
    says = "--grace-seconds=30: must be 156 or more: a host's 47.8 GB of a checkpoint at 0.5 GB/s"
    with pytest.raises(LaunchError, match=re.escape(says)):
        jobset.manifest(job("v5p-256", model="M-64E"), short)


@pytest.mark.parametrize(
    ("accelerator", "slices", "changes", "says"),
    [
        ("v4-8", 2, {}, "--slices=2: GKE joins only slices of several hosts, and v4-8 has one"),
        ("v5p-256", 1, {"data": "/mnt/data"}, "--data=/mnt/data: must be gs://BUCKET or gs://BUCKET/PATH"),
        ("v5p-256", 1, {"data": "gs://b/p,uid=0"}, "--data=gs://b/p,uid=0: must have no ','"),
        ("v5p-256", 1, {"data": "gs://b/p\nq"}, "must have no control characters"),
        ("v5p-256", 1, {"env": ("A=b\nc",)}, "must have no control characters"),
        ("v5p-256", 1, {"env": ("NAME",)}, "--env=NAME: must be NAME=VALUE"),
    ],
)
def test_what_gke_would_not_run_is_refused(accelerator, slices, changes, says):
    with pytest.raises(LaunchError, match=re.escape(says)):
        jobset.manifest(placed(accelerator, slices), dataclasses.replace(OPTIONS, **changes))


def test_data_in_two_places_is_refused():
    with pytest.raises(LaunchError, match="must not be given with --data"):
        jobset.manifest(job("v5p-256", data__directory="elsewhere"), EVERYTHING)


def meaning(found):
    """What a cluster does with a JobSet of one container, whatever its names and the order of its lists."""
    spec, template = replicated(found)["template"]["spec"], pod(found)["spec"]
    shared = {mount["mountPath"]: mount["name"] for mount in container(found)["volumeMounts"]}
    volumes = {volume["name"]: volume.get("emptyDir") for volume in template["volumes"]}
    return {
        "kind": (found["apiVersion"], found["kind"]),
        "queue": found["metadata"]["labels"]["kueue.x-k8s.io/queue-name"],
        "annotations": found["metadata"]["annotations"],
        "kept": found["spec"]["ttlSecondsAfterFinished"],
        "restarts": found["spec"]["failurePolicy"]["maxRestarts"],
        "after exit codes": {code: after(found, code) for code in range(256)},
        "hosts": (replicated(found)["replicas"], spec["parallelism"], spec["completions"], spec["backoffLimit"]),
        "nodes": template["nodeSelector"],
        "tolerations": [sorted(toleration.items()) for toleration in template["tolerations"]],
        "network": (template.get("hostNetwork", False), template.get("dnsPolicy", "ClusterFirst")),
        "priority": template["priorityClassName"],
        "pod": (template["restartPolicy"], template["terminationGracePeriodSeconds"]),
        "scheduler": template.get("schedulerName", "default-scheduler"),
        "image": container(found)["image"],
        "chips": container(found)["resources"]["limits"],
        "privileged": container(found)["securityContext"],
        "shared memory": volumes[shared["/dev/shm"]],
    }


def test_two_slices_of_v5p_256_as_stated_by_hand():
    found = meaning(manifest("v5p-256", 2))
    assert found["hosts"] == (2, 32, 32, 0)
    assert found["nodes"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5p-slice"
    assert found["nodes"]["cloud.google.com/gke-tpu-topology"] == "4x4x8"
    assert found["chips"] == {"google.com/tpu": 4}
    assert found["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool",
    }
    assert found["tolerations"] == [[("key", "google.com/tpu"), ("operator", "Exists")]]
    assert found["network"] == (True, "ClusterFirstWithHostNet")
    assert found["kept"] == 12 * 3600


def test_a_slice_of_tpu7x_as_stated_by_hand():
    """64 chips, which GKE counts and JAX sees as 128 devices."""
    found = meaning(manifest("tpu7x-128", 2))
    assert found["hosts"] == (2, 16, 16, 0)
    assert found["nodes"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu7x",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
    }
    assert found["chips"] == {"google.com/tpu": 4}


def xpk_manifest(made, options, out: Path):
    """What xpk would create for the same request; it needs no network for that."""
    flags = {
        "cluster": "c",
        "workload": "w",
        "tpu-type": made.slice.accelerator,
        "num-slices": made.slices,
        "docker-image": options.image,
        "command": "python -m ecdit.train " + " ".join(made.train_flags),
        "max-restarts": options.max_restarts,
        "termination-grace-period-seconds": options.grace_seconds,
        "priority": options.priority,
        "zone": "us-east5-a",
        "project": "p",
        "project-number": 1,
        "output-manifest-file": out,
    }
    command = [XPK, "workload", "create", "--dry-run", "--skip-validation"]
    done = subprocess.run(
        [*command, *(f"--{key}={value}" for key, value in flags.items())],
        env={**os.environ, "HOME": str(out.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return yaml.safe_load(out.read_text())


@pytest.mark.skipif(not XPK, reason="ECDIT_XPK names no xpk (1.16.0, in an environment of its own)")
@pytest.mark.parametrize(
    ("accelerator", "slices"),
    [
        *(("v5p-256", 1), ("v5p-256", 2), ("v4-8", 1), ("v4-512", 1), ("v5litepod-16", 2), ("v6e-8", 1), ("v6e-64", 1)),
        *(("tpu7x-8", 1), ("tpu7x-128", 1), ("tpu7x-128", 2), ("tpu7x-2048", 1)),
    ],
)
def test_it_means_the_same_as_xpk_for_the_same_request_but_for_two_codes_and_fewer_rights(
    tmp_path, accelerator, slices
):
    made = placed(accelerator, slices)
    ours = meaning(yaml.safe_load(jobset.text(made, OPTIONS)))
    theirs_raw = xpk_manifest(made, OPTIONS, tmp_path / "xpk.yaml")
    theirs = meaning(theirs_raw)
    (script,) = (part for part in container(theirs_raw)["command"] if "ecdit.train" in part)
    assert "python -m ecdit.train " + " ".join(made.train_flags) in script
    for code in (43, 44):
        assert (ours["after exit codes"].pop(code), theirs["after exit codes"].pop(code)) == ("restart", "fail")
    assert theirs.pop("privileged") == {"privileged": True}
    assert ours.pop("privileged")["privileged"] is False
    network = (True, "ClusterFirstWithHostNet")
    assert theirs.pop("network") == network
    assert ours.pop("network") == (network if slices > 1 else (False, "ClusterFirst"))
    # A pool of several hosts of TPU7x has a workload policy. xpk makes one of this name; other pools have others.
    policy = theirs["nodes"].pop("cloud.google.com/placement-policy-name", None)
    named = accelerator.startswith("tpu7x") and made.slice.hosts > 1
    assert policy == (f"{accelerator}-{made.slice.topology}-placement-policy" if named else None)
    assert ours == theirs
