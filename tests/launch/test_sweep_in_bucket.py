"""Tests sweeps on pods, whose runs are in a bucket: done points get no job, and are collected from there."""

import csv
import io
import json
import os
import sys

import pytest
from PIL import Image

from ecdit.config import to_dict
from ecdit.experiment import make_experiment
from launch.job import job_name
from tests.forking import run_forked
from tests.gcs_server import serving
from tests.launch.jobs import IMAGE, install
from tests.runs import ROOT, emoji_config, run, tiny
from tests.system.test_gcs import SAVE

pytest.importorskip("gcsfs", reason="needs the extra gcs")
SWEEP = """
CONFIG = "configs/emoji.py"
def get_hyper(hyper):
    common = {"config.train.num_steps": 3, "config.runtime.distributed": True, "config.data.directory": "/data"}
    return hyper.product([[common], hyper.sweep("config.model.ffn", ["dense", "token_choice", "expert_choice"])])
"""
DENSE, TOKEN, EXPERT = "ffn-dense", "ffn-token-choice", "ffn-expert-choice"
WORKDIR = "gs://bucket/sizes"
# Stands for kubectl and gcloud: notes what it is told, and says that the TPUs are there.
STAND_IN = """
import os, sys
text = sys.stdin.read() if "kubectl" in sys.argv[0] else ""
with open(os.environ["NOTES"], "a") as file: print(sys.argv, text, file=file)
print("ACTIVE")
"""
BACKENDS = {"jobset": f"--image={IMAGE}", "tpu-vm": "--zone=us-east5-a"}


@pytest.fixture(scope="module")
def bucket():
    """A sweep of which one point is done; another one's last save was killed, and one has not begun."""
    with serving() as (store, environment):
        env = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
        saved = run([sys.executable, "-c", SAVE, f"{WORKDIR}/{DENSE}"], env)
        assert saved.returncode == 0, saved.stderr
        store.put(f"sizes/{TOKEN}/checkpoints/2/commit_success.txt", b"")
        store.put(f"sizes/{TOKEN}/checkpoints/3/state/manifest.ocdbt", b"")
        yield store, env


@pytest.fixture
def sweep(bucket, tmp_path):
    """Runs `launch.sweep`; returns the result and the names of jobs that it created."""
    (tmp_path / "sweep.py").write_text(SWEEP)
    for name in ("kubectl", "gcloud"):
        install(tmp_path / "bin", name, STAND_IN)
    notes = tmp_path / "notes"
    env = {**bucket[1], "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "NOTES": str(notes)}

    def start(*flags):
        notes.write_text("")
        command = [sys.executable, "-m", "launch.sweep", f"--sweep={tmp_path}/sweep.py", f"--workdir={WORKDIR}"]
        result = run_forked([*command, *flags], env)
        return result, [name for name in (DENSE, TOKEN, EXPERT) if job_name(f"{WORKDIR}/{name}") in notes.read_text()]

    return start


def pods(backend):
    return (f"--backend={backend}", BACKENDS[backend], "--accelerator=v5p-8", "--skip-plan")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_point_that_is_done_gets_no_job(sweep, backend):
    result, created = sweep(*pods(backend))
    assert result.returncode == 0, result.stderr
    assert f"done already: {DENSE}\n" in result.stdout
    assert "2 of 2 jobs are started" in result.stdout
    assert created == [TOKEN, EXPERT]


def test_a_run_of_another_config_is_refused_before_any_job(bucket, sweep):
    store, place = bucket[0], f"sizes/{TOKEN}/config.json"
    store.put(place, json.dumps(to_dict(tiny(seed=7))).encode())
    result, created = sweep(*pods("jobset"))
    del store.objects[place]
    assert (result.returncode, created) == (2, [])
    assert f"point {TOKEN}: {WORKDIR}/{TOKEN} holds another run:\n" in result.stderr


def test_a_bucket_that_refuses_is_an_error_and_not_a_sweep_that_has_not_begun(bucket, sweep):
    bucket[0].hook = lambda method, name: method == "GET"
    try:
        result, created = sweep(*pods("jobset"))
    finally:
        bucket[0].hook = lambda *_: False
    assert (result.returncode, created) == (2, [])
    assert f"error: {WORKDIR}/{DENSE} cannot be read: " in result.stderr


def test_metrics_are_collected_from_the_bucket_into_it(bucket, sweep):
    store = bucket[0]
    for name, parts in ((DENSE, [(1,), (2, 3)]), (TOKEN, [(1, 2)])):
        for steps in parts:
            lines = "".join(json.dumps({"step": step, "flow_loss": 10.0 * step}) + "\n" for step in steps)
            store.put(f"sizes/{name}/metrics/{steps[0]:08d}.jsonl", lines.encode())
        values = emoji_config()
        values.train.num_steps, values.runtime.distributed = 3, True
        values.model.ffn = {DENSE: "dense", TOKEN: "token_choice"}[name]
        store.put(f"sizes/{name}/config.json", json.dumps(to_dict(make_experiment(values))).encode())
    result, _ = sweep("--collect")
    assert result.returncode == 0, result.stderr
    assert f"wrote {WORKDIR}/sweep.csv\n" in result.stdout
    rows = list(csv.DictReader(store.objects["sizes/sweep.csv"][0].decode().splitlines()))
    assert [(row["name"], row["step"], row["loss"]) for row in rows] == [
        (DENSE, "3", "30.0"),
        (TOKEN, "2", ""),
        (EXPERT, "0", ""),
    ]
    assert f"{TOKEN} (2 of 3 steps)" in store.objects["sizes/sweep.md"][0].decode()
    Image.open(io.BytesIO(store.objects["sizes/loss_steps.png"][0])).verify()
