"""CLIP score of a small CLIP with random weights, written as a folder: by hand, and by other routes."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ecdit.commands.clip_score import captioned
from ecdit.errors import UserError
from ecdit.evaluation.clip_score import PREFIX, clip_scores, forms, prepare, read_clip
from ecdit.pretrained.clip_text import CLIP_TEXT_LAYOUT, ClipText, ClipTextConfig
from ecdit.pretrained.clip_vision import CLIP_VISION_LAYOUT, ClipVision, ClipVisionConfig
from ecdit.pretrained.weights import fingerprint
from tests.evaluation.test_scorer_commands import run
from tests.models.helpers import Model
from tests.pretrained.folders import tensors, write_folder

PIECES = ["a", "b", "c", "!", "a</w>", "b</w>", "c</w>", "!</w>", "<|startoftext|>", "<|endoftext|>"]
START, END, POSITIONS, SIZE = 8, 9, 6, 8
TEXT = ClipTextConfig(
    vocab_size=10, width=16, mlp_width=32, layers=2, heads=2, positions=POSITIONS, projection_width=12,
    activation="quick_gelu", epsilon=1e-5, states="last", dtype="float32",
)  # fmt: skip
VISION = ClipVisionConfig(
    image_size=SIZE, patch_size=4, width=24, mlp_width=32, layers=2, heads=3, projection_width=12,
    activation="quick_gelu", epsilon=1e-5, dtype="float32",
)  # fmt: skip
CONFIG = {
    "model_type": "clip", "projection_dim": 12,
    "text_config": {
        "vocab_size": 10, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": POSITIONS,
    },
    "vision_config": {
        "image_size": SIZE, "patch_size": 4, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 3,
    },
}  # fmt: skip
CAPTIONS = ["a", "b c", "a b c", "c c", "b"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole CLIP's folder, with a tokenizer of three letters, and the models whose weights it holds."""
    pytest.importorskip("tokenizers", reason="needs the extra pretrained")
    pytest.importorskip("ftfy", reason="needs the extra pretrained")
    text, vision = (Model(lambda rngs: ClipText(TEXT, POSITIONS, rngs)), Model(lambda rngs: ClipVision(VISION, rngs)))
    weights = tensors(text, CLIP_TEXT_LAYOUT) | tensors(vision, CLIP_VISION_LAYOUT)
    folder = write_folder(tmp_path_factory.mktemp("clip"), weights, CONFIG)
    (folder / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(PIECES)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|endoftext|>"}))
    return folder, text, vision


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Five images of the encoder's size, so that preparing them changes nothing."""
    directory = tmp_path_factory.mktemp("images")
    values = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), np.uint8)
    for i, image in enumerate(values):
        Image.fromarray(image).save(directory / f"{i}.png")
    return directory, values


def tokens(caption):
    ids = [START, *(PIECES.index(f"{letter}</w>") for letter in caption.split()), END]
    return ids + [END] * (POSITIONS - len(ids))


