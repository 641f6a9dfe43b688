"""Tests that plans are made once, and again if anything that they depend on changes. Nothing is compiled here."""

import dataclasses

import pytest

from ecdit.planning import cache
from ecdit.planning.cache import cached_plan
from ecdit.planning.compiler import DoesNotFit, find_target
from ecdit.planning.plan import Plan
from tests.runs import tiny


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """planned(topology, what, **config) is (whether the plan was made and not read, the plan)."""
    made = []

    def make_plan(experiment, target, what):
        made.append(experiment)
        values = {field.name: len(made) for field in dataclasses.fields(Plan)}
        return Plan(**values | {"topology": target.name, "what": what, "batch_size": experiment.train.batch_size})

    def planned(topology="v5p:2x2x1", what="train", **config):
        before = len(made)
        experiment = tiny(**{"runtime__compilation_cache": str(tmp_path), **config})
        plan = cached_plan(experiment, find_target(topology), what)
        return len(made) > before, plan

    monkeypatch.setattr(cache, "make_plan", make_plan)
    for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    return planned


def test_a_plan_is_made_once_and_read_as_it_was(planned):
    (made, first), (again, second) = planned(), planned()
    assert (made, again) == (True, False)
    assert second == first


@pytest.mark.parametrize(
    "change",
    [
        {"topology": "v5p:2x2x2"},
        {"topology": "v5e:2x2"},
        {"topology": "2xv5p:2x2x1"},
        {"what": "sample"},
        {"mesh__fsdp": 2},
        {"mesh__slices": 2},
        {"train__batch_size": 32},
        {"model__remat": "full"},
        {"sampling__num_steps": 3},
        {"runtime__xla_flags": ["--xla_dump_hlo_as_text=true"]},
    ],
    ids=str,
)
def test_whatever_changes_a_plan_makes_it_anew_and_the_old_one_stays(planned, change):
    _, first = planned()
    made, other = planned(**change)
    assert made
    assert (other.topology, other.what) == (change.get("topology", "v5p:2x2x1"), change.get("what", "train"))
    assert planned() == (False, first)
    assert planned(**change) == (False, other)


def test_another_version_of_a_library_or_of_this_code_makes_plans_anew(planned, monkeypatch):
    planned()
    with monkeypatch.context() as patched:
        patched.setattr(cache, "_version", lambda name: "1.2.3" if name == "libtpu" else "")
        assert planned()[0]
    with monkeypatch.context() as patched:
        patched.setattr(cache, "code_digest", lambda: "another")
        assert planned()[0]
    assert not planned()[0]


@pytest.mark.parametrize("name", ["LIBTPU_INIT_ARGS", "XLA_FLAGS"])
def test_flags_that_the_environment_gives_the_compiler_make_plans_anew(planned, monkeypatch, name):
    planned()
    with monkeypatch.context() as patched:
        patched.setenv(name, "--xla_tpu_scoped_vmem_limit_kib=1024")
        assert planned()[0]
    assert not planned()[0]


def test_a_plan_that_cannot_be_kept_is_returned_with_a_warning(planned, tmp_path, capsys):
    (tmp_path / "file").touch()
    made, plan = planned(runtime__compilation_cache=str(tmp_path / "file"))
    assert made
    assert plan.topology == "v5p:2x2x1"
    assert "warning: the plan is not cached: " in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{", '{"topology": "v5p:2x2x1"}'])
def test_a_plan_that_cannot_be_read_is_made_anew_and_written_over(planned, tmp_path, text):
    _, first = planned()
    (path,) = (tmp_path / "plans").iterdir()
    path.write_text(text)
    made, second = planned()
    assert made
    assert second != first
    assert planned() == (False, second)


@pytest.mark.parametrize("directory", ["", "gs://bucket/cache"])
def test_without_a_directory_of_this_machine_each_plan_is_made(planned, directory):
    assert [planned(runtime__compilation_cache=directory)[0] for _ in range(2)] == [True, True]


def test_the_longest_phase_is_planned(planned):
    phases = [{"after": 4, "changes": {"train.batch_size": 8}}, {"after": 9, "changes": {"train.batch_size": 24}}]
    assert planned(train__num_steps=10, phases=phases)[1].batch_size == 8
    assert planned(train__num_steps=18, phases=phases)[1].batch_size == 24


def test_every_phase_is_planned_and_the_largest_decides(planned, monkeypatch):
    """In the stand-in each plan needs one byte more than the one before it: the last phase is the largest."""
    phases = [{"after": 4, "changes": {"train.batch_size": 8}}, {"after": 9, "changes": {"train.batch_size": 24}}]
    experiment = tiny(train__num_steps=10, phases=phases)
    plans = cache.plan_phases(experiment, find_target("v5p:2x2x1"))
    assert [plan.batch_size for _, plan in plans] == [16, 8, 24]
    assert (cache.longest(plans).batch_size, cache.largest(plans).batch_size) == (8, 24)


def test_a_short_phase_that_does_not_fit_is_named(planned, monkeypatch):
    """As a phase without a mask, whose memory nobody looked at when the longest alone was planned."""
    make_plan = cache.make_plan

    def full(experiment, target, what):
        if experiment.model.mask_ratio == 0:
            raise DoesNotFit("40 of 32 GB")
        return make_plan(experiment, target, what)

    monkeypatch.setattr(cache, "make_plan", full)
    phases = [{"after": 9, "changes": {"model.mask_ratio": 0.0}}]
    with pytest.raises(DoesNotFit, match=r"^the phase from step 10 to 10: 40 of 32 GB$"):
        planned(train__num_steps=10, phases=phases, model__mask_ratio=0.5)
