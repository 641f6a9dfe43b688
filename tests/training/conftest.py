"""The loop with a toy in the model's place. Data is a counter."""

from types import SimpleNamespace

import jax
import pytest

from ecdit.runs import training_run as loop
from tests.checkpoints.toy import Toy, toy_abstract, toy_sharding, toy_state, toy_step


@pytest.fixture
def toy(tmp_path, monkeypatch):
    toy = Toy(tmp_path / "run")
    monkeypatch.setattr(loop, "prepare", lambda config: SimpleNamespace(fingerprint="toy"))
    monkeypatch.setattr(loop, "SampleWriter", lambda *_: toy)
    monkeypatch.setattr(loop, "init_state", lambda *_: jax.jit(toy_state, out_shardings=toy_sharding())())
    monkeypatch.setattr(loop, "abstract_state", lambda *_: toy_abstract())
    monkeypatch.setattr(loop, "make_train_step", lambda *_: lambda state, bad: toy_step(state, bad, toy.leaf))
    monkeypatch.setattr(loop, "device_batches", toy.batches)
    return toy
