"""What a run evaluates while it trains: at the same steps in one go and resumed, and without a trace in its losses."""

import json

import jax
import numpy as np
import pytest

from ecdit.errors import UserError
from ecdit.partitioning import make_mesh
from ecdit.runs.evaluator import Evaluator, scalars
from ecdit.runs.workload import make_workload
from ecdit.system import make_system
from launch.local import cpu_environment
from tests import events
from tests.forking import run_forked
from tests.runs import command, random_params, run, tiny, train_command

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module")
def env(compilation_cache):
    return {**cpu_environment(1), "JAX_COMPILATION_CACHE_DIR": str(compilation_cache)}


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """The changes of a config that evaluates every second step."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("red heart\ntiger\nowl\n")
    return {
        "evaluation__every": 2,
        "evaluation__loss_images": 4,
        "evaluation__prompts": str(prompts),
        "evaluation__score": "retrieval",
        "evaluation__split": "train",
        "evaluation__captions": 5,
    }


def train(workdir, data, env, num_steps, **changes):
    changes = {"checkpoint__every": 2, "optimizer__warmup_steps": 1, **changes}
    result = run_forked(train_command(workdir, data, train__num_steps=num_steps, **changes), env, timeout=600)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory, emoji_data, env, asked):
    """A run of five steps, and what it printed."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return workdir, train(workdir, emoji_data, env, 5, **asked)


def records(workdir):
    return {path.name: path.read_bytes() for path in (workdir / "evaluations").iterdir()}


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_steps_are_evaluated_as_often_as_the_config_says(whole):
    workdir, printed = whole
    assert sorted(records(workdir)) == [f"step_0000000{i}.{end}" for i in (2, 4) for end in ("json", "png")]
    second, fourth = (json.loads((workdir / f"evaluations/step_0000000{i}.json").read_text()) for i in (2, 4))
    for found, step in ((second, 2), (fourth, 4)):
        assert found["step"] == step
        assert found["loss"]["mean"] == pytest.approx(np.mean(found["loss"]["by_time"]))
        assert f"step {step} evaluated: loss {found['loss']['mean']:.4f}, retrieval/r_at_1" in printed
    assert second["loss"]["mean"] != fourth["loss"]["mean"]


@pytest.mark.slow
def test_tensorboard_has_the_numbers_and_the_images(whole):
    found = events.scalars(whole[0])
    for name in ("eval/loss", "eval/loss/t_0.05", "eval/retrieval/r_at_5"):
        assert [step for step, _ in found[name]] == [2, 4]
    assert {(2, "prompts"), (4, "prompts")} <= set(events.images(whole[0]))


@pytest.mark.slow
def test_training_is_bitwise_what_it_is_without_evaluation(whole, emoji_data, env, tmp_path):
    train(tmp_path / "run", emoji_data, env, 5)
    assert losses(tmp_path / "run") == losses(whole[0])
    assert not (tmp_path / "run/evaluations").exists()


@pytest.mark.slow
def test_a_resumed_run_evaluates_the_same_steps_to_the_same_numbers(whole, emoji_data, env, asked, tmp_path):
    """It was stopped at step 2, before its evaluation; that is made up for, once."""
    workdir = tmp_path / "run"
    train(workdir, emoji_data, env, 2, **asked)
    for path in (workdir / "evaluations").iterdir():
        path.unlink()
    printed = train(workdir, emoji_data, env, 4, **asked)
    assert [line for line in printed.splitlines() if line.startswith("evaluating")] == [
        "evaluating step 2",
        "evaluating step 4",
    ]
    assert records(workdir) == records(whole[0])
    assert "evaluating" not in train(workdir, emoji_data, env, 5, **asked)


def test_each_part_is_compiled_once(emoji_data, asked, tmp_path):
    experiment = tiny(data__directory=str(emoji_data), mesh__data=1, **asked)
    mesh = make_mesh(experiment.mesh, jax.devices()[:1])
    evaluator = Evaluator(experiment, mesh, tmp_path)
    first = random_params(make_system(experiment.system))
    second = jax.tree.map(lambda x: 0.9 * x, first)
    compiled = []
    listener = lambda name, *_, **__: compiled.append(name) if name == COMPILED else None  # noqa: E731
    one = evaluator.evaluate(first, 2)
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        two = evaluator.evaluate(second, 4)
        again = evaluator.evaluate(first, 6)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert compiled == []
    assert one.scalars == again.scalars != two.scalars
    assert one.files["prompts"].read_bytes() == again.files["prompts"].read_bytes() != two.files["prompts"].read_bytes()


