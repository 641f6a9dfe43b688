"""Tests sweep files: their points, the points' names, and refusals before anything starts."""

import re

import pytest

from launch.job import check_name, job_name
from launch.sweeps import hyper
from launch.sweeps.hyper import SweepError
from launch.sweeps.points import load_points, names, telling_keys
from tests.runs import ROOT

# Of ml_collections, which loads config files so.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module.. method is deprecated:DeprecationWarning")
WIDTH, FFN, HEADS = "config.model.width", "config.model.ffn", "config.model.heads"


def write(tmp_path, points, constants=f"CONFIG = '{ROOT}/configs/emoji.py'"):
    path = tmp_path / "sweep.py"
    path.write_text(f"{constants}\ndef get_hyper(hyper):\n    return {points}\n")
    return str(path)


def named(points):
    return names(points, telling_keys(points))


def test_a_product_has_every_combination_with_the_last_sweep_changing_first():
    points = hyper.product([hyper.fixed("c", 0), hyper.sweep("a", [1, 2]), hyper.sweep("b", "xy")])
    assert points == [{"c": 0, "a": a, "b": b} for a, b in ((1, "x"), (1, "y"), (2, "x"), (2, "y"))]


def test_a_zip_pairs_points_and_gives_a_single_one_to_all():
    points = hyper.zipit([hyper.sweep("a", [1, 2]), hyper.fixed("c", 0), hyper.sweep("b", [3, 4])])
    assert points == [{"a": 1, "c": 0, "b": 3}, {"a": 2, "c": 0, "b": 4}]
    assert hyper.chainit([points, hyper.sweep("d", [5])]) == [*points, {"d": 5}]


def test_sweeps_that_do_not_go_together_are_refused():
    with pytest.raises(SweepError, match="sweeps of 2, 3 points"):
        hyper.zipit([hyper.sweep("a", [1, 2]), hyper.sweep("b", [1, 2, 3])])
    for put_together in (hyper.product, hyper.zipit):
        with pytest.raises(SweepError, match="a is set by two"):
            put_together([hyper.sweep("a", [1]), hyper.sweep("a", [2])])


def test_names_say_what_tells_points_apart_and_leave_out_what_follows_from_it():
    sizes = hyper.zipit([hyper.sweep(WIDTH, [64, 128]), hyper.sweep(HEADS, [2, 4])])
    points = hyper.product([hyper.fixed("config.train.num_steps", 3), sizes, hyper.sweep(FFN, ["dense", "x_y"])])
    assert named(points) == [f"width-{width}-ffn-{ffn}" for width in (64, 128) for ffn in ("dense", "x-y")]
    # A new value on an axis leaves the other names as they are.
    assert named(hyper.sweep(WIDTH, [64, 128, 256]))[:2] == named(hyper.sweep(WIDTH, [64, 128]))


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (1e-4, "1e-4"),
        (3e-4, "3e-4"),
        (0.5, "0p5"),
        (2.0, "2"),
        (1.5e-5, "1p5e-5"),
        (-1, "m1"),
        (1e20, "1e20"),
        (True, "true"),
    ],
)
def test_values_in_names_are_short(value, word):
    assert named([{"config.a.rate": value}, {"config.a.rate": 7}])[0] == f"rate-{word}"


def test_keys_that_end_alike_and_config_files_are_told_apart():
    assert named([{WIDTH: 1, "config.text.width": 2}, {WIDTH: 1, "config.text.width": 3}, {WIDTH: 2}]) == [
        "model-width-1-text-width-2",
        "model-width-1-text-width-3",
        "model-width-2",
    ]
    assert named(hyper.sweep("config.optimizer.name", ["adamw"])) == ["optimizer-adamw"]
    files = ["configs/ec_dit.py:XL-32E", "configs/emoji.py"]
    assert named(hyper.sweep("config", files)) == ["config-xl-32e", "config-emoji"]


