"""Tests the commands as a user runs them, and their messages for invalid input."""

import json
import shutil

import numpy as np
import pytest
from absl import flags
from PIL import Image
from safetensors import safe_open

from ecdit.config import ConfigError, build, flatten, to_dict
from ecdit.data.text import train_vocabulary
from ecdit.data.tokens import tokenizer_path
from ecdit.experiment import Experiment, make_experiment
from ecdit.interop.weights import flat_names
from ecdit.runs.kept_tokenizer import kept_files
from ecdit.runs.trained_run import open_run, saved_experiment
from launch.local import cpu_environment
from tests.ecdit_runs.test_provenance import rewrite
from tests.forking import run_forked
from tests.runs import ROOT, TINY, base_install, command, emoji_config, run, tiny_values, train_command


@pytest.fixture(scope="module")
def env(compilation_cache, tmp_path_factory):
    """Of a base install, for fresh processes: training, sampling and the like need nothing that prepares data."""
    env = {**cpu_environment(1), "JAX_COMPILATION_CACHE_DIR": str(compilation_cache)}
    return base_install(env, tmp_path_factory.mktemp("base_install"))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, emoji_data, env):
    """A run of three steps."""
    workdir = tmp_path_factory.mktemp("commands") / "run"
    result = run(train_command(workdir, emoji_data, train__num_steps=3), env)
    assert result.returncode == 0, result.stderr
    grid = workdir / "samples" / "step_00000003.png"
    lines = result.stdout.splitlines()
    source = f"emoji in {emoji_data}/emoji; weights at step 0: random text tower (trained), random denoiser"
    assert lines[0] == f"data: {source}"
    assert lines[1] == "1 CPU device, float32 compute, 3 steps of 16 images; the step is compiled first"
    assert lines[-1] == f"done: step 3, checkpoint and metrics in {workdir}, samples in {grid}"
    assert result.stderr == ""
    assert read_png(grid).shape[1] > 200
    return workdir


def read_png(path):
    with Image.open(path) as image:
        return np.asarray(image)


def refused(arguments, env, *said):
    result = run_forked(arguments, env)
    assert result.returncode not in (0, -6, -9, -11)
    assert "Traceback" not in result.stderr
    for words in said:
        assert words in result.stderr
    return result


