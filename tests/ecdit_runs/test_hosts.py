"""Tests that hosts which would not train the same run are found before the first step, by all of them."""

import sys

import pytest

from ecdit.config import to_dict
from ecdit.multihost import differing
from ecdit.runs.provenance import facts_of_a_host
from launch.local import launch
from tests.runs import tiny

SOURCES = "ecdit's sources"
# A run of the toy; its data, or the file of prompts to evaluate, differs between the processes.
DIFFERENT = """
import os
import sys
from pathlib import Path
import jax
from ecdit import runtime
from ecdit.command_line import run_command
from tests.checkpoints.toy import Toy

class Different(Toy):
    def workload(self, experiment):
        import dataclasses
        prepared = lambda: [f"data of {jax.process_index() * ('data' in sys.argv[2:])}"]
        return dataclasses.replace(super().workload(experiment), prepare_data=prepared)

def main(argv):
    runtime.configure(runtime.RuntimeConfig((), (), False, "", distributed=False, heartbeat_seconds=100))
    here = Path(sys.argv[1] + f".{jax.process_index()}")  # the working directory of this host
    here.mkdir()
    if "prompts" not in sys.argv[2:] or jax.process_index() == 0:
        (here / "prompts.txt").write_text("tiger")
    os.chdir(here)
    evaluation = {"evaluation__prompts": "prompts.txt", "evaluation__every": 9, "evaluation__loss_images": 0}
    code = Different(Path(sys.argv[1])).train(num_steps=2, every=2, mesh__data=2, **evaluation)
    print("ENDED", code, flush=True)

run_command(main, words=True)
"""


@pytest.mark.parametrize(
    ("differ", "said"),
    [
        ("data", ["  data of phase 1: process 1 (host ", "has data of 1, most have data of 0 "]),
        (
            "prompts",
            ["  evaluation.prompts=prompts.txt: process 1 (host ", "has no file that can be read"],
        ),
        ("nothing", []),
    ],
)
def test_hosts_with_different_data_end_before_the_first_step_and_say_so(tmp_path, monkeypatch, differ, said):
    for name in ("XLA_FLAGS", "JAX_NUMPY_RANK_PROMOTION"):
        monkeypatch.delenv(name, raising=False)
    command = [sys.executable, "-c", DIFFERENT, str(tmp_path / "run"), differ]
    code = launch(command, processes=2, devices=1, log_dir=tmp_path / "logs")
    logs = [(tmp_path / f"logs/process_{i}.log").read_text() for i in range(2)]
    assert (code != 0) == bool(said), logs
    if said:
        for log in logs:
            for text in ("error: the hosts would not train the same:\n" + said[0], said[1]):
                assert text in log
        assert not (tmp_path / "run").exists()
    else:
        assert "ENDED 0" in logs[0]


def test_the_line_names_the_odd_host_and_what_differs():
    facts = facts_of_a_host(to_dict(tiny()), ["f" * 64], "v" * 64)
    others = [facts_of_a_host(to_dict(tiny(seed=1)), ["f" * 64], "v" * 64), facts | {SOURCES: "0" * 12}]
    processes = [{"host": f"h{n}", "facts": each} for n, each in enumerate([facts, facts, *others, facts])]
    assert differing(processes[:2]) == []
    assert differing(processes) == [
        "config.seed: process 2 (host h2) has 1, most have 0 (as host h0)",
        f"ecdit's sources: process 3 (host h3) has 000000000000, most have {facts[SOURCES]} (as host h0)",
    ]


def test_data_code_versions_and_every_key_of_the_config_are_compared():
    facts = facts_of_a_host(to_dict(tiny()), ["a" * 64, "b" * 64], "v" * 64)
    assert {"data of phase 1", "data of phase 2", "vocabulary", SOURCES, "version of jax"} < facts.keys()
    flags = ("--xla_a=1", f"--xla_{'b' * 90}")  # too long to be shown
    changed = facts_of_a_host(to_dict(tiny(runtime__xla_flags=flags)), ["a" * 64, "b" * 64], "v" * 64)
    assert [name for name in facts if facts[name] != changed[name]] == ["config.runtime.xla_flags"]


INTERRUPTED = """
import os, signal, sys, time
from pathlib import Path
import jax
from ecdit import runtime
from ecdit.command_line import run_command
from tests.checkpoints.toy import Toy

def main(argv):
    runtime.configure(runtime.RuntimeConfig((), (), False, "", distributed=False, heartbeat_seconds=100))
    toy = Toy(Path(sys.argv[1]))
    for n in range(1, 400):
        toy.at[n] = lambda: time.sleep(0.05)
    if jax.process_index() == 1:
        toy.at[20] = lambda: os.kill(os.getpid(), signal.SIGINT)
    code = toy.train(num_steps=300, every=1000, mesh__data=2)
    print("ENDED", code, flush=True)

run_command(main, words=True)
"""


def test_ctrl_c_to_one_of_two_processes_saves_the_same_step_on_both(tmp_path, monkeypatch):
    for name in ("XLA_FLAGS", "JAX_NUMPY_RANK_PROMOTION"):
        monkeypatch.delenv(name, raising=False)
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "run")]
    assert launch(command, processes=2, devices=1, log_dir=tmp_path / "logs") == 0
    logs = [(tmp_path / f"logs/process_{i}.log").read_text() for i in range(2)]
    for log in logs:  # a launcher that restarted one of them would wait for the other
        assert "ENDED 130" in log, log
    (step,) = (int(path.name) for path in (tmp_path / "run/checkpoints").iterdir())
    assert 20 <= step < 300
    assert f"stopped by Ctrl-C; saved step {step}" in logs[0]
