"""Compares `ecdit.evaluate geneval` and `geneval-score` with GenEval's rules, written here in a straight line.

The detector and CLIP are small ones of transformers with random weights, so that nothing is downloaded. The reference
uses PyTorch alone. Its steps around the detector are those of mmdet 2.x; colours and verdicts are those of
evaluation/evaluate_images.py in github.com/djghosh13/geneval.
"""

import importlib
import json

import numpy as np
import pytest
from absl import flags
from PIL import Image, ImageDraw

from ecdit import evaluate
from ecdit.evaluation.geneval import CLASSES, COLOURS
from tests.parity.networks import draw

SIZES = ((96, 96), (64, 120))
FOUND = CLASSES[:4]  # by the detector below
CLIP_SIZE, LENGTH = 32, 24


@pytest.fixture(scope="module")
def detector(torch, transformers, tmp_path_factory):
    """A Mask2Former that is sure of its classes, and its folder."""
    backbone = transformers.SwinConfig(
        image_size=64, patch_size=4, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        dim_feedforward=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=12,
        id2label={place: {"tv remote": "remote", "computer mouse": "mouse"}.get(name, name)
                  for place, name in enumerate(CLASSES)},
    )  # fmt: skip
    torch.manual_seed(0)
    network = draw(torch, transformers.Mask2FormerForUniversalSegmentation(config))
    with torch.no_grad():
        network.class_predictor.weight.mul_(4)
        # Few classes, so that a prompt's classes are often found.
        network.class_predictor.bias.fill_(-30)
        network.class_predictor.bias[: len(FOUND)] = torch.tensor([3.0, 1, 1, 0])
        network.class_predictor.bias[-1] = -1
        for layer in network.model.transformer_module.decoder.mask_predictor.mask_embedder.parameters():
            layer.mul_(1.5)
    folder = tmp_path_factory.mktemp("detector")
    network.save_pretrained(folder)
    return network, folder


@pytest.fixture(scope="module")
def clip(torch, transformers, tmp_path_factory):
    """A CLIP with a tokenizer of letters, and its folder."""
    letters = [chr(letter) for letter in range(ord("a"), ord("z") + 1)] + ["-"]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        text_config=text | {"vocab_size": len(pieces), "max_position_embeddings": LENGTH, "eos_token_id": 2},
        vision_config=text | {"image_size": CLIP_SIZE, "patch_size": 8},
        projection_dim=24,
    )
    network = draw(torch, transformers.CLIPModel(config), seed=1)
    folder = tmp_path_factory.mktemp("clip")
    network.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|endoftext|>"}))
    return network, folder, pieces


