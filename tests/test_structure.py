"""Tests the rules that keep the code readable: one-way imports, short files and functions, documented public names."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

ROOT = Path(__file__).parents[1]
# Each layer may import itself and those before it.
LAYERS = [
    "foundation",
    "diffusion",
    "tuned",
    "models",
    "encoders",
    "pretrained",
    "system",
    "interop",
    "data",
    "sampling",
    "training",
    "checkpoints",
    "reporting",
    "evaluation",
    "experiment",
    "recipe",
    "runs",
    "planning",
    "commands",
    "launch",
]
# The modules of ecdit/ that are no commands. Three more, `system`, `experiment` and `recipe`, are layers of their own.
FOUNDATION = {
    "errors",
    "exit_codes",
    "config",
    "files",
    "storage",
    "command_line",
    "components",
    "runtime",
    "multihost",
    "chips",
    "topology",
    "partitioning",
    "patches",
    "functions",
    "json_lines",
    "progress",
}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 80
# Heavy, or in an extra that training does not install.
# These are imported by what prepares data, inside functions.
PREPARING = {"ecdit.data.tasks", "ecdit.data.tensorflow_pairs"}
LAZY = ["tensorflow", "torch", "transformers", "diffusers", "wandb", "tensorboardX"]

FILES = sorted(
    path.relative_to(ROOT).as_posix() for folder in ("ecdit", "launch") for path in (ROOT / folder).rglob("*.py")
)
MODULES = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in FILES}
# These are copied into exported folders, where PyTorch imports them. They need nothing of the package.
EXPORTED = {module for module in MODULES if module.startswith("ecdit.interop.pytorch.")}


def layer(module: str) -> str:
    """The layer of a module of ecdit or launch by its dotted name."""
    package, *names = module.split(".")
    if package == "launch":
        return "launch"
    if not names or names[0] in FOUNDATION:
        return "foundation"
    if not (ROOT / "ecdit" / names[0]).is_dir() and names[0] not in LAYERS:
        return "commands"
    assert names[0] in LAYERS, f"ecdit/{names[0]} has no layer yet: name it in LAYERS"
    return names[0]


def imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Yields (line, dotted name) of every import of ecdit and launch in a module, those inside functions too."""
    parents = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = parents[: len(parents) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            # `from ecdit import training` imports a module, `from ecdit.config import build` a name of one.
            names = [
                f"{source}.{alias.name}" if f"{source}.{alias.name}" in MODULES else source for alias in node.names
            ]
        yield from ((node.lineno, name) for name in names if name.split(".")[0] in ("ecdit", "launch"))


def steps_back(source: str, module: str, is_package: bool = False) -> list[str]:
    """The imports in `source` of a later layer than its own."""
    own = layer(module)
    return [
        f"line {line}: {own} imports {name} of {layer(name)}"
        for line, name in imported(ast.parse(source), module, is_package)
        if LAYERS.index(layer(name)) > LAYERS.index(own)
    ]


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def undocumented(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    """Yields public functions and classes, and public methods of those classes, that lack a docstring."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from undocumented(node.body, f"{prefix}{node.name}.")


@pytest.fixture(params=MODULES)
def module(request):
    return request.param


@pytest.fixture
def source(module):
    return (ROOT / MODULES[module]).read_text(encoding="utf-8")


def test_imports_go_one_way(module, source):
    assert not steps_back(source, module, is_package=MODULES[module].endswith("__init__.py"))


def test_files_and_functions_are_short(source):
    assert len(source.splitlines()) <= MAX_FILE_LINES
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions(ast.parse(source))}
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}


def test_public_names_have_docstrings(source):
    assert list(undocumented(ast.parse(source).body)) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("ecdit.models.dit", "from ecdit.training.step import make_train_step"),
        ("ecdit.models.dit", "from ecdit import training"),
        ("ecdit.models.dit", "import ecdit.sampling.sampler as sampler"),
        ("ecdit.models.dit", "from ..sampling import sampler"),
        ("ecdit.models.dit", "def f():\n    from ecdit.sampling.sampler import draw"),
        ("ecdit.diffusion.flow", "from ecdit.models.config import DiTConfig"),
        ("ecdit.config", "from ecdit.models.config import DiTConfig"),
        ("ecdit.tuned.experts", "from ecdit.models.moe import expert_products"),
        ("ecdit.runs.training_run", "from launch.local import launch"),
        ("ecdit.runs.training_run", "from ecdit.train import main"),
        ("ecdit.train", "import launch"),
    ],
)
def test_a_step_back_is_found(module, line):
    assert len(steps_back(line, module)) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("ecdit.partitioning", "from ecdit.config import require"),
        ("ecdit.models.dit", "from .moe import FeedForward"),
        ("ecdit.models.moe", "from ecdit.tuned import experts"),
        ("ecdit.models.dit", "from ecdit.diffusion.flow import velocity_towards"),
        ("ecdit.train", "from ecdit.training import loop"),
        ("launch.local", "from ecdit.config import UserError"),
        ("ecdit.models.dit", "import numpy, launchpad"),
    ],
)
def test_a_step_forward_is_allowed(module, line):
    assert steps_back(line, module) == []


IMPORT_ALL = f"""
import importlib, json, sys
from absl import flags

guilty = {{}}
for name in json.loads(sys.argv[1]):
    before = set(flags.FLAGS)
    importlib.import_module(name)
    for flag in set(flags.FLAGS) - before:  # two commands define --config: each is meant to be alone in a process
        delattr(flags.FLAGS, flag)
    for heavy in {LAZY}:
        if heavy in sys.modules:
            guilty.setdefault(heavy, name)
print(json.dumps(guilty))
"""


def test_importing_any_module_leaves_the_heavy_libraries_alone(cpu_env):
    """TensorFlow takes seconds to import and only preparing data needs it: it is imported inside functions."""
    child = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, json.dumps([name for name in MODULES if name not in PREPARING | EXPORTED])],
        cwd=ROOT,
        env=cpu_env(),
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    assert json.loads(child.stdout.splitlines()[-1]) == {}, "library: the first module whose import brought it"


@pytest.mark.parametrize("module", sorted(EXPORTED))
def test_what_is_copied_into_exported_folders_imports_neither_the_package_nor_jax(module):
    tree = ast.parse((ROOT / MODULES[module]).read_text(encoding="utf-8"))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {
        name
        for node in nodes
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }
    assert not {name.partition(".")[0] for name in names} & {"ecdit", "jax", "flax"}


def test_the_runs_of_these_tests_are_strict():
    assert jax.default_backend() == "cpu"
    assert jax.device_count() == 8
    with pytest.raises(ValueError, match="jax_numpy_rank_promotion"):
        jnp.ones((2, 3)) + jnp.ones(3)