def test_cosines_are_those_of_the_two_encoders(folder, images):
    """The encoders called one image at a time, with pixels and tokens by hand; batches of two, and one left over."""
    path, text, vision = folder
    found = clip_scores(
        read_clip(path), [(images[0] / f"{i}.png", caption) for i, caption in enumerate(CAPTIONS)], batch_size=2
    )
    mean, deviation = (np.array(v) for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
    cosines = []
    for image, caption in zip(images[1], CAPTIONS, strict=True):
        x = np.asarray(vision(vision.params)(jnp.asarray((image[None] / 255 - mean) / deviation, jnp.float32)))[
            0
        ].astype(np.float64)
        y = np.asarray(text(text.params)(jnp.array([tokens(caption)])).pooled)[0].astype(np.float64)
        cosines.append(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    assert np.ptp(cosines) > 0.05
    assert found["cosine"] == pytest.approx(np.mean(cosines), abs=1e-5)
    assert found["torchmetrics"] == pytest.approx(max(0, 100 * np.mean(cosines)), abs=1e-3)
    assert found["images"] == 5


def test_the_three_forms_by_hand():
    found = forms(np.array([0.5, -0.1]), np.array([0.4, -0.2]))
    assert found == {
        "cosine": pytest.approx(0.2),
        "torchmetrics": pytest.approx(20.0),  # 0 only where the mean is below 0
        "hessel": pytest.approx(2.5 * (0.4 + 0) / 2),  # 0 for each image that is below
    }
    assert forms(np.array([-0.5]), np.array([-0.5])) == {"cosine": -0.5, "torchmetrics": 0.0, "hessel": 0.0}


def test_hessel_s_form_has_its_prefix(folder, images):
    """Each caption is encoded as it is, and after the prefix."""
    clip, seen = read_clip(folder[0]), []

    class Recording:
        def encode(self, captions, length):
            seen.append(captions)
            return clip.tokenizer.encode(["a"] * len(captions), length)

    clip_scores(dataclasses.replace(clip, tokenizer=Recording()), [(images[0] / "0.png", "cat")], 1)
    assert seen == [["cat"], [f"{PREFIX}cat"]]
    assert PREFIX == "A photo depicts "


def test_the_centre_square_of_an_image_is_taken(tmp_path):
    """16 x 8 pixels: left and right quarters go; 12 x 6 is enlarged to 16 x 8 first."""
    image = np.zeros((8, 16, 3), np.uint8)
    image[:, 4:12] = 200
    Image.fromarray(image).save(tmp_path / "a.png")
    np.testing.assert_array_equal(prepare(tmp_path / "a.png", 8), np.full((8, 8, 3), 200))
    Image.fromarray(np.full((12, 6, 3), 7, np.uint8)).save(tmp_path / "b.png")
    np.testing.assert_array_equal(prepare(tmp_path / "b.png", 8), np.full((8, 8, 3), 7))
    (tmp_path / "c.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"c\.png"):
        prepare(tmp_path / "c.png", 8)


def test_captions_come_from_the_manifest_or_from_lines(tmp_path):
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        captioned(tmp_path, None)
    manifest = {"finished": False, "images": [{"file": "images/0.png", "prompt": "a cat", "repeat": 0}]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is not finished"):
        captioned(tmp_path, None)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"finished": True}))
    assert captioned(tmp_path, None) == [(tmp_path / "images/0.png", "a cat")]
    (tmp_path / "x.png").touch()
    (tmp_path / "items.jsonl").write_text('{"file": "x.png", "caption": "b"}\n{"file": "y.png"}\n')
    with pytest.raises(UserError, match="line 2: caption is missing"):
        captioned(tmp_path, tmp_path / "items.jsonl")
    (tmp_path / "items.jsonl").write_text('{"file": "x.png", "caption": "b"}\n{"file": "y.png", "caption": "c"}\n')
    with pytest.raises(UserError, match=r"items\.jsonl, line 2: file = 'y\.png': must be an image under --images="):
        captioned(tmp_path, tmp_path / "items.jsonl")


def test_a_cosine_that_is_not_finite_is_named_by_its_image(folder, images):
    """Embeddings that are 0 have none."""
    clip, calls = read_clip(folder[0]), []

    def see(pixels):
        calls.append(pixels)
        return clip.see(pixels) * (len(calls) < 2)

    pairs = [(images[0] / f"{i}.png", "a") for i in range(4)]
    with pytest.raises(UserError, match=r"2\.png: its cosine with 'a' is not finite"):
        clip_scores(dataclasses.replace(clip, see=see), pairs, 2)


def test_no_images_are_refused(folder):
    with pytest.raises(UserError, match="no image to score"):
        clip_scores(read_clip(folder[0]), [], 2)


def test_the_command_scores_the_images_of_a_list(folder, images, tmp_path, capsys):
    """Two of the images, with captions of its own; it says of which weights the scores are."""
    directory, _ = images
    rows = [{"file": f"{n}.png", "caption": CAPTIONS[n]} for n in (0, 3)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [f"--images={directory}", f"--items={tmp_path}/items.jsonl", f"--clip={folder[0]}"]
    run("clip-score", *flags, f"--json={tmp_path}/found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    pairs = [(directory / row["file"], row["caption"]) for row in rows]
    expected = clip_scores(read_clip(folder[0]), pairs, 32)
    assert {name: found[name] for name in expected} == json.loads(json.dumps(expected))
    assert (found["images"], found["clip_sha256"]) == (2, fingerprint(folder[0]))
    assert f"2 images: mean cosine {found['cosine']:.4f}" in capsys.readouterr().out
