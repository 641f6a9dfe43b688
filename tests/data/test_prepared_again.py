"""Tests preparing again after the user's file or the prepared data has changed."""

import dataclasses
import shutil
import threading
from fractions import Fraction
from pathlib import Path

import pytest

from ecdit.data import DataError
from ecdit.data.columns import make_column
from ecdit.data.loader import row_reader
from ecdit.data.manifest import read_records_manifest, task_directory
from ecdit.data.preparation import check_sources, prepare_records, prepare_share
from ecdit.data.prepared import open_prepared, prepare, stored_records
from ecdit.data.registry import find_parts
from ecdit.data.shares import Share
from ecdit.data.verification import verify
from tests.data.example import make_config, module
from tests.runs import tiny

PLAIN = {"crop_padding": 0, "flip_probability": 0}


def quiet(_):
    pass


def rewrite(path, old, new, tasks, mixtures=()):
    """Edits the user's file, and forgets its tasks as a new process would."""
    import seqio

    for registry, names in ((seqio.TaskRegistry, tasks), (seqio.MixtureRegistry, mixtures)):
        for name in names:
            registry.remove(name)
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new))


def keys(config):
    return [record.key for record in stored_records(open_prepared(config), "train")]


ODD_OR_EVEN = """
import dataclasses

@dataclasses.dataclass(frozen=True)
class Half(Counted):
    def stamp(self, part):
        return "the same files"

    def read(self, part):
        return (pair for pair in super().read(part) if pair.columns["number"] % 2 == 0)

add_task("half", Half(40))
"""


