"""Skips these tests without the libraries for comparison, which `tests/parity/run` installs."""

import importlib
import os
import warnings

import pytest

REASON = "needs the extra parity"


@pytest.fixture(scope="session")
def torch():
    """PyTorch, beside which torchvision can be imported.

    torchvision's wheel does not find its compiled operators beside PyTorch's CPU build, and then its import fails where
    it describes them. They are not used here: to be known by name is enough.
    """
    torch = library("torch")
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            operators.define(f"{operator}() -> Tensor")
    torch.torchvision_operators = operators  # they are gone with the object
    return torch


@pytest.fixture(scope="session")
def transformers(torch):
    return library("transformers")


@pytest.fixture(scope="session")
def diffusers(transformers):
    return library("diffusers")


@pytest.fixture(scope="session")
def accelerate(torch):
    return library("accelerate")


@pytest.fixture(scope="session")
def open_clip(torch):
    return library("open_clip")


@pytest.fixture(scope="session")
def inception(torch, tmp_path_factory):
    """pytorch-fid's network with random weights, and a folder with them."""
    from safetensors.torch import save_file

    from tests.parity.networks import draw

    fid, folder = library("pytorch_fid.inception"), tmp_path_factory.mktemp("inception")
    with pytest.MonkeyPatch.context() as patch:  # it would fetch weights
        patch.setattr(fid, "load_state_dict_from_url", lambda url, progress: None)
        patch.setattr(fid.nn.Module, "load_state_dict", lambda self, state: None)
        drawn = draw(torch, fid.fid_inception_v3())
    save_file(drawn.state_dict(), folder / "model.safetensors")
    return drawn, folder


def library(name):
    """A library, whose warnings at import are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if os.environ.get("ECDIT_PARITY"):  # set by `run`: nothing may be missing
            return importlib.import_module(name)
        return pytest.importorskip(name, reason=REASON)


def pytest_collection_modifyitems(items):
    """The libraries warn of their own future."""
    for item in items:
        if "tests/parity/" in item.nodeid:
            item.add_marker(pytest.mark.filterwarnings("default"))