def test_metrics_have_an_integer_step_and_every_step(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert isinstance(line["step"], int)
        assert {"loss", "grad_norm", "router_grad_norm", "coverage_0", "images_per_second"} <= set(line)
        shares = np.array([line[f"coverage_{n}"] for n in ("0", "1", "2", "3_or_more")])
        np.testing.assert_allclose(shares.sum(axis=0), 1, rtol=1e-5)  # for each sparse layer


def test_a_finished_run_is_left_as_it_is(workdir, emoji_data, env):
    before = (workdir / "metrics.jsonl").read_text()
    result = run_forked(train_command(workdir, emoji_data, train__num_steps=3), env)
    assert result.returncode == 0, result.stderr
    assert (workdir / "metrics.jsonl").read_text() == before


def test_sample_writes_images_grid_and_manifest_in_order(workdir, tmp_path, env):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red heart\ntiger\n")
    out = tmp_path / "out"
    flags = [f"--workdir={workdir}", f"--prompts={prompts}", f"--out={out}", "--repeats=2"]
    result = run(command("sample", *flags), env)
    assert result.returncode == 0, result.stderr
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["step"] == 3
    named = [(row["prompt"], row["repeat"], row["file"]) for row in manifest["images"]]
    assert named == [
        ("red heart", 0, "00000.png"),
        ("red heart", 1, "00001.png"),
        ("tiger", 0, "00002.png"),
        ("tiger", 1, "00003.png"),
    ]
    images = [read_png(out / name) for *_, name in named]
    assert {image.shape for image in images} == {(32, 32, 3)}
    assert read_png(out / "grid.png").shape[1] > 200
    # The same image alone, by --prompt; and another seed gives another.
    again, other = tmp_path / "again", tmp_path / "other"
    one = [f"--workdir={workdir}", "--prompt=tiger"]
    assert run_forked(command("sample", *one, f"--out={again}"), env).returncode == 0
    np.testing.assert_array_equal(read_png(again / "00000.png"), images[2])
    seeded = run_forked(command("sample", *one, f"--out={other}", "--set=sampling.seed=7"), env)
    assert seeded.returncode == 0
    assert (read_png(other / "00000.png") != images[2]).mean() > 0.5
    # The manifest says what they follow from.
    first, second = (json.loads((folder / "manifest.json").read_text()) for folder in (again, other))
    assert (first["sampling"]["solver"], first["sampling"]["num_steps"]) == ("euler", 2)
    assert first["sampling"]["guidance"]["scale"] == opened_sampling(workdir).guidance.scale
    assert (first["group"], first["set"], second["set"]) == ("image", [], ["sampling.seed=7"])
    assert (first["seed"], second["seed"]) == (opened_sampling(workdir).seed, 7)
    assert first["checkpoint"] == second["checkpoint"] == manifest["checkpoint"]
    assert len(first["checkpoint"]) == 64
    # Images of two calls are not mixed; the same call finds its images and leaves them.
    seed = f"differs in seed ({first['seed']} there, 7 here)"
    refused(command("sample", *one, f"--out={again}", "--set=sampling.seed=7"), env, "holds the finished images", seed)
    same = run_forked(command("sample", *one, f"--out={again}"), env)
    assert "1 images of step 3 in" in same.stdout, same.stderr
    assert "1 of them from before" in same.stdout
    assert json.loads((again / "manifest.json").read_text()) == first


def opened_sampling(workdir):
    return saved_experiment(workdir).sampling


def moved(workdir, place, directory):
    """A copy of a run whose config says that its data is in `directory`."""
    copy = shutil.copytree(workdir, place)
    values = json.loads((copy / "config.json").read_text())
    values["data"]["directory"] = str(directory)
    (copy / "config.json").write_text(json.dumps(values))
    return copy


def test_another_vocabulary_in_the_data_changes_no_image(workdir, tmp_path, env):
    other = moved(workdir, tmp_path / "run", tmp_path / "data")
    path = tokenizer_path(saved_experiment(other).data)
    path.parent.mkdir(parents=True)
    train_vocabulary(["letters of many other words"], 300, path)
    images = []
    for run_folder in (workdir, other):
        out = tmp_path / f"out_{len(images)}"
        flags = [f"--workdir={run_folder}", "--prompt=red heart", f"--out={out}"]
        sampled = run_forked(command("sample", *flags), env)
        assert sampled.returncode == 0, sampled.stderr
        images.append(read_png(out / "00000.png"))
    np.testing.assert_array_equal(*images)


def test_images_are_looked_up_in_the_data_of_the_training_alone(workdir, tmp_path, env):
    other = shutil.copytree(workdir, tmp_path / "run")
    rewrite(other, 3, lambda values: values.update(dataset="0" * 64))
    refused(
        command("evaluate", "retrieval", f"--workdir={other}", "--captions=8"),
        env,
        "is not the data of the training",
        f"step 3 of {other} was trained on 000000000000",
    )


def test_export_writes_the_ema_weights(workdir, tmp_path, env):
    out = tmp_path / "weights"
    result = run(command("checkpoint", "export", f"--workdir={workdir}", f"--out={out}"), env)
    assert result.returncode == 0, result.stderr
    opened = open_run(workdir, ["mesh.fsdp=2"])
    expected = flat_names(opened.params)
    with safe_open(out / "model.safetensors", "numpy") as file:
        assert set(file.keys()) == set(expected)
        assert "denoiser.pairs.even.experts.up" in expected
        for name, array in expected.items():
            np.testing.assert_array_equal(file.get_tensor(name), array, err_msg=name)
        assert file.metadata()["step"] == "3"
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert saved_experiment(out) == saved_experiment(workdir)
    assert json.loads((out / "config.json").read_text())["model"]["num_experts"] == 4
    assert kept_files(out) == kept_files(workdir)
    before = (out / "model.safetensors").read_bytes()
    again = run_forked(command("checkpoint", "export", f"--workdir={workdir}", f"--out={out}"), env)
    assert (again.returncode, (out / "model.safetensors").read_bytes() == before) == (2, True)
    assert f"{out} holds other files; name a folder that is missing or empty" in again.stderr


def test_export_in_shards_draws_the_same_images_without_the_workdir_and_the_data(workdir, tmp_path, env):
    """Bitwise, with one device and with the mesh that two have."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red heart\ntiger\nowl\n")
    drawn = lambda name, flag: command("sample", flag, f"--prompts={prompts}", f"--out={tmp_path / name}")  # noqa: E731
    for devices, name in ((1, "one"), (2, "two")):
        sampled = run_forked(drawn(name, f"--workdir={workdir}"), {**env, **cpu_environment(devices)})
        assert sampled.returncode == 0, sampled.stderr
    other = moved(workdir, tmp_path / "run", tmp_path / "nowhere")
    exported = command("checkpoint", "export", f"--workdir={other}", f"--out={tmp_path}/weights", "--shard_gb=1e-4")
    result = run_forked(exported, env)
    assert result.returncode == 0, result.stderr
    shards = sorted((tmp_path / "weights").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert f"EMA weights of step 3 in {tmp_path}/weights: {len(shards)} files of weights" in result.stdout
    shutil.rmtree(other)
    for devices, name in ((1, "one"), (2, "two")):
        sampled = run_forked(
            drawn(f"{name}_again", f"--weights={tmp_path}/weights"), {**env, **cpu_environment(devices)}
        )
        assert sampled.returncode == 0, sampled.stderr
        for image in ("00000.png", "00001.png", "00002.png", "grid.png"):
            assert (tmp_path / name / image).read_bytes() == (tmp_path / f"{name}_again" / image).read_bytes()
    first, second = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("one", "one_again"))
    assert first.pop("workdir") == str(workdir)
    assert second.pop("folder") == f"{tmp_path}/weights"
    assert first == second


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--workdir={run}", "--weights={run}"], "give one of --workdir and --weights"),
        ([], "give one of --workdir and --weights"),
        (["--weights={run}", "--step=3"], "--step=3: an exported folder holds one step alone"),
        (["--weights=gs://bucket/w"], "--weights=gs://bucket/w: must be a folder of this machine"),
        (["--weights={run}"], "there are no *.safetensors files"),
        (["--weights={run}/nothing"], "is no exported folder, it has no config.json"),
    ],
)
def test_sample_refuses_what_is_no_exported_folder(flags, said, workdir, tmp_path, env):
    flags = [flag.format(run=workdir) for flag in flags]
    refused(command("sample", *flags, "--prompt=a", f"--out={tmp_path}/out"), env, said)
    assert not (tmp_path / "out").exists()


def test_export_refuses_a_file_s_name_and_a_bucket(workdir, tmp_path, env):
    export = ["export", f"--workdir={workdir}"]
    refused(command("checkpoint", *export, f"--out={tmp_path}/w.safetensors"), env, "name a folder; the weights in it")
    refused(command("checkpoint", *export), env, "--out=: name a folder")
    refused(command("checkpoint", *export, "--out=gs://b/w"), env, "--out=gs://b/w: must be a folder of this machine")
    towers = [*export, f"--out={tmp_path}/w", "--towers"]
    refused(command("checkpoint", *towers), env, "--towers: only a folder of --format=diffusers can hold public")
    assert list(tmp_path.iterdir()) == []


def test_retrieval_prints_and_writes_what_it_measured(workdir, emoji_data, tmp_path, env):
    """Its data has moved since the training, and its user wants fewer steps."""
    other, out = moved(workdir, tmp_path / "run", tmp_path / "gone"), tmp_path / "retrieval.json"
    flags = [f"--workdir={other}", f"--json={out}", "--captions=32", f"--set=data.directory={emoji_data}"]
    result = run(command("evaluate", "retrieval", *flags, "--set=sampling.num_steps=3"), env)
    assert result.returncode == 0, result.stderr
    measured = json.loads(out.read_text())
    assert 0 <= measured["r_at_1"] <= measured["r_at_5"] <= 0.1  # three steps teach nothing
    assert (measured["num_captions"], measured["num_images"]) == (32, 1913)
    assert measured["seconds"] > 0
    used = measured["protocol"]
    assert (used["solver"], used["num_steps"], used["guidance"]["scale"]) == ("euler", 3, 3.0)
    assert "fit to the training captions" in result.stdout


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config.model.widht=3"], ["config.model.widht", "no key 'widht'"]),
        (["--config.train.num_steps=many"], ["config.train.num_steps", "many"]),
        (["--config.model.kv_heads=3"], ["config.model.kv_heads = 3", "must divide heads, 4"]),
        (["--config.model.ffn=sparse"], ["config.model.ffn = 'sparse'", "'token_choice'"]),
        (["--config.mesh.data=3"], ["config.mesh", "number of devices, 1"]),
        (["--config.model.group=48"], ["config.model.group = '48'", "tokens of an image"]),
        (["--config.model.group=65536"], ["config.model.group = '65536'", "device's tokens per microbatch"]),
        (["--config.data.caption_dropout=1.5"], ["config.data.caption_dropout = 1.5"]),
    ],
)
def test_train_refuses_bad_config(flags, said, tmp_path, env):
    refused(command("train", f"--config={ROOT}/configs/emoji.py", f"--workdir={tmp_path}/run", *flags), env, *said)
    assert not (tmp_path / "run").exists()


def test_train_refuses_parameters_that_do_not_divide_over_the_mesh(tmp_path):
    sizes = {"mesh.data": 1, "mesh.fsdp": 3, "train.batch_size": 66, "sampling.batch_size": 33}
    overrides = [f"--config.{key}={value}" for key, value in sizes.items()]
    arguments = command("train", f"--config={ROOT}/configs/emoji.py", f"--workdir={tmp_path}/run", *overrides)
    refused(arguments, cpu_environment(3), "axis 'expert_mlp' of size 512", "tensor 1 x fsdp 3", "denoiser/")
    assert not (tmp_path / "run").exists()


def test_train_refuses_an_unknown_argument_and_a_missing_file(tmp_path, env):
    refused(command("train", f"--config={ROOT}/configs/emoji.py:short", f"--workdir={tmp_path}/r"), env, "quick, long")
    refused(command("train", f"--config={tmp_path}/none.py", f"--workdir={tmp_path}/r"), env, "none.py: no such config")
    refused(command("train", f"--workdir={tmp_path}/r"), env, "--config is missing")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prompts={tmp}/none.txt"], ["none.txt", "No such file"]),
        (["--prompts={tmp}/gap.txt"], ["gap.txt", "line 2 is empty"]),
        (["--prompts={tmp}/nothing.txt"], ["nothing.txt", "no prompts"]),
        (["--prompt= "], ["is empty"]),
        ([], ["give one of --prompt and --prompts"]),
        (["--prompt=a", "--prompts={tmp}/gap.txt"], ["give one of --prompt and --prompts"]),
        (["--prompt=a", "--set=sampling.steps=3"], ["config.sampling.steps", "no such key"]),
        (["--prompt=a", "--set=sampling.num_steps=0"], ["config.sampling.num_steps = 0"]),
        (["--prompt=a", "--set=model.capacity_factor=1.0"], ["--set=model.capacity_factor=1.0", "key of sampling"]),
        (["--prompt=\u200b"], ["vocabulary has nothing of it; it would be the empty caption"]),
        (["--prompt=a", "--step=1000"], ["no checkpoint of step 1000; there are 3"]),
    ],
)
def test_sample_refuses_bad_input(flags, said, workdir, tmp_path, env):
    (tmp_path / "gap.txt").write_text("red heart\n\ntiger\n")
    (tmp_path / "nothing.txt").write_text("")
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    refused(command("sample", f"--workdir={workdir}", f"--out={tmp_path}/out", *flags), env, *said)
    assert not (tmp_path / "out").exists()


def test_sample_refuses_a_bucket_and_a_folder_of_other_files(workdir, tmp_path, env):
    flags = [f"--workdir={workdir}", "--prompt=a"]
    refused(
        command("sample", *flags, "--out=gs://bucket/out"), env, "--out=gs://bucket/out: must be a directory of this"
    )
    (tmp_path / "notes.txt").write_text("mine")
    refused(command("sample", *flags, f"--out={tmp_path}"), env, f"--out={tmp_path}: holds other files")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_commands_refuse_a_workdir_without_a_run(tmp_path, env):
    refused(command("sample", f"--workdir={tmp_path}", "--prompt=a", f"--out={tmp_path}/out"), env, str(tmp_path))
    refused(command("checkpoint", "export", f"--workdir={tmp_path}", f"--out={tmp_path}/w"), env, str(tmp_path))
    refused(command("checkpoint", "import", f"--workdir={tmp_path}"), env, "verbs: verify, list, export; got import")


def test_prepare_does_nothing_twice(emoji_data, env):
    flags = [f"--config={ROOT}/configs/emoji.py", f"--config.data.directory={emoji_data}"]
    result = run(command("prepare", *flags), env)
    assert result.returncode == 0, result.stderr
    assert f"{emoji_data}/emoji is prepared: 1913 records" in result.stdout


# Config files to dataclasses


def values(**overrides):
    return json.loads(json.dumps(to_dict(make_experiment(tiny_values(**overrides)))))


def test_a_config_survives_json():
    assert to_dict(build(Experiment, values())) == values()
    assert flatten(values())["model.width"] == 32


@pytest.mark.parametrize(
    ("group", "key", "value", "said"),
    [
        ("model", "depht", 4, "unknown key"),
        ("model", "width", "32", "must be int"),
        ("model", "width", 32.0, "must be int"),
        ("model", "width", True, "must be int"),
        ("model", "block_table", 1, "must be bool"),
        ("model", "capacity_factor", "2", "must be float"),
        ("model", "ffn", "moe", "one of 'dense', 'token_choice', 'expert_choice'"),
        ("runtime", "xla_flags", "--xla_a=b", "a sequence of str"),
        ("runtime", "xla_flags", [1], "must be str"),
        ("model", "capacity_factor", 9.0, "at most the number of experts"),
        ("model", "depth", 3, "must be even"),
        ("train", "ema_decay", 1.0, r"must be in [0, 1)"),
        ("mesh", "fsdp", 0, "must be 1 or more"),
        ("data", "image_size", 64, "images of 32 pixels"),
        ("text", "vocab_size", 64, "at least data.vocab_size"),
    ],
)
def test_config_errors_name_key_value_and_what_is_allowed(group, key, value, said):
    changed = values()
    changed[group][key] = value
    with pytest.raises(ConfigError) as error:
        make_experiment(changed)
    name, _, shown = str(error.value).partition(" = ")
    assert name == f"config.{group}.{key}" + ("[0]" if isinstance(value, list) else "")
    assert shown.startswith(f"{value!r}: " if not isinstance(value, list) else "1: ")
    assert said in shown


def test_a_missing_key_and_a_group_that_is_none_are_named():
    changed = values()
    del changed["optimizer"]["warmup_steps"]
    with pytest.raises(ConfigError, match=r"config\.optimizer\.warmup_steps = None: missing; it must be int"):
        make_experiment(changed)
    with pytest.raises(ConfigError, match=r"config\.mesh = 3: must be a group of keys"):
        make_experiment({**values(), "mesh": 3})


def test_ints_are_floats_and_lists_are_tuples():
    changed = values()
    changed["flow"]["time_mean"] = 0
    experiment = make_experiment(changed)
    assert isinstance(experiment.flow.time_mean, float)
    assert isinstance(experiment.runtime.xla_flags, tuple)


def test_num_steps_alone_may_be_set_below_the_warm_up():
    config = emoji_config()
    config.train.num_steps = 3
    assert make_experiment(config).optimizer.warmup_steps > 3
    assert flags.FLAGS is not None
    assert set(TINY) <= set(flatten(config.to_dict()))


def test_a_run_that_diverges_says_where_and_stops(tmp_path, emoji_data, env):
    """With the emoji config's own XLA flags: they may reorder sums, but not hide what is not finite."""
    workdir = tmp_path / "run"
    changes = {
        "optimizer__learning_rate": 1e38,
        "train__num_steps": 50,
        "train__max_bad_steps": 3,
        "checkpoint__every": 2,
    }
    result = refused(
        train_command(workdir, emoji_data, **changes), env, "not finite", "3 steps in a row", "max_bad_steps = 3"
    )
    assert result.returncode == 2
    assert result.stdout.count("SKIPPED: the loss was not finite") == 3
    opened = open_run(workdir)
    for name, array in flat_names(opened.params).items():
        assert np.isfinite(array).all(), name
