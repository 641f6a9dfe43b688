"""The line that says what a run learns from, and the refusal of random numbers on several hosts."""

import dataclasses

import pytest

from ecdit.config import ConfigError
from ecdit.experiment import make_experiment
from ecdit.runs.inputs import check_placeholder, inputs_line
from ecdit.runs.workload import prepare_together
from tests.data.example import make_config
from tests.runs import config_file, tiny

NEW = "weights at step 0: random text tower (trained), random denoiser"


def test_the_paper_s_configs_say_that_their_data_and_text_tower_are_stand_ins():
    experiment = make_experiment(config_file("ec_dit").get_config("XL-8E"))
    assert inputs_line(experiment) == (
        "data: random_latents (PLACEHOLDER, random numbers in place of latents); weights at step 0: "
        "random text tower (frozen, never trained), random denoiser"
    )


def test_data_is_named_with_its_place_and_with_each_phase_that_changes_it():
    assert inputs_line(tiny(data__directory="d")) == f"data: emoji in d/emoji; {NEW}"
    changes = (
        {"after": 5, "changes": {"optimizer.learning_rate": 0.1}},
        {"after": 7, "changes": {"data.directory": "e"}},
    )
    both = tiny(data__directory="d", train__num_steps=9, phases=changes)
    assert inputs_line(both) == f"data: emoji in d/emoji, from step 8 emoji in e/emoji; {NEW}"


def test_another_run_s_weights_are_named():
    line = inputs_line(tiny(checkpoint__init_from="runs/a", text__frozen=True))
    assert line.endswith("; weights at step 0: text tower of runs/a (frozen), denoiser of runs/a (EMA)")


def test_random_numbers_on_several_hosts_are_refused_unless_that_is_meant():
    random = make_config(task="random_latents")
    says = (
        r"config\.data\.placeholder_ok = False: must be True: 2 hosts would train on random_latents, random numbers in "
        r"place of data\. Name your own in data\.task"
    )
    with pytest.raises(ConfigError, match=says):
        check_placeholder(random, ["random_latents"], 2)
    check_placeholder(random, ["random_latents"], 1)
    check_placeholder(dataclasses.replace(random, placeholder_ok=True), ["random_latents"], 2)
    check_placeholder(make_config(task="shapes"), ["shapes"], 2)
    # A user's file may register a task of that name; as a part of its mixture it is the package's.
    check_placeholder(dataclasses.replace(random, module="mine.py"), ["random_latents"], 2)
    with pytest.raises(ConfigError, match="2 hosts would train on random_latents, "):
        check_placeholder(make_config(task="mixed", module="mine.py"), ["emoji", "random_latents"], 2)


def test_the_parts_of_prepared_data_are_looked_at(tmp_path, monkeypatch):
    config = make_config(tmp_path, task="random_latents", latent_channels=4, flip_probability=0.0, crop_padding=0)
    assert len(prepare_together([config])) == 1
    monkeypatch.setattr("jax.process_count", lambda: 3)
    monkeypatch.setattr("ecdit.runs.workload.on_first", lambda do: do())
    with pytest.raises(ConfigError, match="3 hosts would train on random_latents"):
        prepare_together([config])
