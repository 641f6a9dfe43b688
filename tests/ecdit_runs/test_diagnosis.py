"""Tests the doctor's findings, with broken replacements of the things that it checks."""

import dataclasses
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from ecdit.errors import UserError
from ecdit.experiment import make_experiment
from ecdit.runs import diagnosis
from ecdit.runs.diagnosis import TESTED, compare_versions, diagnose, state_bytes
from ecdit.storage import as_path
from tests.runs import ROOT, config_file, save_ema, tiny

SUBJECTS = ["devices", "versions", "data", "weights", "disk", "bucket", "clock"]
BUCKET = "gs://bucket/run"


@pytest.fixture
def experiment(emoji_data, tmp_path):
    return tiny(data__directory=str(emoji_data))


def found(subject, *about):
    """What one check says: (verdict, text)."""
    return diagnosis._within(30.0, lambda: getattr(diagnosis, subject)(*about))


def test_a_machine_that_can_train_is_told_so_in_a_line_for_each_subject(experiment, tmp_path):
    (tmp_path / "run").mkdir()
    findings = list(diagnose(experiment, tmp_path / "run"))
    assert [finding.subject for finding in findings] == SUBJECTS
    assert all(finding.verdict == "ok" or finding.subject == "versions" for finding in findings), findings
    assert all("\n" not in finding.line() for finding in findings)
    assert findings[0].line() == "ok    devices: 8 CPU devices, over which mesh and batch divide"
    assert "1913 records" in findings[2].text


def test_without_config_and_workdir_the_machine_alone_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [finding.subject for finding in diagnose(None, None)] == SUBJECTS
    assert "needs --config" in found("data", None)[1]
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_behind(experiment, tmp_path):
    save_ema(tmp_path / "run", {"a": np.ones(3)})
    before = sorted(tmp_path.rglob("*"))
    list(diagnose(experiment, tmp_path / "run"))
    list(diagnose(dataclasses.replace(experiment), tmp_path / "other" / "run"))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_mesh_that_does_not_fit_the_devices_fails_unless_other_hosts_have_more(experiment):
    mesh = dataclasses.replace(experiment.mesh, data=3)
    verdict, text = found("devices", dataclasses.replace(experiment, mesh=mesh))
    assert (verdict, "must multiply to the number of devices, 8" in text) == ("fail", True)
    pod = dataclasses.replace(experiment, mesh=mesh, runtime=dataclasses.replace(experiment.runtime, distributed=True))
    assert found("devices", pod)[0] == "ok"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "python 3.11, jax 0.10.2"),
        ({"python": "3.11.7"}, "python 3.11.7"),
        ({"python": "3.13.99"}, "python 3.13.99"),
        ({"python": "3.14.0"}, "python 3.14.0 is newer than 3.13,"),
        ({"python": "3.9.18"}, "python 3.9.18 is older than 3.11,"),
        ({"jax": "0.11.2"}, "jax 0.11.2"),
        ({"jax": TESTED["jax"][1]}, f"jax {TESTED['jax'][1]}"),
        ({"jax": TESTED["jax"][1] + ".1"}, "is newer than"),
        ({"jax": "0.10.10", "flax": "0.12.1"}, "flax 0.12.1 is older than 0.12.8,"),
        ({"jax": "0.9.3"}, "jax 0.9.3 is older than 0.10.2,"),
    ],
)
def test_versions_are_compared_number_by_number(changed, said):
    verdict, text = compare_versions({name: oldest for name, (oldest, _) in TESTED.items()} | changed)
    assert said in text
    assert verdict == ("warn" if "er than" in said else "ok")
    assert ("docs/versions.md" in text) == (verdict == "warn")


@pytest.mark.parametrize(("missing", "verdict"), [(None, "ok"), ("seqio", "fail"), ("tensorflow", "fail")])
def test_data_that_is_not_prepared_needs_what_prepares_it(missing, verdict, tmp_path, monkeypatch):
    monkeypatch.setattr(diagnosis.importlib.util, "find_spec", lambda name: None if name == missing else name)
    told = found("data", tiny(data__directory=str(tmp_path / "data")))
    assert told[0] == verdict
    assert "is not prepared" in told[1]
    assert missing is None or f"needs {missing}: pip install -e '.[data]'" in told[1]


def test_random_latents_are_made_without_what_prepares_images(tmp_path, monkeypatch):
    monkeypatch.setattr(diagnosis.importlib.util, "find_spec", lambda _: None)
    values = config_file("ec_dit").get_config("XL-8E")
    values.data.directory = str(tmp_path / "data")
    assert found("data", make_experiment(values))[0] == "ok"


def test_data_of_other_settings_fails_with_the_key(experiment):
    prepare = dataclasses.replace(experiment.data.prepare, held_out=0.5)
    other = dataclasses.replace(experiment.data, prepare=prepare)
    verdict, text = found("data", dataclasses.replace(experiment, data=other))
    assert (verdict, "data.prepare.held_out = 0.5" in text) == ("fail", True)


