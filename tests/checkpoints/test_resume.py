"""Tests that damaged checkpoints are found and set aside, and that runs resume from older ones, with a toy model."""

import contextlib
import json
import shutil

import jax
import pytest

from ecdit.checkpoints import arrays, restore
from ecdit.checkpoints.arrays import DamagedError
from ecdit.checkpoints.config import CheckpointConfig
from ecdit.checkpoints.inspection import verify
from ecdit.checkpoints.restore import CheckpointError
from ecdit.checkpoints.resume import newest_valid
from ecdit.errors import UserError
from tests.checkpoints.damage import flip_array, flip_meta
from tests.checkpoints.toy import toy_abstract


def steps(toy):
    return sorted(int(path.name) for path in (toy.workdir / "checkpoints").iterdir() if path.name.isdigit())


def aside(toy):
    return sorted(path.name for path in (toy.workdir / "checkpoints/damaged").glob("*"))


@pytest.mark.parametrize("damage", [flip_array, flip_meta, lambda path: shutil.rmtree(path / "meta")])
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_run_ends_as_if_nothing_was(toy, capsys, damage):
    toy.train(num_steps=6, every=2)
    damage(toy.workdir / "checkpoints/6")
    assert toy.train(num_steps=9, every=2) == 0
    said = capsys.readouterr().out
    assert f"{toy.workdir}/checkpoints/6 " in said
    assert f"it is now {toy.workdir}/checkpoints/damaged/6" in said
    assert "resumed from step 4" in said
    assert toy.losses() == [(step, float(step)) for step in range(1, 10)]
    assert toy.saved() == {step: {(float(step),)} for step in (2, 4, 6, 8, 9)}
    assert aside(toy) == ["6"]


def test_whichever_file_of_the_newest_checkpoint_is_gone_the_run_ends_as_if_nothing_was(toy):
    """Each but the arrays' data and their index in turn; those that are not needed are not missed.

    (Where several arrays cannot be read, Orbax leaves threads behind that report to a closed event loop.)
    """
    toy.train(num_steps=4, every=2)
    whole = toy.workdir.with_name("whole")
    shutil.copytree(toy.workdir, whole)
    paths = sorted((whole / "checkpoints/4").rglob("*"))
    others = [path for path in paths if path.is_file() and path.parent.name != "d" and path.name != "manifest.ocdbt"]
    files = [path.relative_to(whole) for path in others]
    found = set()
    for file in files:
        shutil.rmtree(toy.workdir)
        shutil.copytree(whole, toy.workdir)
        (toy.workdir / file).unlink()
        assert toy.train(num_steps=5, every=5) == 0, file
        assert toy.losses() == [(step, float(step)) for step in range(1, 6)], file
        found |= {file.name} if aside(toy) == ["4"] else set()
    assert {"metadata", "_METADATA"} <= found


def test_two_damaged_ones_and_one_that_was_damaged_before(toy):
    toy.train(num_steps=6, every=2)
    for again in range(2):
        for step in (4, 6):
            flip_array(toy.workdir / f"checkpoints/{step}")
        assert toy.train(num_steps=6, every=2) == 0
        assert steps(toy) == [2, 4, 6]
        assert len(aside(toy)) == 2 + 2 * again
    assert aside(toy) == ["4", "4-2", "6", "6-2"]


def test_where_none_is_sound_nothing_is_moved_and_no_run_begins_at_step_0(toy):
    toy.train(num_steps=4, every=2)
    for step in (2, 4):
        flip_array(toy.workdir / f"checkpoints/{step}")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"no checkpoint .* is valid:\n.*checkpoints/4 .*\n.*checkpoints/2 "):
            toy.train(num_steps=9, every=2)
    assert steps(toy) == [2, 4]
    assert toy.losses()[-1] == (4, 4.0)


def test_another_model_is_no_damage(toy, monkeypatch):
    """Nor is a run of other data: the checkpoint stays where it is."""
    toy.train(num_steps=4, every=2)
    with pytest.raises(CheckpointError, match=r"config\.seed"):
        toy.train(num_steps=6, every=2, seed=3)
    monkeypatch.setattr(arrays, "FORMAT", 6)
    with pytest.raises(CheckpointError, match="format 5"):
        toy.train(num_steps=6, every=2)
    assert steps(toy) == [2, 4]
    assert not aside(toy)


