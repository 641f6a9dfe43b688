"""Tests invalid input to the commands other than a wrong config: prompts, seeds and paths."""

import json

import jax
import numpy as np
import pytest

from ecdit.config import ConfigError, to_dict
from ecdit.errors import UserError
from ecdit.experiment import make_experiment
from ecdit.sample import read_prompts
from ecdit.system import make_system
from tests.forking import run_forked
from tests.runs import ROOT, command, keep_small_tokenizer, save_ema, tiny, tiny_values


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"red heart\ntiger\nred heart\n", ["red heart", "tiger", "red heart"]),
        (b"red heart\r\ntiger", ["red heart", "tiger"]),
        ("caf\u00e9\n\U0001f42f\n".encode(), ["caf\u00e9", "\U0001f42f"]),
        (b"\xef\xbb\xbfred heart\ntiger\n", ["red heart", "tiger"]),  # an editor's mark, not a part of the prompt
        ("red\u2028heart\ntiger\x0cface\n".encode(), ["red\u2028heart", "tiger\x0cface"]),  # one line to every editor
    ],
    ids=["order and repeats", "crlf and no end", "utf-8", "byte order mark", "other separators"],
)
def test_a_prompt_is_a_line(tmp_path, content, prompts):
    (tmp_path / "prompts.txt").write_bytes(content)
    kind, found = read_prompts(None, str(tmp_path / "prompts.txt"))
    assert kind == "lines"
    assert [prompt.text for prompt in found] == prompts


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"a\n \t\nb\n", "line 2 is empty"), (b"\n", "line 1 is empty"), (b"a\n\xff\n", "utf-8"), (b"", "no prompts")],
)
def test_prompts_that_are_none_are_refused(tmp_path, content, said):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        read_prompts(None, str(path))
    assert str(path) in str(error.value)


def test_a_prompt_of_bytes_that_are_no_text_is_refused():
    with pytest.raises(UserError, match=r"--prompt='a\\udcff': is no Unicode text"):
        read_prompts("a\udcff", None)


@pytest.mark.parametrize("key", ["seed", "sampling.seed"])
@pytest.mark.parametrize("value", [-1, 2**32, 2**40])
def test_seeds_that_are_no_uint32_are_refused_and_not_cut_to_32_bits(key, value):
    """Cut to 32 bits, 2**32 draws what 0 draws."""
    with pytest.raises(ConfigError) as error:
        make_experiment(tiny_values(**{key.replace(".", "__"): value}))
    assert (error.value.key, error.value.value) == (key, value)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, emoji_data):
    """A run of which only the drawn weights are left, as its EMA."""
    workdir = tmp_path_factory.mktemp("run")
    experiment = tiny(data__directory=str(emoji_data))
    (workdir / "config.json").write_text(json.dumps(to_dict(experiment)))
    system = make_system(experiment.system)
    ema = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(system.init, jax.random.key(0)))
    save_ema(workdir, ema, config=to_dict(experiment), vocabulary=keep_small_tokenizer(workdir))
    return workdir


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--config={root}/configs/emoji.py", "--config.data.directory={data}", "--workdir={file}"],
        ["train", "--config={root}/configs/emoji.py", "--config.data.directory={data}", "--workdir={file}/below"],
        ["prepare", "--config={root}/configs/emoji.py", "--config.data.directory={file}"],
        ["sample", "--workdir={run}", "--prompt=tiger", "--out={file}"],
        ["checkpoint", "export", "--workdir={run}", "--out={file}/w"],
        ["evaluate", "retrieval", "--workdir={run}", "--json={file}/r.json"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]).split(" --")[0],
)
def test_a_path_that_cannot_be_written_is_named_before_the_work(arguments, workdir, tmp_path, emoji_data, cpu_env):
    file = tmp_path / "file"
    file.write_text("in the way")
    known = {"root": ROOT, "data": emoji_data, "run": workdir, "file": file}
    result = run_forked(command(*(argument.format(**known) for argument in arguments)), cpu_env())
    assert result.returncode == 2, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert str(file) in result.stderr.splitlines()[-1]
    assert file.read_text() == "in the way"