def scene(size, seed):
    """An image of coloured rectangles on a plain ground, so that a mask can be of the rectangles alone."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(random.integers(0, 256, 3).tolist()))
    pen = ImageDraw.Draw(image)
    for _ in range(2):
        x, y = (int(random.integers(8, side - 28)) for side in size)
        pen.rectangle([x, y, x + 20, y + 20], fill=tuple(random.integers(0, 256, 3).tolist()))
    return image


def metadata():
    """A prompt for each task, of the classes that the detector finds."""
    a, b, c, d = FOUND
    colour = [{"class": a, "count": 1, "color": "green"}, {"class": b, "count": 1, "color": "pink"}]
    include = {
        "single_object": [{"class": a, "count": 1}],
        "two_object": [{"class": a, "count": 1}, {"class": c, "count": 1}],
        "counting": [{"class": b, "count": 1}],
        "colors": colour[:1],
        "position": [{"class": b, "count": 1}, {"class": d, "count": 1, "position": ["left of", 0]}],
        "color_attr": colour,
    }
    prompts = [{"tag": tag, "prompt": f"a photo, {tag}", "include": clauses} for tag, clauses in include.items()]
    prompts[2]["exclude"] = [{"class": b, "count": 2}]
    return prompts


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number, line in enumerate(metadata()):
        place = folder / f"{number:05d}"
        (place / "samples").mkdir(parents=True)
        (place / "metadata.jsonl").write_text(json.dumps(line))
        for sample, size in enumerate(SIZES):
            scene(size, 10 * number + sample).save(place / f"samples/{sample:04d}.png")
    return folder


def reference_detections(torch, network, path):
    """mmdet's test pipeline, Mask2Former's head, and MaskFormerFusionHead: {class: [(box, score, mask)]}."""
    resize = torch.nn.functional.interpolate
    image = torch.tensor(np.asarray(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None].double()
    height, width = image.shape[2:]
    scale = min(1333 / max(height, width), 800 / min(height, width))
    inside = [int(side * scale + 0.5) for side in (height, width)]
    pixels = resize(image, size=inside, mode="bilinear", align_corners=False).round(decimals=6).round()
    pad = [int(np.ceil(side / 32)) * 32 - side for side in inside]
    pixels = torch.nn.functional.pad(pixels, (0, pad[1], 0, pad[0]), value=128)
    mean, deviation = (torch.tensor(values).double() for values in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]))
    pixels = (pixels - mean[:, None, None]) / deviation[:, None, None]
    pixels = pixels.float()
    with torch.no_grad():
        given = network(pixel_values=pixels)
    masks = resize(given.masks_queries_logits, size=pixels.shape[2:], mode="bilinear", align_corners=False)
    masks = masks[:, :, : inside[0], : inside[1]]
    masks = resize(masks, size=(height, width), mode="bilinear", align_corners=False)[0]
    scores = given.class_queries_logits[0].softmax(dim=-1)[:, :-1]
    values, places = scores.flatten().topk(100)
    found = {}
    for value, place in zip(values.tolist(), places.tolist(), strict=True):
        query, label = divmod(place, len(CLASSES))
        mask = masks[query] > 0
        score = value * float((masks[query].sigmoid() * mask).sum() / (mask.sum() + 1e-6))
        rows, columns = (torch.where(mask.any(dim=axis))[0].tolist() for axis in (1, 0))
        box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] if rows else [0, 0, 0, 0]
        found.setdefault(CLASSES[label], []).append((box, score, mask.numpy()))
    return found


def reference_colour(torch, network, pieces, image, box, mask, name):
    """color_classification of the original, with open_clip's transform and transformers' network."""
    crop = Image.composite(image, Image.new("RGB", image.size, color="#999"), Image.fromarray(mask)).crop(box)
    size = [CLIP_SIZE if side == min(crop.size) else int(CLIP_SIZE * side / min(crop.size)) for side in crop.size]
    crop = crop.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((side - CLIP_SIZE) / 2) for side in size)
    pixels = torch.tensor(np.asarray(crop.crop((left, top, left + CLIP_SIZE, top + CLIP_SIZE)))).float() / 255
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    start, end = (pieces.index(piece) for piece in ("<|startoftext|>", "<|endoftext|>"))
    weights = []
    with torch.no_grad():
        seen = network.get_image_features(((pixels - mean) / deviation).permute(2, 0, 1)[None]).pooler_output
        for colour in COLOURS:
            texts = [f"a photo of a {colour} {name}", f"a photo of a {colour}-colored {name}"]
            rows = []
            for text in [*texts, f"a photo of a {colour} object"]:
                words = text.replace("-", " - ").split()
                ids = [pieces.index(letter) for word in words for letter in [*word[:-1], f"{word[-1]}</w>"]]
                ids = [start, *ids[: LENGTH - 2], end]
                rows.append(ids + [end] * (LENGTH - len(ids)))
            # The pooled state is that of the first end token.
            read = network.get_text_features(torch.tensor(rows)).pooler_output
            read = torch.nn.functional.normalize(read, dim=-1).mean(dim=0)
            weights.append(read / read.norm())
        logits = 100.0 * torch.nn.functional.normalize(seen, dim=-1) @ torch.stack(weights, dim=1)
    top = logits[0].sort(descending=True).values
    return COLOURS[int(logits.argmax())], float(top[0] - top[1])


def reference_relations(a, b):
    boxes = np.array([a, b], np.float64).reshape(2, 2, 2)
    centres, sizes = boxes.mean(axis=1), np.abs(np.diff(boxes, axis=1))[:, 0]
    offset = centres[0] - centres[1]
    revised = np.maximum(np.abs(offset) - 0.1 * (sizes[0] + sizes[1]), 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return set()
    dx, dy = revised / np.linalg.norm(offset)
    pairs = (("left of", dx < -0.5), ("right of", dx > 0.5), ("above", dy < -0.5), ("below", dy > 0.5))
    return {name for name, holds in pairs if holds}


def reference_verdict(found, line, colour_of):
    """evaluate() of the original."""
    threshold = 0.9 if line["tag"] == "counting" else 0.3
    kept = {
        name: sorted((each for each in boxes if each[1] > threshold), key=lambda each: -each[1])[:16]
        for name, boxes in found.items()
    }
    correct, groups = True, []
    for clause in line["include"]:
        objects, matched = kept.get(clause["class"], [])[: clause["count"]], True
        if len(objects) < clause["count"]:
            matched = False
        else:
            if "color" in clause:
                colours = [colour_of(box, mask, clause["class"]) for box, _, mask in objects]
                matched = colours.count(clause["color"]) >= clause["count"]
            if "position" in clause and matched:
                relation, target = clause["position"]
                others = groups[target]
                matched = others is not None and all(
                    relation in reference_relations(one[0], other[0]) for one in objects for other in others
                )
        groups.append(objects if matched else None)
        correct = correct and matched
    for clause in line.get("exclude", []):
        correct = correct and len(kept.get(clause["class"], [])) < clause["count"]
    return correct


def run(name, *arguments):
    module, values = importlib.import_module(evaluate.EVALUATIONS[name]), flags.FlagValues()
    module.define_flags(values)
    values([name, *arguments])
    module.run(values)


def by_score(boxes):
    return sorted((box for box in boxes if box[4] > 1e-6), key=lambda box: -box[4])


def test_detections_and_score_are_those_of_the_originals_rules(torch, detector, clip, images, tmp_path):
    out, results = tmp_path / "detections.jsonl", tmp_path / "results.jsonl"
    given = [f"--images={images}", f"--detector={detector[1]}", f"--clip={clip[1]}"]
    run("geneval", *given, f"--out={out}")
    run("geneval-score", f"--detections={out}", f"--out={results}", f"--json={tmp_path}/score.json")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    verdicts = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(lines) == len(metadata()) * len(SIZES)
    colours, correct, above = set(), [], 0
    for line, verdict in zip(lines, verdicts, strict=True):
        path = images / line["filename"]
        expected = reference_detections(torch, detector[0], path)
        image = Image.open(path).convert("RGB")
        for name in {*line["detections"], *expected}:
            # Pairs with a probability of e-13 are in an order of chance.
            ours = by_score(line["detections"].get(name, ()))
            theirs = by_score([*box, score] for box, score, _ in expected.get(name, ()))
            assert len(ours) == len(theirs)
            above += sum(box[4] > 0.3 for box in ours)
            if ours:
                np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4)

        def colour_of(box, mask, name, image=image):
            colour, margin = reference_colour(torch, *clip[::2], image, box, mask, name)
            assert margin > 1e-3  # otherwise the test is of rounding
            colours.add(colour)
            return colour

        assert verdict["correct"] == reference_verdict(expected, line["metadata"], colour_of), line["filename"]
        correct.append(verdict["correct"])
    # The comparison is of something: boxes above the threshold, several colours, right images and wrong ones.
    assert above > len(lines)
    assert len(colours) > 1
    assert 0 < sum(correct) < len(correct)
