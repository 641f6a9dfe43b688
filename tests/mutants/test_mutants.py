"""Tests that the list of mutants fits the program and its tests; `python -m tests.mutants` runs it."""

import ast
import difflib
import functools

import pytest

from tests.mutants.__main__ import AREAS, ROOT, all_mutants, first_failure
from tests.mutants.mutant import Mutant

MUTANTS = all_mutants()


def test_there_are_many():
    assert len(MUTANTS) >= 90


@functools.cache
def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


@functools.cache
def syntax_of(name):
    return ast.dump(ast.parse(text_of(name)))


@functools.cache
def functions_of(name):
    return {node.name for node in ast.parse(text_of(name)).body if isinstance(node, ast.FunctionDef)}


@pytest.fixture(params=AREAS)
def mutants(request):
    return [mutant for area, mutant in MUTANTS if area == request.param]


def test_a_mutant_changes_a_line_or_two_of_the_program(mutants, tmp_path):
    """What it makes of its file is Python, and not the same program."""
    assert mutants
    for mutant in mutants:
        before, path = text_of(mutant.file), tmp_path / mutant.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(before, encoding="utf-8")
        mutant.apply(tmp_path)
        after = path.read_text(encoding="utf-8")
        assert ast.dump(ast.parse(after)) != syntax_of(mutant.file), mutant
        changes = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0)
        assert 1 <= sum(line.startswith("-") for line in changes) - 1 <= 2, mutant  # one such line is the diff's head
        assert mutant.file.startswith(("ecdit/", "launch/"))


def test_a_mutant_names_tests_that_there_are(mutants):
    for mutant in mutants:
        assert mutant.tests
        for node in mutant.tests:
            file, _, test = node.partition("::")
            assert file.rpartition("/")[2].startswith("test_"), node
            assert (ROOT / file).is_file(), node
            assert not test or test.partition("[")[0] in functions_of(file), node


def test_no_mutant_is_listed_twice():
    changes = [(mutant.file, mutant.old, mutant.new) for _, mutant in MUTANTS]
    assert len(set(changes)) == len(changes)


def test_no_area_is_called_like_a_file_of_tests():
    """So that pytest collects this file alone."""
    assert [path.name for path in (ROOT / "tests/mutants").glob("test_*.py")] == ["test_mutants.py"]


@pytest.mark.parametrize("old", ["no such line", "import"])
def test_a_mutant_that_has_no_place_or_several_is_an_error(old, tmp_path):
    (tmp_path / "a.py").write_text("import a\nimport b\n")
    with pytest.raises(ValueError, match=r"a\.py has \d times, not once"):
        Mutant("a.py", old, "new", ()).apply(tmp_path)


@pytest.mark.parametrize(
    ("cases", "found"),
    [
        ('<testcase classname="a" name="b"/>', ""),
        ('<testcase classname="" name="a"><error message="collection failure">SyntaxError</error></testcase>', ""),
        ('<testcase classname="a" name="b"><failure message="assert 1&#10; == 2"/></testcase>', "a::b: assert 1 == 2"),
        ('<testcase classname="a" name="b"><error message="failed on setup"/></testcase>', "a::b: failed on setup"),
    ],
)
def test_a_file_that_cannot_be_imported_is_no_test_that_failed(cases, found, tmp_path):
    """Else every mutant that breaks an import would count as noticed."""
    (tmp_path / "report.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    assert first_failure(tmp_path / "report.xml") == found