@pytest.mark.parametrize("every", [1, 2])
def test_in_the_background_damage_stops_the_run_before_anything_is_saved(toy, every):
    """The first save of the resumed run would be after its first step, or its second."""
    toy.train(num_steps=6, every=2)
    flip_array(toy.workdir / "checkpoints/6")
    with pytest.raises(DamagedError, match="params/denoiser/head") as error:
        toy.train(num_steps=9, every=every, checkpoint__verify="background")
    assert f"{toy.workdir}/checkpoints/damaged/6" in str(error.value)
    assert steps(toy) == [2, 4]
    assert toy.train(num_steps=9, every=2, checkpoint__verify="background") == 0
    assert toy.losses() == [(step, float(step)) for step in range(1, 10)]


@pytest.mark.parametrize(
    "changes", [{}, {"evaluation__every": 6, "evaluation__loss_images": 1}], ids=["draws", "evaluates"]
)
def test_in_the_background_damage_stops_a_run_that_has_no_step_left(toy, changes):
    """Otherwise it would draw or evaluate the damaged weights, and say that it is done."""
    toy.train(num_steps=6, every=2)
    toy.drawn.clear()
    flip_array(toy.workdir / "checkpoints/6")
    with pytest.raises(DamagedError, match="params/denoiser/head"):
        toy.train(num_steps=6, every=2, checkpoint__verify="background", **changes)
    assert steps(toy) == [2, 4]
    assert (toy.evaluated, toy.drawn) == ([], {})


def test_in_the_background_the_only_checkpoint_stays_and_no_run_goes_on_from_it(toy):
    toy.train(num_steps=2, every=2)
    flip_array(toy.workdir / "checkpoints/2")
    for _ in range(2):
        with pytest.raises(DamagedError, match="the only one"):
            toy.train(num_steps=9, every=1, checkpoint__verify="background")
        assert steps(toy) == [2]


ARRAYS = [
    *("bad_in_row", "bad_steps", "ema.denoiser.head", "ema.denoiser.tail", "optimizer.count"),
    *("params.denoiser.head", "params.denoiser.tail", "step", "usual_loss"),
]


@pytest.mark.parametrize("verify", ["always", "background"])
def test_a_damaged_checkpoint_stays_where_it_is_if_the_lease_was_lost(toy, verify):
    """Another trainer may have saved that step meanwhile."""
    toy.train(num_steps=4, every=2)
    flip_array(toy.workdir / "checkpoints/4", "step")
    config = CheckpointConfig(every=1, keep_every=0, keep=9, init_from="", verify="always", max_failed_saves=0)

    def lost():
        raise UserError("the lease was lost")

    with restore.open_manager(toy.workdir, config) as manager:
        resumed = lambda permit: newest_valid(manager, toy_abstract(), verify, lambda *_: None, permit).check()  # noqa: E731
        with pytest.raises(UserError, match="the lease was lost"):
            resumed(lost)
        assert sorted(manager.all_steps()) == [2, 4]
        with pytest.raises(DamagedError) if verify == "background" else contextlib.nullcontext():
            resumed(lambda: None)
        assert sorted(manager.all_steps()) == [2]


def test_a_flipped_bit_of_any_array_is_found_by_each_way_to_verify(toy):
    """The optimizer and the counters are checked too: a run with a wrong moment would go on without an error."""
    toy.train(num_steps=2, every=2)
    directory = toy.workdir / "checkpoints/2"
    assert sorted(name.replace("/", ".") for name in arrays.stored_arrays(directory)) == ARRAYS
    config = CheckpointConfig(every=1, keep_every=0, keep=9, init_from="", verify="always", max_failed_saves=0)
    with restore.open_manager(toy.workdir, config) as manager:

        def resumed(verify):
            newest_valid(manager, toy_abstract(), verify, lambda meta, step: None).check()

        ways = [lambda: resumed("always"), lambda: resumed("background")]
        ways.append(lambda: restore.restore(manager, 2, toy_abstract()))
        for names in (ARRAYS[:5], ARRAYS[5:]):  # a message has five at most
            for name in names:
                flip_array(directory, name)
            for way in ways:
                said = rf"is damaged: {', '.join(names).replace('.', '/')}: not what was saved"
                with pytest.raises(CheckpointError, match=said):
                    way()
            for name in names:
                flip_array(directory, name)
        for way in ways:
            way()


