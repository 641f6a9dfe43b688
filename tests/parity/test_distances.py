"""Compares distances from PNG to number with the packages that define them, with the same random weights on both sides.

Each set has 64 images. They are larger than Inception's input, so that antialiasing counts.
"""

import copy
import json
import os

import numpy as np
import pytest
from PIL import Image

from ecdit.evaluation.clip_score import clip_scores, read_clip
from ecdit.evaluation.preparation import VARIANTS
from tests.evaluation.test_scorer_commands import run
from tests.parity.conftest import library
from tests.parity.networks import draw

IMAGES = int(os.environ.get("ECDIT_PARITY_IMAGES", "64"))  # fewer only to try a test
SIZE = (340, 425)  # 64 x 80 for the CLIP below, whose centre square is then the same by all rules of rounding
TOLERANCE = 1e-3  # relative
DISTANCES = ("frechet", "kid", "precision", "recall")


def draw_set(folder, seed, grid):
    """Writes images of random smooth colours with random points; `grid` decides how smooth."""
    random = np.random.default_rng(seed)
    folder.mkdir()
    for number in range(IMAGES):
        smooth = Image.fromarray(np.uint8(random.integers(0, 256, (grid, grid, 3)))).resize(SIZE)
        points = random.integers(-40, 41, (SIZE[1], SIZE[0], 3))
        Image.fromarray(np.uint8(np.clip(np.asarray(smooth) + points, 0, 255))).save(folder / f"{number:02d}.png")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two folders of images that differ."""
    folder = tmp_path_factory.mktemp("sets")
    draw_set(folder / "a", 0, 3)
    draw_set(folder / "b", 1, 4)
    return folder / "a", folder / "b"


@pytest.fixture(scope="module")
def responsive(torch, inception, sets, tmp_path_factory):
    """The network with norms of its own activations, and its folder.

    At random, a deep network's features hardly depend on the image: their distances would be those of rounding.
    """
    from safetensors.torch import save_file

    network = copy.deepcopy(inception[0])
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # running statistics are those of the next batch
    files = sorted(sets[0].glob("*.png"))[:4] + sorted(sets[1].glob("*.png"))[:4]
    images = np.stack([VARIANTS["clean-fid"](np.asarray(Image.open(file).convert("RGB"))) for file in files])
    with torch.no_grad():
        network.train()(torch.tensor(images.transpose(0, 3, 1, 2)))
    folder = tmp_path_factory.mktemp("responsive")
    save_file(network.eval().state_dict(), folder / "model.safetensors")
    return network, folder


@pytest.fixture(scope="module")
def pickled(torch, responsive, tmp_path_factory):
    """The weights as torch-fidelity and torchmetrics read them."""
    path = tmp_path_factory.mktemp("pickled") / "weights.pth"
    torch.save(responsive[0].state_dict(), path)
    return str(path)


def ours(sets, folder, variant, tmp_path):
    """The four numbers of the commands."""
    given = [f"--images={sets[0]}", f"--reference={sets[1]}", f"--inception={folder}", f"--preprocessing={variant}"]
    given += ["--batch_size=16", f"--json={tmp_path}/result.json"]
    found = {}
    for name, options in (
        ("frechet", ["--allow_few_samples"]),
        ("kid", [f"--subset_size={IMAGES}", "--subsets=1"]),
        ("precision-recall", []),
    ):
        run(name, *given, *options)
        found |= json.loads((tmp_path / "result.json").read_text())
    assert found["preprocessing"] == variant
    assert variant in found["extractor"]
    return {name: found[name] for name in DISTANCES}


@pytest.fixture(scope="module")
def one_extraction():
    """Lets all calls of `ours` with the same variant share their features, which take most of the time."""
    from ecdit.evaluation import image_features as module

    known, original = {}, module.image_features

    def remembered(files, extractor, batch_size):
        key = extractor.name, str(files[0])
        if key not in known:
            known[key] = list(original(files, extractor, batch_size))
        return iter(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "image_features", remembered)
        yield


def pytorch_fid(torch, network, sets, pickled, monkeypatch):
    inception, score = library("pytorch_fid.inception"), library("pytorch_fid.fid_score")
    monkeypatch.setattr(inception, "fid_inception_v3", lambda: network)
    model = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).eval()
    a, b = (score.compute_statistics_of_path(str(path), model, 16, 2048, "cpu", num_workers=0) for path in sets)
    return {"frechet": score.calculate_frechet_distance(*a, *b)}


def clean_fid(torch, network, sets, pickled, monkeypatch):
    fid = library("cleanfid.fid")
    inception = library("pytorch_fid.inception")
    monkeypatch.setattr(inception, "fid_inception_v3", lambda: network)
    model = inception.InceptionV3([3], resize_input=False, normalize_input=False).eval()

    def features(images):  # its own network normalises so, and has this one's architecture
        return model((images - 128) / 128)[0].flatten(1)

    a, b = (
        fid.get_folder_features(
            str(path), features, num_workers=0, batch_size=16, device=torch.device("cpu"), verbose=False
        )
        for path in sets
    )
    return {"frechet": fid.fid_from_feats(a, b), "kid": fid.kernel_distance(a, b, num_subsets=1)}


def torch_fidelity(torch, network, sets, pickled, monkeypatch):
    found = library("torch_fidelity").calculate_metrics(
        input1=str(sets[0]), input2=str(sets[1]), fid=True, kid=True, prc=True, kid_subsets=1, kid_subset_size=IMAGES,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=pickled, cuda=False, cache=False,
        save_cpu_ram=True, verbose=False, batch_size=16,
    )  # fmt: skip
    return {
        "frechet": found["frechet_inception_distance"],
        "kid": found["kernel_inception_distance_mean"],
        "precision": found["precision"],
        "recall": found["recall"],
    }


def torchmetrics(torch, network, sets, pickled, monkeypatch):
    fid = library("torchmetrics.image.fid").FrechetInceptionDistance(feature_extractor_weights_path=pickled)
    known, forward = {}, fid.inception.forward

    def remembered(images):  # FID and KID share their features, which take most of the time
        key = images.numpy().tobytes()[:4096]
        if key not in known:
            known[key] = forward(images)
        return known[key]

    fid.inception.forward = remembered
    kid = library("torchmetrics.image.kid").KernelInceptionDistance(
        feature=fid.inception, subsets=1, subset_size=IMAGES
    )
    for real, path in ((False, sets[0]), (True, sets[1])):
        files = sorted(path.glob("*.png"))
        for start in range(0, len(files), 16):
            batch = [np.asarray(Image.open(file).convert("RGB")) for file in files[start : start + 16]]
            images = torch.tensor(np.stack(batch)).permute(0, 3, 1, 2)
            fid.update(images, real=real)
            kid.update(images, real=real)
    return {"frechet": float(fid.compute()), "kid": float(kid.compute()[0])}


PACKAGES = {
    "pytorch-fid": pytorch_fid,
    "clean-fid": clean_fid,
    "torch-fidelity": torch_fidelity,
    "torchmetrics": torchmetrics,
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_distances_are_those_of_the_package(
    torch, responsive, sets, pickled, variant, one_extraction, tmp_path, monkeypatch
):
    found = ours(sets, responsive[1], variant, tmp_path)
    with torch.no_grad():
        expected = PACKAGES[variant](torch, responsive[0], sets, pickled, monkeypatch)
    for name, value in expected.items():
        error = abs(found[name] - value) / abs(value)
        print(f"PARITY {variant}, {name} | {value:.6g}, ours {found[name]:.6g} | {error:.1e}")
        assert error <= TOLERANCE, (name, found[name], value)
    assert found["frechet"] > 0 < found["kid"]  # the sets differ


@pytest.mark.slow
def test_variants_differ_from_each_other(responsive, sets, one_extraction, tmp_path):
    """Otherwise the comparisons above would not tell which preparation is whose."""
    values = sorted(ours(sets, responsive[1], variant, tmp_path)["frechet"] for variant in VARIANTS)
    assert np.diff(values).min() > 2 * TOLERANCE * values[-1], values


@pytest.fixture(scope="module")
def clip(torch, transformers, tmp_path_factory):
    """A CLIP of transformers with a tokenizer of letters, and its folder."""
    letters = [chr(letter) for letter in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": len(pieces) - 2, "eos_token_id": len(pieces) - 1, "pad_token_id": len(pieces) - 1}
    config = transformers.CLIPConfig(
        text_config=sizes | ids | {"vocab_size": len(pieces), "max_position_embeddings": 16},
        vision_config=sizes | {"image_size": 64, "patch_size": 16},
        projection_dim=24,
    )
    network = draw(torch, transformers.CLIPModel(config), seed=1)
    folder = tmp_path_factory.mktemp("clip")
    network.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|endoftext|>"}))
    return network, folder


def test_cmmd_is_that_of_its_authors_rules(torch, clip, sets, tmp_path):
    """Their package needs Scenic; this is what its io_util.py, embedding.py and distance.py do."""
    network, folder = clip
    given = [f"--images={sets[0]}", f"--reference={sets[1]}", f"--clip={folder}", f"--json={tmp_path}/result.json"]
    run("cmmd", *given)
    found = json.loads((tmp_path / "result.json").read_text())["cmmd"]
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    embedded = []
    for path in sets:
        batch = []
        for file in sorted(path.glob("*.png")):
            image = Image.open(file)
            width, height = image.size
            side = min(width, height)
            left, top = (width - side) // 2, (height - side) // 2
            square = image.crop((left, top, left + side, top + side)).resize((64, 64), resample=Image.BICUBIC)
            batch.append(((np.asarray(square) / 255 - mean) / deviation).transpose(2, 0, 1))
        with torch.no_grad():
            rows = network.get_image_features(torch.tensor(np.stack(batch), dtype=torch.float32)).pooler_output
        embedded.append((rows / rows.norm(dim=-1, keepdim=True)).double())
    x, y = embedded

    def kernel(a, b):
        return torch.exp(-torch.cdist(a, b).square() / (2 * 10**2)).mean()

    expected = float(1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)))
    error = abs(found - expected) / expected
    print(f"PARITY CMMD | {expected:.6g}, ours {found:.6g} | {error:.1e}")
    assert error <= TOLERANCE
    assert expected > 0


def test_clip_score_is_torchmetrics(torch, transformers, clip, sets):
    network, folder = clip

    class Model(torch.nn.Module):
        """transformers 5 returns an object of both states, of which torchmetrics 1.9 takes itself the features."""

        config = network.config

        def get_image_features(self, pixels):
            return network.get_image_features(pixels).pooler_output

        def get_text_features(self, ids, mask):
            return network.get_text_features(ids, attention_mask=mask).pooler_output

    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})

    def processor(images=None, text=None, **options):
        options.pop("padding")
        return prepare(images, **options) if images is not None else tokenizer(text, padding=True, **options)

    prepare = images
    metric = library("torchmetrics.multimodal.clip_score").CLIPScore(lambda: (Model(), processor))
    files = [file for path in sets for file in sorted(path.glob("*.png"))]
    captions = [" ".join("abcdefgh"[place % 8 : place % 8 + 1 + place % 5]) for place in range(len(files))]
    with torch.no_grad():
        for file, caption in zip(files, captions, strict=True):
            pixels = torch.tensor(np.asarray(Image.open(file).convert("RGB"))).permute(2, 0, 1)
            metric.update([pixels], [caption])
    expected = float(metric.compute())
    found = clip_scores(read_clip(folder), zip(files, captions, strict=True), 16)["torchmetrics"]
    error = abs(found - expected) / abs(expected)
    print(f"PARITY CLIP score, torchmetrics | {expected:.6g}, ours {found:.6g} | {error:.1e}")
    assert expected > 0
    assert error <= TOLERANCE
