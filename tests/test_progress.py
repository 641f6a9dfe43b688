"""Tests what is shown of long work: a bar on a terminal, and at most a line every 30 seconds elsewhere."""

import io
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from ecdit import progress
from ecdit.progress import duration, each, line_of


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until the test moves it."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


class Terminal(io.StringIO):
    def isatty(self):
        return True


def work(clock, seconds, count, **arguments):
    """Does `count` items that take `seconds` each, and returns them."""
    done = []
    for item in each(range(count), "sampling", "images", **arguments):
        clock.now += seconds
        done.append(item)
    return done


def test_a_log_gets_a_line_every_30_seconds_with_the_share_the_rate_and_the_time_left(clock, capsys):
    assert work(clock, 4, 20, total=30, begun=10) == list(range(20))
    assert capsys.readouterr() == (
        "",
        "sampling: 18 of 30 images (60%), 4 s each, 1 min left\n"  # 8 in 32 s, 12 are left
        "sampling: 26 of 30 images (87%), 4 s each, 1 min left\n",
    )


def test_neither_short_work_nor_the_end_of_a_long_one_prints_a_line(clock, capsys):
    """What comes next in the log says that it is done."""
    work(clock, 1, 29, total=30)
    work(clock, 40, 1, total=1)
    assert capsys.readouterr() == ("", "")


def test_other_processes_print_nothing(clock, capsys):
    assert work(clock, 40, 3, total=3, shown=False) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_the_rate_is_that_of_the_last_ten_lines(clock, capsys):
    """The first image waits 1000 s for the compiler; after ten lines that does not count any more."""
    with progress.progress("sampling", "images", 2000) as update:
        clock.now += 1000
        update(1)
        for _ in range(11):
            clock.now += 50
            update(100)
    lines = capsys.readouterr().err.splitlines()
    assert "0.001" not in lines[0]
    assert lines[0].endswith("1000 s each, 555.3 hours left")  # 1999 images of 1000 s
    assert lines[9].startswith("sampling: 901 of 2000 images (45%), 1.61 s each")  # 901 in 1450 s
    assert lines[10].startswith("sampling: 1001 of 2000 images (50%), 2 images/s")  # 1000 in 500 s


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("images", 50, 200, 2.5), "x: 50 of 200 images (25%), 2.5 images/s, 1 min left"),
        (("records", 5, 10**6, 10.0), "x: 5 of 1000000 records (0%), 10 records/s, 27.8 hours left"),
        (("pairs", 700, None, 70.0), "x: 700 pairs, 70 pairs/s"),
        (("parts", 3, 8, 0.0), "x: 3 of 8 parts (38%), 0 parts/s"),
        (("parts", 7, 8, 0.001), "x: 7 of 8 parts (88%), 1000 s each, 17 min left"),
    ],
)
def test_a_line_in_words(arguments, line):
    assert line_of("x", *arguments) == line


def test_durations_are_rounded_up_to_minutes_or_given_in_hours():
    assert [duration(seconds) for seconds in (0, 1, 61, 5940, 6000)] == [
        "0 min",
        "1 min",
        "2 min",
        "99 min",
        "1.7 hours",
    ]


def test_a_terminal_has_a_bar_and_no_lines(monkeypatch, clock):
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    assert work(clock, 40, 3, total=5, begun=2) == [0, 1, 2]
    shown = terminal.getvalue()
    assert "sampling: 100%" in shown
    assert "5/5" in shown
    assert " left" not in shown


def test_nothing_else_shows_a_bar():
    folder = Path(progress.__file__).parent
    importing = [
        path.name for path in folder.rglob("*.py") if re.search(r"^\s*(from|import) tqdm", path.read_text(), re.M)
    ]
    assert importing == ["progress.py"]
