"""Tests the grids of a training run: their captions, weights and true images, and that files belong together."""

import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from ecdit import multihost
from ecdit.errors import UserError
from ecdit.runs import evaluator as evaluations
from ecdit.runs import sample_grids as samples
from ecdit.runs.evaluator import Evaluator
from ecdit.runs.sample_grids import SampleWriter, beside_targets
from ecdit.sampling.sampler import network_times, warn
from ecdit.system import make_system
from tests.runs import tiny

CAPTIONS = [f"caption {i}" for i in range(10)]


def tokenize(config, captions):
    return np.array([[int((caption or "0").split()[-1])] for caption in captions], np.int32)


@pytest.mark.parametrize("ffn", ["expert_choice", "dense"])
def test_each_caption_stands_under_the_image_that_was_drawn_of_it(ffn, tmp_path, monkeypatch):
    """Seven of ten captions, in batches of four; an image is of its caption's number, and so are its counts.

    The true image, which is 100 above that number, is to the right of the sample; the data has none for caption 3.
    """
    written = {}

    def sampler(params, tokens, null_tokens, keys):
        assert params == "ema"
        images = np.broadcast_to(tokens[:, :, None, None], (4, 2, 2, 3)).astype(np.uint8)
        return images if ffn == "dense" else (images, np.broadcast_to(tokens[:, :, None, None], (4, 1, 1, 1)))

    def save_grid(images, captions, path, columns):
        written[path.name] = images[:, 0, 0, 0].tolist(), list(captions), columns

    def draw_maps(images, captions, counts, times):
        np.testing.assert_array_equal(times, network_times(experiment.sampling))
        written["maps"] = images[:, 0, 0, 0].tolist(), list(captions), counts[:, 0, 0, 0].tolist()
        return Image.new("RGB", (1, 1))

    for name, replacement in (
        ("save_grid", save_grid),
        ("draw_maps", draw_maps),
        ("prompt_tokens", lambda data: functools.partial(tokenize, data)),
    ):
        monkeypatch.setattr(samples, name, replacement)
    chosen = [0, 1, 3, 4, 6, 7, 9]  # every 9 / 6, rounded down
    monkeypatch.setattr(samples, "open_prepared", lambda config: config)
    monkeypatch.setattr(samples, "sample_captions", lambda _, count: [CAPTIONS[i] for i in chosen[:count]])
    targets = {i: None if i == 3 else np.full((2, 2, 3), 100 + i, np.uint8) for i in chosen}
    monkeypatch.setattr(samples, "sample_targets", lambda _, count: [targets[i] for i in chosen[:count]])
    monkeypatch.setattr(samples, "make_sampler", lambda *_, not_finite: sampler if not_finite is warn else None)
    experiment = tiny(model__ffn=ffn, sampling__num_grid=7, sampling__batch_size=4)
    system = make_system(experiment.system)
    files = SampleWriter(experiment.data, experiment.sampling, system, SimpleNamespace(), tmp_path).write("ema", 12)
    captions = [CAPTIONS[i] for i in chosen]
    assert files["samples"] == tmp_path / "samples/step_00000012.png"
    cells = [number for i in chosen for number in (i, 255 if i == 3 else 100 + i)]
    texts = [text for i in chosen for text in (CAPTIONS[i], "" if i == 3 else "true image")]
    assert written["step_00000012.png"] == (cells, texts, 4)
    if ffn == "dense":
        assert set(files) == {"samples"}
    else:
        assert files["experts"].exists()
        assert written["maps"] == (chosen, captions, chosen)


def test_a_grid_is_not_written_without_permission(tmp_path, monkeypatch):
    """The trainer may have lost its lease while it drew."""

    def lost():
        raise UserError("the lease was lost")

    monkeypatch.setattr(samples, "prompt_tokens", lambda data: functools.partial(tokenize, data))
    monkeypatch.setattr(samples, "open_prepared", lambda config: config)
    monkeypatch.setattr(samples, "sample_captions", lambda _, count: CAPTIONS[:count])
    monkeypatch.setattr(samples, "sample_targets", lambda _, count: [None] * count)
    monkeypatch.setattr(samples, "make_sampler", lambda *_, not_finite: lambda *_: np.zeros((4, 2, 2, 3), np.uint8))
    experiment = tiny(model__ffn="dense", sampling__num_grid=4, sampling__batch_size=4)
    writer = SampleWriter(
        experiment.data, experiment.sampling, make_system(experiment.system), SimpleNamespace(), tmp_path
    )
    with pytest.raises(UserError, match="the lease was lost"):
        writer.write("ema", 12, lost)
    assert list(tmp_path.iterdir()) == []
    writer.write("ema", 12)
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step_00000012.png"]


@pytest.mark.parametrize("targets", [[None, None], [np.zeros((4, 4, 3), np.uint8), None]])
def test_a_grid_without_targets_of_the_samples_size_has_only_the_samples(targets):
    images = np.arange(2 * 2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 2, 3)
    cells, captions, columns = beside_targets(images, ["a", "b"], targets)
    assert (cells.tolist(), captions, columns) == (images.tolist(), ["a", "b"], 0)


def test_where_the_first_process_cannot_write_no_other_goes_on(tmp_path, monkeypatch):
    """It would wait for the first one in the next step until it is aborted, and the exit codes would differ."""
    writer, evaluator = object.__new__(SampleWriter), object.__new__(Evaluator)
    images = np.zeros((1, 2, 2, 3), np.uint8)
    for name, value in {"directory": tmp_path, "prompts": ["owl"], "tokenize": None, "sampling": None}.items():
        setattr(writer, name, value)
    writer.sampler, writer.targets, writer.with_experts = None, [None], False
    evaluator.config, evaluator.workdir, evaluator.rows = tiny().evaluation, tmp_path, None
    evaluator.prompts, evaluator.tokenize, evaluator.sampling, evaluator.prompt_sampler = ["owl"], None, None, None
    for module in (samples, evaluations):
        monkeypatch.setattr(module, "sample_images", lambda *_: images)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(multihost, "anywhere", lambda error: UserError("process 0 cannot"))
    for act in (writer.write, evaluator.evaluate):
        with pytest.raises(UserError, match="process 0 cannot"):
            act({}, 2)
    assert list(tmp_path.iterdir()) == []