def test_never_looks(toy):
    toy.train(num_steps=4, every=2)
    flip_array(toy.workdir / "checkpoints/4")
    assert toy.train(num_steps=6, every=2, checkpoint__verify="never") == 0
    assert not aside(toy)


def test_what_a_killed_save_left_is_named(toy, capsys):
    toy.train(num_steps=2, every=2)
    (toy.workdir / "checkpoints/4.orbax-checkpoint-tmp/state").mkdir(parents=True)
    assert toy.train(num_steps=4, every=2) == 0
    assert "a save was cut short: 4.orbax-checkpoint-tmp is removed" in capsys.readouterr().out
    assert steps(toy) == [2, 4]


def test_every_flipped_bit_of_the_json_is_found(toy):
    toy.train(num_steps=2, every=2)
    directory = toy.workdir / "checkpoints/2"
    path = directory / "meta" / "metadata"
    data = path.read_bytes()
    before = arrays.read_json(directory)
    key = data.index(b'"digest"')
    for place in [*range(0, len(data), 7), *range(key, key + 8)]:  # without its digest, meta would vouch for nothing
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            assert arrays.read_json(directory) == before, place  # a space that became a tab
        except DamagedError:
            continue
        assert chr(data[place]).isspace(), place


def test_a_checkpoint_of_another_format_is_refused_and_no_damage(toy):
    """Format 2 had no digest; a later one has, and it is right."""
    toy.train(num_steps=2, every=2)
    directory = toy.workdir / "checkpoints/2"
    path = directory / "meta" / "metadata"
    values = {k: v for k, v in json.loads(path.read_text()).items() if k != "digest"}
    for number, digest in ((2, False), (6, True)):
        other = values | {"format": number}
        path.write_text(json.dumps(arrays.meta_json(other) if digest else other))
        with pytest.raises(CheckpointError, match=f"format {number}, this version reads 5") as error:
            arrays.read_records(directory)
        assert not isinstance(error.value, DamagedError)
    path.write_text(json.dumps(values))
    with pytest.raises(DamagedError, match="its meta differs from what was saved"):
        arrays.read_records(directory)


def test_an_array_that_is_of_another_type_than_was_saved_is_damage(toy, monkeypatch):
    """The reading library would cast it, and say nothing."""
    toy.train(num_steps=2, every=2)
    found = arrays.stored_arrays(toy.workdir / "checkpoints/2") | {"ema/denoiser/tail": "bfloat16[3]"}
    monkeypatch.setattr(arrays, "stored_arrays", lambda directory: found)
    with (
        restore.open_reader(toy.workdir) as manager,
        pytest.raises(DamagedError, match=r"ema/denoiser/tail, saved as float32\[3\], is now bfloat16\[3\]"),
    ):
        restore.restore(manager, 2, toy_abstract())


@pytest.mark.parametrize(("shape", "dtype"), [((4,), "float32"), ((3,), "bfloat16")])
def test_an_array_that_this_run_needs_otherwise_is_no_damage(toy, shape, dtype):
    """It is another model's: a run that called it damage would set its checkpoints aside."""
    toy.train(num_steps=2, every=2)
    abstract = toy_abstract()
    abstract.ema["denoiser"]["tail"] = jax.ShapeDtypeStruct(shape, dtype, sharding=abstract.step.sharding)
    with (
        restore.open_reader(toy.workdir) as manager,
        pytest.raises(CheckpointError, match="this run needs") as error,
    ):
        restore.restore(manager, 2, abstract)
    assert not isinstance(error.value, DamagedError)


def test_verify_names_the_array_that_was_damaged(toy):
    toy.train(num_steps=4, every=2)
    flip_array(toy.workdir / "checkpoints/2", "ema.denoiser.tail")
    with restore.open_reader(toy.workdir) as manager:
        two, four = verify(manager)
    assert (list(two.damage), four.damage) == (["ema/denoiser/tail"], {})
