import pytest

from ecdit.data.memory import fitting, free_bytes

MEMINFO = "MemTotal:       32000 kB\nMemAvailable:   20000 kB\nHugePages_Total:       0\n"
FREE = 20000 * 1024


def machine(root, **files):
    """The files of a kernel; `__` in a name stands for a slash, `_DOT_` for a dot."""
    for name, text in {"proc__meminfo": MEMINFO, **files}.items():
        path = root / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_free_memory_is_the_machine_s_where_no_container_has_less(tmp_path):
    assert free_bytes(machine(tmp_path / "plain")) == FREE
    version_2 = {"sys__fs__cgroup__memory_DOT_current": "7\n", "sys__fs__cgroup__memory_DOT_stat": "anon 5\n"}
    unlimited = machine(tmp_path / "2", sys__fs__cgroup__memory_DOT_max="max\n", **version_2)
    assert free_bytes(unlimited) == FREE
    assert free_bytes() > 0


def test_a_kernel_that_does_not_say_what_is_free_leaves_all_that_the_machine_has(tmp_path):
    assert free_bytes(tmp_path) >= free_bytes()


def test_a_container_has_what_its_limit_leaves_and_the_kernel_would_take_back(tmp_path):
    files = {
        "memory_DOT_max": "9000\n",
        "memory_DOT_current": "5000\n",
        "memory_DOT_stat": "anon 3\ninactive_file 1000\n",
    }
    second = machine(tmp_path / "2", **{f"sys__fs__cgroup__{name}": text for name, text in files.items()})
    assert free_bytes(second) == 9000 - 5000 + 1000
    files = {
        "memory_DOT_limit_in_bytes": "9000\n",
        "memory_DOT_usage_in_bytes": "8500\n",
        "memory_DOT_stat": "inactive_file 1\ntotal_inactive_file 100\n",
    }
    first = machine(tmp_path / "1", **{f"sys__fs__cgroup__memory__{name}": text for name, text in files.items()})
    assert free_bytes(first) == 9000 - 8500 + 100


@pytest.mark.parametrize(
    ("wanted", "each", "free", "expected", "why"),
    [
        (8, 10e9, 80e9, 8, ""),
        (8, 10e9, 79e9, 7, "7 of 8 processes: each takes about 10.0 GB, and 79.0 GB of memory are free"),
        (1, 10e9, 9e9, 1, "one process, which may be killed: each takes about 10.0 GB, and 9.0 GB of memory are free"),
        (8, 0, 0, 8, ""),
    ],
)
def test_as_many_processes_run_as_fit_and_at_least_one(wanted, each, free, expected, why):
    assert fitting(wanted, int(each), int(free)) == (expected, why)