def test_a_preparation_begun_with_another_file_of_the_user_does_not_go_on(tmp_path, monkeypatch):
    """Otherwise the first parts would have even keys and the others odd ones."""
    import ecdit.data.preparation as preparation

    where = module(tmp_path, "unused_half", "1", ODD_OR_EVEN)
    config, done = make_config(tmp_path / "data", module=where, task="half", vocab_size=300), []
    real = preparation.write_part

    def stop_at_the_third(*arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        real(*arguments)
        done.append(arguments)

    monkeypatch.setattr(preparation, "write_part", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, say=quiet)
    monkeypatch.undo()
    rewrite(where, "% 2 == 0", "% 2 == 1", ["half", "unused_half"])
    with pytest.raises(DataError, match=r"\.half\.preparing was begun with other settings .* another data\.module"):
        prepare(config, say=quiet)
    shutil.rmtree(tmp_path / "data" / ".half.preparing")
    prepare(config, say=quiet)
    assert keys(config) == [f"key{i}" for i in range(1, 40, 2)]


def test_records_of_another_file_of_the_user_are_refused_until_they_are_said_to_be_the_same(tmp_path):
    where = module(tmp_path, "grows", "20")
    config, said = make_config(tmp_path / "data", module=where, task="grows", vocab_size=300), []
    prepare(config, say=quiet)
    rewrite(where, "Counted(20)", "Counted(40)", ["grows"])
    for _ in range(2):  # the first refusal changes nothing that lets the second call pass
        with pytest.raises(DataError, match=r"data/grows was prepared with another .*grows\.py.*--same_source"):
            prepare(config, say=quiet)
    prepare(config, say=said.append, same_source=True)
    assert any("was prepared with another" in line for line in said)
    assert prepare(config, say=quiet).num_records == 20  # composition.json has the answer
    shutil.rmtree(task_directory(config))
    assert prepare(config, say=quiet).num_records == 40


def test_records_of_a_source_that_has_changed_are_refused_until_they_are_said_to_be_the_same(tmp_path, monkeypatch):
    where = module(tmp_path, "replaced", "20")
    config, said = make_config(tmp_path / "data", module=where, task="replaced", vocab_size=300), []
    check_sources(config, said.append, False)  # nothing is prepared
    prepare(config, say=quiet)
    check_sources(config, said.append, False)
    assert said == []
    monkeypatch.setattr("tests.data.example.Counted.stamp", lambda self, part: f"later {part}")
    before = (task_directory(config) / "dataset.json").read_bytes()
    with pytest.raises(DataError, match=r"the source of .*data/replaced has changed since .*--same_source"):
        check_sources(config, said.append, False)
    assert (task_directory(config) / "dataset.json").read_bytes() == before
    check_sources(config, said.append, True)
    assert said.pop().endswith("its records are kept")
    check_sources(config, said.append, False)
    monkeypatch.setattr("tests.data.example.Counted.parts", lambda self: ("part 0", "part 1", "part 2"))
    with pytest.raises(DataError, match="has changed since"):
        check_sources(config, said.append, False)

    def gone(self, part):
        raise FileNotFoundError(part)

    monkeypatch.setattr("tests.data.example.Counted.stamp", gone)
    check_sources(config, said.append, False)
    assert "is prepared, and its source cannot be compared with it: part 0" in said.pop()
    assert prepare(config, say=quiet).num_records == 20


def test_a_predicate_of_another_file_belongs_to_the_source(tmp_path, monkeypatch):
    """A predicate must be a function of a module, so it is seldom in `data.module` itself."""
    monkeypatch.syspath_prepend(tmp_path)
    other = tmp_path / "my_predicate.py"
    other.write_text("def even(pair):\n    return pair.columns['number'] % 2 == 0\n")
    keeps = """
import dataclasses
from typing import Any
import my_predicate

@dataclasses.dataclass(frozen=True)
class Kept(Counted):
    keep: Any = my_predicate.even

add_task("kept", Kept(20))
"""
    where = module(tmp_path, "unused_kept", "1", keeps)
    config = make_config(tmp_path / "data", module=where, task="kept", vocab_size=300)
    prepare(config, say=quiet)
    check_sources(config, pytest.fail, False)
    other.write_text(other.read_text().replace("== 0", "== 1"))
    with pytest.raises(DataError, match="has changed since"):
        check_sources(config, pytest.fail, False)
    shutil.rmtree(task_directory(config))
    prepare_share(config, Share(0, 2), 1, quiet)
    other.write_text(other.read_text().replace("== 1", "== 0"))
    with pytest.raises(DataError, match=r"was begun with other settings or other input, or another data\.module"):
        prepare(config, say=quiet)


def test_rates_that_cannot_be_mixed_are_refused_before_anything_is_prepared(tmp_path):
    more = 'add_mixture("odd", [("odd_part", 12_000_000.0), ("shapes", 5_000_001.0)])'
    config = make_config(tmp_path / "data", module=module(tmp_path, "odd_part", "10", more), task="odd", **PLAIN)
    with pytest.raises(DataError, match="of a mixture repeat after"):
        prepare(config, say=quiet)
    assert not (tmp_path / "data").exists()


def test_a_half_of_a_third_is_a_sixth(tmp_path):
    """A mixture within a mixture has rates that no decimal has."""
    more = """
import seqio
add_mixture("thirds", [("inner", 1), ("shapes", 2)])
seqio.MixtureRegistry.add("nested", [("thirds", 0.5), ("shapes_textured", 0.5)])
"""
    config = make_config(tmp_path, module=module(tmp_path, "inner", "1", more), task="nested")
    rates = {part.task: part.rate for part in find_parts(config)}
    assert rates == {"inner": Fraction(1, 6), "shapes": Fraction(1, 3), "shapes_textured": Fraction(1, 2)}


def test_parts_of_a_mixture_are_not_shuffled_alike(tmp_path):
    """Otherwise two parts of the same images, such as alt texts and recaptions, give each image twice in a row."""
    more = 'add_task("twin", Counted(60))\nadd_mixture("twins", [("first_twin", 0.5), ("twin", 0.5)])'
    where = module(tmp_path, "first_twin", "60", more)
    config = make_config(tmp_path / "data", module=where, task="twins", vocab_size=300, **PLAIN)
    prepared = prepare(config, say=quiet)
    read = row_reader(prepared, 5)
    rows = [int(read(row).content[0, 0, 0]) for row in range(120)]
    first, second = rows[::2], rows[1::2]
    assert sorted(first) == sorted(second) == list(range(60))
    assert sum(one == other for one, other in zip(first, second, strict=True)) < 8
    alone = dataclasses.replace(config, task="first_twin")
    read = row_reader(prepare(alone, say=quiet), 5)
    assert [int(read(row).content[0, 0, 0]) for row in range(60)] == first  # as without a mixture


def test_records_of_a_task_of_the_package_belong_to_no_file_of_the_user(tmp_path, emoji_data):
    more = 'add_mixture("with_emoji", [("emoji", 0.5), ("shapes", 0.5)])'
    where = module(tmp_path, "beside_emoji", "1", more)
    shutil.copytree(emoji_data / "emoji", tmp_path / "data" / "emoji")
    alone = tiny(data__directory=str(tmp_path / "data")).data
    config = dataclasses.replace(alone, module=where, task="with_emoji", **PLAIN)
    assert prepare(config, say=quiet).stored[0].manifest == read_records_manifest(alone, "emoji")
    rewrite(where, '("emoji", 0.5)', '("emoji", 0.25)', ["beside_emoji"], ["with_emoji"])
    assert [one.rate for one in prepare(config, say=quiet).composition.components] == ["1/4", "1/2"]


def test_two_preparations_at_once_train_one_tokenizer(tmp_path, monkeypatch):
    """The second begins while the first trains; it waits, and takes the first one's."""
    from ecdit.data import tokens

    config = make_config(tmp_path / "data", module=module(tmp_path, "twice", "20"), task="twice", vocab_size=300)
    composition, real, made, trained = prepare_records(config, 1, quiet), tokens.train_vocabulary, [], []
    second = threading.Thread(target=lambda: made.append(tokens.make_tokenizer(config, composition)))

    def train(captions, size, path, words):
        trained.append(path)
        if len(trained) == 1:
            second.start()
            second.join(1)  # it cannot end before this one
        real(captions, size, path, words)

    monkeypatch.setattr(tokens, "train_vocabulary", train)
    first = tokens.make_tokenizer(config, composition)
    second.join()
    assert (made, len(trained)) == ([first], 1)


def test_a_trained_tokenizer_that_stays_after_its_captions_changed_is_named(tmp_path):
    """By other caption fields, other rates of a mixture, or other records; not by other rates of the same fields."""
    more = 'add_mixture("kept_and_shapes", [("kept_tokens", 0.5), ("shapes", 0.5)])'
    where = module(tmp_path, "kept_tokens", "20", more)
    config = make_config(tmp_path / "data", module=where, task="kept_and_shapes", vocab_size=512, **PLAIN)
    first = prepare(config, say=quiet).tokenizer.read_bytes()

    def lines(config):
        said = []
        assert prepare(config, say=said.append, same_source=True).tokenizer.read_bytes() == first
        return sum("was trained on other records, rates or caption fields, and stays" in line for line in said)

    assert lines(config) == 0
    assert lines(dataclasses.replace(config, captions={"caption": 3.0, "other": 0.0})) == 0
    assert lines(dataclasses.replace(config, captions={"caption": 1.0, "other": 1.0})) == 1
    rewrite(where, '"kept_tokens", 0.5', '"kept_tokens", 0.25', ["kept_tokens"], ["kept_and_shapes"])
    assert lines(config) == 1
    rewrite(where, '"kept_tokens", 0.25', '"kept_tokens", 0.50', ["kept_tokens"], ["kept_and_shapes"])
    assert lines(config) == 0
    rewrite(where, "Counted(20)", "Counted(21)", ["kept_tokens"], ["kept_and_shapes"])
    shutil.rmtree(task_directory(config, "kept_tokens"))
    assert lines(config) == 1


def test_a_deleted_part_of_a_mixture_is_prepared_again(tmp_path):
    more = 'add_mixture("deleted_and_shapes", [("deleted_part", 0.5), ("shapes", 0.5)])'
    config = make_config(
        tmp_path / "data",
        module=module(tmp_path, "deleted_part", "20", more),
        task="deleted_and_shapes",
        vocab_size=512,
        **PLAIN,
    )
    before = prepare(config, say=quiet)
    shutil.rmtree(task_directory(config, "deleted_part"))
    assert prepare(config, say=quiet).fingerprint == before.fingerprint


@dataclasses.dataclass(frozen=True)
class Lengths:
    """A column that no config names."""

    name: str = "latents-lengths"
    made_by: str = ""
    process_bytes: int = 0

    def values(self, records):
        yield from ((str(len(record.image)).encode(), {}) for record in records)


def test_verify_reads_every_column_and_names_all_that_is_damaged(tmp_path):
    config = make_config(tmp_path / "data", module=module(tmp_path, "seen", "20"), task="seen", vocab_size=300)
    prepare(config, say=quiet)
    task = task_directory(config)
    make_column(task, read_records_manifest(config, "seen"), Lengths(), 1, quiet)
    verify(config, quiet)
    shards = [task / "columns/latents-lengths" / part / "train.array_record" for part in ("000000", "000001")]
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    shards[1].unlink()
    with pytest.raises(DataError, match="2 of 6 shards are damaged") as error:
        verify(config, quiet)
    assert all(str(shard) in str(error.value) for shard in shards)


def test_verify_names_missing_records_that_a_run_of_latents_would_not_read(tmp_path):
    where = module(tmp_path, "unread", "20")
    images = make_config(tmp_path / "data", module=where, task="unread", vocab_size=300, **PLAIN)
    prepare(images, say=quiet)
    task = task_directory(images)
    make_column(task, read_records_manifest(images, "unread"), Lengths(), 1, quiet)
    config = dataclasses.replace(images, latent_channels=4, latents="lengths")
    (task / "000000/train.array_record").unlink()
    with pytest.raises(DataError, match=r"1 of 6 shards are damaged:\n  .*000000/train\.array_record: cannot be read"):
        verify(config, quiet)