def test_prompts_that_are_cut_or_missing_are_said_before_the_first_step(emoji_data, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("tiger\n" + 40 * "red heart " + "\n")
    asked = {"evaluation__every": 2, "evaluation__loss_images": 0, "data__directory": str(emoji_data), "mesh__data": 1}
    experiment = tiny(**asked, evaluation__prompts=str(tmp_path / "prompts.txt"))
    mesh = make_mesh(experiment.mesh, jax.devices()[:1])
    Evaluator(experiment, mesh, tmp_path)
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith(f"warning: evaluation.prompts={tmp_path}/prompts.txt: prompt 'red heart red heart")
    (tmp_path / "prompts.txt").unlink()
    with pytest.raises(UserError, match=r"evaluation\.prompts=.*: .*No such file"):
        Evaluator(experiment, mesh, tmp_path)


def test_prompts_are_read_once_for_all_phases(emoji_data, tmp_path):
    """Processes compare the file at the start alone; a phase that begins later could draw other prompts on each."""
    (tmp_path / "prompts.txt").write_text("tiger\n")
    asked = {"evaluation__every": 2, "evaluation__loss_images": 0, "data__directory": str(emoji_data), "mesh__data": 1}
    phases = ({"after": 2, "changes": {"optimizer.learning_rate": 1e-3}},)
    experiment = tiny(**asked, evaluation__prompts=str(tmp_path / "prompts.txt"), train__num_steps=4, phases=phases)
    workload = make_workload(experiment, make_mesh(experiment.mesh, jax.devices()[:1]))
    first, second = experiment.resolved_phases()
    assert workload.evaluator(first, tmp_path).prompts == ["tiger"]
    (tmp_path / "prompts.txt").write_text("red heart\ntiger\n")
    assert workload.evaluator(second, tmp_path).prompts == ["tiger"]


def test_an_evaluation_is_not_written_without_permission(emoji_data, tmp_path):
    """The trainer may have lost its lease while it evaluated. (This one evaluates nothing, to be fast.)"""

    def lost():
        raise UserError("the lease was lost")

    experiment = tiny(data__directory=str(emoji_data), mesh__data=1)
    evaluator = Evaluator(experiment, make_mesh(experiment.mesh, jax.devices()[:1]), tmp_path)
    with pytest.raises(UserError, match="the lease was lost"):
        evaluator.evaluate({}, 2, lost)
    assert list(tmp_path.iterdir()) == []
    evaluator.evaluate({}, 2)
    assert list(records(tmp_path)) == ["step_00000002.json"]


def test_numbers_have_names():
    found = {
        "step": 3,
        "loss": {"mean": 0.5, "by_time": [0.1] * 10},
        "shapes": {"overall": 0.2, "kinds": {"colors": 0.3}},
    }
    named = scalars(found)
    assert (named["eval/loss"], named["eval/loss/t_0.95"]) == (0.5, 0.1)
    assert (named["eval/shapes/overall"], named["eval/shapes/colors"]) == (0.2, 0.3)
    assert len(named) == 13


@pytest.mark.slow
def test_the_loss_command_tells_weights_and_groups_apart(whole, env, tmp_path):
    """Training groups are of 1024 tokens in the paper; the emoji's are images, so here they are one."""
    flags = [f"--workdir={whole[0]}", "--split=train", "--images=5", "--batch_size=4", f"--json={tmp_path}/loss.json"]
    result = run(command("evaluate", "loss", *flags), env)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "loss.json").read_text())
    assert [(row["weights"], row["groups"]) for row in found["losses"]] == [("ema", "image"), ("raw", "image")]
    ema, raw = found["losses"]
    assert ema["by_time"] != raw["by_time"]
    assert f"| ema | image | {ema['mean']:.4f} | {ema['by_time'][0]:.4f} |" in result.stdout
    assert (found["step"], found["images"], found["split"]) == (5, 5, "train")