def test_what_a_run_would_start_from(experiment, tmp_path, monkeypatch):
    start = lambda source: dataclasses.replace(experiment.checkpoint, init_from=str(source))  # noqa: E731
    save_ema(tmp_path / "run", {"a": np.ones(3)}, step=7)
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()  # of a killed save
    assert found("weights", experiment, tmp_path / "empty") == ("ok", "the run draws them")
    assert found("weights", experiment, tmp_path / "run") == ("ok", f"the run goes on from step 7 of {tmp_path}/run")
    other = dataclasses.replace(experiment, checkpoint=start(tmp_path / "run"))
    assert found("weights", other, tmp_path / "empty")[1].startswith("the run starts from the EMA weights of step 7")
    other = dataclasses.replace(experiment, checkpoint=start(tmp_path / "empty"))
    assert found("weights", other, tmp_path / "empty")[0] == "fail"
    other = dataclasses.replace(experiment, text=dataclasses.replace(experiment.text, frozen=True))
    assert found("weights", other, tmp_path / "empty")[0] == "fail"
    other = dataclasses.replace(other, text=dataclasses.replace(other.text, frozen_random_ok=True))
    assert found("weights", other, tmp_path / "empty")[0] == "warn"
    # In a bucket a killed save is where the checkpoint would be.
    (tmp_path / "run" / "checkpoints" / "9").mkdir()
    monkeypatch.setattr(diagnosis, "half_written", lambda _: ["9"])
    assert "step 7" in found("weights", experiment, tmp_path / "run")[1]


@pytest.mark.parametrize(("free", "verdict"), [(29.9e9, "fail"), (30.1e9, "ok")])
def test_the_kept_checkpoints_and_the_next_one_have_to_fit(free, verdict, experiment, tmp_path, monkeypatch):
    """The config keeps two."""
    monkeypatch.setattr(diagnosis, "state_bytes", lambda _: 10e9)
    monkeypatch.setattr(diagnosis.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    told = found("disk", experiment, tmp_path)
    assert told[0] == verdict
    assert "30.0 GB" in told[1]


def test_the_bytes_of_a_checkpoint_by_hand():
    """float32 parameters, their EMA and RMSProp's two moments: 16 bytes a parameter, and some counters."""
    from ecdit.planning.counts import count

    experiment = make_experiment(config_file("emoji").get_config())
    assert state_bytes(experiment) == pytest.approx(16 * count(experiment).total_params, rel=1e-4)


def test_a_disk_that_cannot_be_written_fails(experiment, tmp_path, monkeypatch):
    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(diagnosis.tempfile, "TemporaryFile", full)
    verdict, text = found("disk", experiment, tmp_path)
    assert (verdict, "No space left" in text) == ("fail", True)


def test_rights_that_are_missing_name_the_role(monkeypatch):
    def refuse(workdir):
        raise UserError(f"--workdir={workdir}: cannot be read, listed and written: Forbidden")

    monkeypatch.setattr(diagnosis, "check_workdir", refuse)
    verdict, text = found("bucket", as_path(BUCKET))
    assert (verdict, "Forbidden" in text, "roles/storage.objectUser" in text) == ("fail", True, True)


def test_a_check_that_never_ends_fails_and_the_others_go_on(monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(diagnosis, "check_workdir", lambda _: ended.wait())
    monkeypatch.setattr(diagnosis, "half_written", lambda _: [])
    monkeypatch.setattr(diagnosis, "children", lambda _: [])
    monkeypatch.setattr(diagnosis, "write_time", lambda _: time.time())
    findings = {finding.subject: finding for finding in diagnose(None, as_path(BUCKET), seconds=2.0)}
    assert list(findings) == SUBJECTS
    assert (findings["bucket"].verdict, findings["clock"].verdict) == ("fail", "ok")
    assert "no answer in 2 s" in findings["bucket"].text
    assert diagnosis.is_left_behind()
    ended.set()


@pytest.mark.parametrize(("ahead", "verdict"), [(-3600.0, "fail"), (-5.0, "ok"), (5.0, "ok"), (3600.0, "fail")])
def test_a_clock_that_differs_from_the_bucket_s_fails(ahead, verdict, monkeypatch):
    monkeypatch.setattr(diagnosis, "write_time", lambda _: time.time() - ahead)
    told = diagnosis.clock(as_path(BUCKET))
    assert told[0] == verdict
    assert verdict == "ok" or f"3600 s {'ahead of' if ahead > 0 else 'behind'}" in told[1]


def test_a_clock_that_is_behind_the_files_of_the_disk_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(diagnosis.time, "time", lambda at=time.time: at() - 7200)
    assert diagnosis.clock(tmp_path)[0] == "fail"


def test_the_page_of_versions_has_those_of_the_doctor():
    page = (ROOT / "docs/versions.md").read_text()
    rows = [line.lower() for line in page.splitlines() if line.startswith("|")]
    for name, versions in TESTED.items():
        row = next(line for line in rows if name in line)
        assert all(version in row for version in versions), name
