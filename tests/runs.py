"""Makes tiny runs of the emoji config, in this process or as the real command."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from ecdit.checkpoints.config import CheckpointConfig
from ecdit.config import to_dict
from ecdit.experiment import make_experiment
from ecdit.partitioning import replicated

ROOT = Path(__file__).parents[1]

# Small enough to compile in seconds; two pairs of blocks, so that layers are scanned.
TINY = {
    "model.width": 32,
    "model.depth": 4,
    "model.heads": 2,
    "model.kv_heads": 2,
    "model.num_experts": 4,
    "model.patch_size": 8,
    "model.mask_ratio": 0.5,
    "model.extra_blocks": 2,
    "model.scan_unroll": 1,
    "text.width": 32,
    "text.layers": 1,
    "text.heads": 2,
    "train.batch_size": 16,
    "train.log_every": 1,
    "train.images_every": 0,
    "sampling.num_steps": 2,
    "sampling.batch_size": 8,
    "sampling.num_grid": 4,
    "runtime.compilation_cache": "",
    "runtime.keep_host_memory": False,
}


def config_file(name):
    """The module `configs/<name>.py`."""
    spec = importlib.util.spec_from_file_location(f"{name}_config", ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def emoji_config():
    return config_file("emoji").get_config()


def tiny_values(**overrides):
    """The config file's values with TINY and `overrides`, whose keys have __ for dots."""
    config = emoji_config()
    for key, value in {**TINY, **{key.replace("__", "."): value for key, value in overrides.items()}}.items():
        *groups, name = key.split(".")
        node = config
        for group in groups:
            node = node[group]
        node[name] = value
    return config


def tiny(**overrides):
    return make_experiment(tiny_values(**overrides))


def command(module, *flags):
    return [sys.executable, "-m", f"ecdit.{module}", *flags]


def train_command(workdir, data, **overrides):
    """The command line of a tiny training run."""
    changes = {**TINY, "data.directory": str(data), **{k.replace("__", "."): v for k, v in overrides.items()}}
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    return command("train", f"--config={ROOT}/configs/emoji.py", f"--workdir={workdir}", *flags)


def keep_small_tokenizer(workdir, captions=("red heart", "tiger", "owl", "moon cake")):
    """Gives a workdir a tokenizer of its own, as training does; returns its hash."""
    from ecdit.data.text import train_vocabulary
    from ecdit.data.tokens import SPIECE, hash_files
    from ecdit.runs.kept_tokenizer import FOLDER, kept_files

    (workdir / FOLDER).mkdir(parents=True)
    train_vocabulary(captions, 300, workdir / FOLDER / SPIECE)
    return hash_files(kept_files(workdir))


def random_params(system):
    """Weights that are random everywhere, so that nothing is hidden by zeros at the start."""
    rng = np.random.default_rng(4)
    params = jax.jit(system.init)(jax.random.key(3))
    return jax.tree.map(lambda p: np.asarray(p) + 0.1 * rng.normal(size=p.shape).astype(np.float32), params)


def save_ema(workdir, ema, step=1, config=None, frozen=None, vocabulary=""):
    """Adds a checkpoint of EMA weights alone, nested dicts of numpy arrays, and of `frozen` ones if there are any."""
    import orbax.checkpoint as ocp  # here, so that benchmarks of a step need none of it

    from ecdit.checkpoints import arrays, restore

    state = {"ema": ema} | ({"frozen": frozen} if frozen else {})
    keep_all = CheckpointConfig(every=1, keep_every=0, keep=100, init_from="", verify="always", max_failed_saves=0)
    one = replicated(Mesh(np.array(jax.devices()[:1]), ("data",)))
    records = arrays.array_records(arrays.flat_arrays(jax.device_put(state, one)))
    meta = arrays.meta_json(to_dict(restore.Meta(arrays.FORMAT, config or {}, 0, "", {}, records, vocabulary, {}, "")))
    items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(meta))
    with restore.open_manager(workdir, keep_all) as manager:
        manager.save(step, args=items)


BASE_INSTALL = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("seqio", "tensorflow", "tensorflow_datasets", "tensorflow_text"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""


def base_install(env, folder):
    """The environment of processes for which what the extra `data` brings is not installed."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(BASE_INSTALL)  # Python imports it when it starts
    env = {**env, "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [env.get("PYTHONPATH")])])}
    assert "No module named 'tensorflow'" in run([sys.executable, "-c", "import tensorflow"], env).stderr
    return env


def run(arguments, env, timeout=300):
    """Runs a command as a user does. Where one test of it does, others may use `forking.run_forked`."""
    return subprocess.run(arguments, env=env, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
