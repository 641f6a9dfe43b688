"""Compares the preparation of images for Inception with that of each package, by what its own network is given.

No network is run: each package's is stopped at its first convolution.
"""

import types

import numpy as np
import pytest
from PIL import Image

from ecdit.evaluation.image_files import read_image
from ecdit.evaluation.preparation import VARIANTS
from tests.parity.conftest import library

# Of values in [-1, 1]. PyTorch computes positions in float32, exact to 3e-5 of a pixel at 400, and neighbouring pixels
# differ by up to 2.
TOLERANCE = 1e-4
SIZES = ((340, 425), (96, 80), (299, 299))  # larger than Inception's input in both axes, smaller, and the same


class StoppedError(Exception):
    """Ends a network's forward pass."""


def given_to(layer, run):
    """What `layer` is given when `run` runs its network; [B, 3, 299, 299]."""
    seen = []

    def stop(module, arguments):
        seen.append(arguments[0])
        raise StoppedError

    hook = layer.register_forward_pre_hook(stop)
    with pytest.raises(StoppedError):
        run()
    hook.remove()
    return seen[0].numpy().transpose(0, 2, 3, 1)


@pytest.fixture(params=SIZES, ids=str)
def files(request, tmp_path):
    """Two images of random smooth colours with random points, as PNG."""
    random, paths = np.random.default_rng(0), []
    for number in range(2):
        smooth = Image.fromarray(np.uint8(random.integers(0, 256, (4, 4, 3)))).resize(request.param)
        points = random.integers(-90, 91, (*request.param[::-1], 3))
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(np.uint8(np.clip(np.asarray(smooth) + points, 0, 255))).save(paths[-1])
    return paths


def pytorch_fid(torch, network, weights, files, monkeypatch):
    inception, score = library("pytorch_fid.inception"), library("pytorch_fid.fid_score")
    monkeypatch.setattr(inception, "fid_inception_v3", lambda: network)
    model = inception.InceptionV3([3]).eval()
    return given_to(
        model.blocks[0], lambda: score.get_activations([str(path) for path in files], model, 2, num_workers=0)
    )


def clean_fid(torch, network, weights, files, monkeypatch):
    """Its own network is a download; InceptionV3W.forward normalises what its network is given."""
    fid, torchscript = library("cleanfid.fid"), library("cleanfid.inception_torchscript")
    model = torchscript.InceptionV3W.__new__(torchscript.InceptionV3W)
    torch.nn.Module.__init__(model)
    model.resize_inside = False
    seen = []
    # It calls `forward` itself, which runs no hook.
    model.layers = types.SimpleNamespace(forward=lambda x: seen.append(x) or torch.zeros(len(x), 2048))
    names = [str(path) for path in files]
    fid.get_files_features(names, model, num_workers=0, batch_size=2, device=torch.device("cpu"), verbose=False)
    return seen[0].numpy().transpose(0, 2, 3, 1)


def torch_fidelity(torch, network, weights, files, monkeypatch):
    module = library("torch_fidelity.feature_extractor_inceptionv3")
    model = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)
    return given_to(model.Conv2d_1a_3x3, lambda: model(bytes_of(torch, files)))


def torchmetrics(torch, network, weights, files, monkeypatch):
    fid = library("torchmetrics.image.fid").FrechetInceptionDistance(feature_extractor_weights_path=weights)
    return given_to(fid.inception.Conv2d_1a_3x3, lambda: fid.update(bytes_of(torch, files), real=True))


def bytes_of(torch, files):
    return torch.tensor(np.stack([read_image(path) for path in files])).permute(0, 3, 1, 2)


PACKAGES = {
    "pytorch-fid": pytorch_fid,
    "clean-fid": clean_fid,
    "torch-fidelity": torch_fidelity,
    "torchmetrics": torchmetrics,
}


@pytest.fixture(scope="module")
def weights(torch, inception, tmp_path_factory):
    """The weights as torch-fidelity and torchmetrics read them."""
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(inception[0].state_dict(), path)
    return str(path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_network_is_given_the_same(torch, inception, weights, files, variant, monkeypatch):
    """And the other variants give something else, unless the image has Inception's size already."""
    expected = PACKAGES[variant](torch, inception[0], weights, files, monkeypatch)
    found = {name: np.stack([prepare(read_image(path)) for path in files]) for name, prepare in VARIANTS.items()}
    error = np.abs(found[variant] - expected).max()
    height, width = read_image(files[0]).shape[:2]
    print(f"PARITY Preparation, {variant} | {width} x {height} | {error:.1e}")
    assert expected.shape == (2, 299, 299, 3)
    assert error <= TOLERANCE
    if (width, height) != (299, 299):
        others = [np.abs(values - expected).max() for name, values in found.items() if name != variant]
        assert (
            min(others) > 50 * TOLERANCE
        )  # enlarged, torchmetrics and pytorch-fid differ by their normalisation alone