def test_long_names_get_initials_then_digits_and_equal_ones_digits():
    long = "config.model.token_choice_dropless"
    points = hyper.product([hyper.fixed(FFN, "token_choice"), hyper.sweep(long, [True, False])])
    points = hyper.chainit([points, hyper.sweep(FFN, ["dense"])])
    assert named(points) == ["ffn-token-choice-tcd-true", "ffn-token-choice-tcd-false", "ffn-dense"]
    first, second = named(hyper.sweep("config.data.directory", ["/" + "x" * 60 + "1", "/" + "x" * 60 + "2"]))
    assert first[:-6] == second[:-6] == "directory-" + "x" * 23 + "-"
    assert first != second
    one, other = named(hyper.sweep("config.data.directory", ["a-b", "a/b"]))
    assert one != other
    for name in (first, second, one, other):
        assert re.search("-[0-9a-f]{6}$", name)
        assert check_name(name) == name
        assert check_name(job_name(f"gs://bucket/sweep/{name}"))


def test_points_become_flags_of_training(tmp_path):
    points = f"hyper.product([hyper.sweep({WIDTH!r}, [64, 128]), hyper.fixed('config.train.num_steps', 9)])"
    path = write(tmp_path, points, f"CONFIG = '{ROOT}/configs/emoji.py:long'\nSERIES = ({FFN!r}, {HEADS!r})")
    first, second = load_points(path, overrides={"config.train.num_steps": "5", "config.seed": "1"})
    assert first.flags == (
        f"--config={ROOT}/configs/emoji.py:long",
        "--config.model.width=64",
        "--config.train.num_steps=5",
        "--config.seed=1",
    )
    assert first.origin["overrides"] == {"model.width": 64, "train.num_steps": 5, "seed": 1}
    assert (second.experiment.model.width, second.experiment.train.num_steps, second.experiment.seed) == (128, 5, 1)
    assert second.experiment.train.ema_decay == 0.998  # of :long
    assert (second.settings, second.series) == ({WIDTH: 128}, "expert_choice, heads 4")


@pytest.mark.parametrize(
    ("points", "says"),
    [
        ("hyper.sweep('config.model.widht', [1, 2])", "point widht-1: config.model.widht = '1': .* no key 'widht'"),
        ("hyper.sweep('config.model.width', [64, 'x'])", "point width-x: .*width"),
        ("hyper.sweep('config.model.width', [64, 63])", "point width-63: config.model.heads = 4: must divide"),
        ("hyper.sweep('config', ['none.py', 'nowhere.py'])", "point config-none: .*no such config file"),
        ("hyper.sweep('model.width', [64])", "point width-64: model.width: must be config.KEY"),
        ("hyper.sweep('config.model.width', [64, 64])", "two points are the same: {'config.model.width': 64}"),
        ("[]", "has no points"),
    ],
)
def test_what_cannot_be_run_is_refused_by_the_name_of_the_point(tmp_path, points, says):
    with pytest.raises(SweepError, match=says):
        load_points(write(tmp_path, points))


def test_what_is_wrong_with_the_file_or_the_flags_is_refused(tmp_path):
    two = f"hyper.sweep({WIDTH!r}, [64, 128])"
    with pytest.raises(SweepError, match="is swept by"):
        load_points(write(tmp_path, two), overrides={WIDTH: "32"})
    with pytest.raises(SweepError, match="the config of point width-64 has no such key"):
        load_points(write(tmp_path, two, f"CONFIG = '{ROOT}/configs/emoji.py'\nSERIES = ('config.nothing',)"))
    with pytest.raises(SweepError, match="names no config file"):
        load_points(write(tmp_path, two, ""))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(SweepError, match="has no get_hyper"):
        load_points(str(tmp_path / "empty.py"))


@pytest.mark.parametrize(("name", "size"), [("model_sizes", 9), ("experts", 6), ("routing", 6), ("learning_rate", 6)])
def test_the_sweeps_that_come_with_the_code_are_sound(name, size):
    points = load_points(f"{ROOT}/configs/sweeps/{name}.py", config=f"{ROOT}/configs/emoji.py")
    assert len(points) == len({point.name for point in points}) == size
    assert not any(re.search("-[0-9a-f]{6}$", point.name) for point in points)
