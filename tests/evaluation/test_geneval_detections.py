"""Tests GenEval's detections around the network by hand: boxes, scores, crops, colours, and files to files."""

import contextlib
import dataclasses
import importlib
import json
import types

import numpy as np
import pytest
from absl import flags
from PIL import Image

from ecdit import evaluate
from ecdit.errors import UserError
from ecdit.evaluation.geneval import CLASSES, COLOURS
from ecdit.evaluation.geneval_colours import colour_classifier, colour_embeddings, cut_out
from ecdit.evaluation.geneval_detector import MAX_INSTANCES, Instances, instances, prepare, read_detector
from ecdit.evaluation.geneval_images import line_of, look, samples, state_of
from ecdit.evaluation.geneval_lines import image_of, judge_lines
from ecdit.pretrained.config_json import WeightsError

DOG, CAR = CLASSES.index("dog"), CLASSES.index("car")
METADATA = {
    "tag": "colors",
    "prompt": "a photo of a red car",
    "include": [{"class": "car", "count": 1, "color": "red"}],
}
PLAIN = {"tag": "single_object", "prompt": "a photo of a dog", "include": [{"class": "dog", "count": 1}]}


def class_logits(*rows):
    """Logits of queries whose classes have the given probabilities; the rest is "no object"."""
    logits = np.full((len(rows), len(CLASSES) + 1), -30.0, np.float32)
    for row, probabilities in zip(logits, rows, strict=True):
        row[-1] = np.log(max(1 - sum(probabilities.values()), 1e-13))
        for place, probability in probabilities.items():
            row[place] = np.log(probability)
    return logits


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def best(found, number=1):
    """The most probable boxes with their classes."""
    order = np.argsort(-found.boxes[:, 4])[:number]
    return found.boxes[order], found.classes[order].tolist()


HALVES = np.array([[[4, -4], [4, -4]]], np.float32)  # enlarged to 8 columns: 4, 4, 3, 1, -1, -3, -4, -4


def test_a_box_and_its_score_by_hand():
    """The score is the class's probability times the mean probability inside the mask."""
    found = instances(class_logits({DOG: 0.75}), HALVES, (8, 8), (8, 8), (8, 8))
    boxes, classes = best(found)
    assert classes == [DOG]
    np.testing.assert_array_equal(boxes[0, :4], [0, 0, 4, 8])
    assert boxes[0, 4] == pytest.approx(0.75 * sigmoid([4, 4, 3, 1]).mean(), rel=1e-5)
    np.testing.assert_array_equal(found.masks[0], np.arange(8)[None].repeat(8, 0) < 4)


def test_padding_is_cut_before_masks_get_the_image_s_size():
    """Only the first 4 columns of 8 are image, all positive; the image is twice as large."""
    boxes, _ = best(instances(class_logits({DOG: 0.75}), HALVES, (8, 8), (8, 4), (16, 8)))
    np.testing.assert_array_equal(boxes[0, :4], [0, 0, 8, 16])
    columns = [4, 4, 4, 3.75, 3.25, 2.5, 1.5, 1]
    assert boxes[0, 4] == pytest.approx(0.75 * sigmoid(columns).mean(), rel=1e-5)


def test_a_query_can_be_two_classes_and_an_empty_mask_scores_zero():
    masks = np.concatenate([HALVES, np.full((1, 2, 2), -1, np.float32)])
    found = instances(class_logits({DOG: 0.5, CAR: 0.25}, {CAR: 0.9}), masks, (8, 8), (8, 8), (8, 8))
    boxes, classes = best(found, 2)
    assert classes == [DOG, CAR]
    np.testing.assert_array_equal(boxes[0, :4], boxes[1, :4])
    assert boxes[0, 4] == pytest.approx(2 * boxes[1, 4], rel=1e-5)
    empty = found.boxes[(found.queries == 1) & (found.classes == CAR)]
    np.testing.assert_array_equal(empty, [[0, 0, 0, 0, 0]])


def test_at_most_a_hundred_pairs_of_query_and_class_are_instances():
    found = instances(class_logits({DOG: 0.6}, {CAR: 0.3}), np.concatenate([HALVES, -HALVES]), (8, 8), (8, 8), (8, 8))
    assert len(found.boxes) == MAX_INSTANCES == 100


@pytest.mark.parametrize(
    ("height", "width", "inside", "padded"),
    [
        (512, 512, (800, 800), (800, 800)),
        (1024, 512, (1333, 667), (1344, 672)),  # the longest side limits
        (300, 400, (800, 1067), (800, 1088)),
    ],
)
def test_an_image_is_scaled_and_padded(height, width, inside, padded):
    image = np.full((height, width, 3), 100, np.uint8)
    pixels, found = prepare(image)
    assert (found, pixels.shape) == (inside, (1, 3, *padded))
    assert pixels.dtype == np.float32
    mean, deviation = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    np.testing.assert_allclose(pixels[0, :, 0, 0], (100 - mean) / deviation, rtol=1e-5)
    if padded != inside:
        np.testing.assert_allclose(pixels[0, :, -1, -1], (128 - mean) / deviation, rtol=1e-5)


def test_pixels_are_interpolated_between_centres_and_rounded():
    """Two columns, 0 and 255, become 800: the change runs from column 200 to 600, in whole levels."""
    pixels, _ = prepare(np.tile(np.array([0, 255], np.uint8)[None, :, None], (2, 1, 3)))
    levels = pixels[0, 0, 0] * 58.395 + 123.675
    np.testing.assert_allclose(levels, np.rint(levels), atol=1e-3)
    expected = np.clip((np.arange(800) + 0.5) / 400 - 0.5, 0, 1) * 255
    np.testing.assert_allclose(levels, expected, atol=0.5 + 1e-3)


def test_an_object_is_cut_out_on_grey():
    image = Image.fromarray(np.full((6, 8, 3), 10, np.uint8))
    mask = np.zeros((6, 8), bool)
    mask[2:4, 3:6] = True
    mask[2, 3] = False
    crop = np.asarray(cut_out(image, np.array([3, 2, 6, 4, 0.9], np.float32), mask))
    assert crop.shape == (2, 3, 3)
    np.testing.assert_array_equal(crop[0, 0], [153, 153, 153])
    np.testing.assert_array_equal(crop.reshape(-1, 3)[1:], np.full((5, 3), 10))


class FakeClip:
    """Embeds an image as its mean colour, and a caption by which colour it names; both of any length."""

    image_size, caption_length = 4, 77

    def __init__(self):
        self.captions = []
        self.tokenizer = types.SimpleNamespace(encode=self.encode)

    def encode(self, captions, length):
        self.captions += captions
        return types.SimpleNamespace(ids=captions)

    def read(self, captions):
        values = {"red": [1, 0, 0], "green": [0, 1, 0], "blue": [0, 0, 1], "white": [1, 1, 1]}
        rows = []
        for caption in captions:
            colour = next(colour for colour in COLOURS if f" {colour}" in caption)
            rows.append(np.array(values.get(colour, [-1, -1, -1]), float) * (1 + 9 * caption.endswith("object")))
        return np.stack(rows)

    def see(self, images):
        return images.astype(float).mean(axis=(1, 2))


def test_colours_are_those_of_the_crops():
    """The left object is red and the right one blue; each box has its own mask and crop."""
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, :4], image[:, 4:] = (200, 0, 0), (0, 0, 200)
    boxes = np.array([[4, 0, 8, 8, 0.9], [0, 0, 4, 8, 0.8]], np.float32)
    masks = [np.arange(8)[None].repeat(8, 0) >= 4, np.arange(8)[None].repeat(8, 0) < 4]
    clip = FakeClip()
    classify = colour_classifier(clip)
    assert classify(Image.fromarray(image), boxes, masks, "car") == ["blue", "red"]
    assert clip.captions[:3] == ["a photo of a red car", "a photo of a red-colored car", "a photo of a red object"]
    classify(Image.fromarray(image), boxes, masks, "car")
    assert len(clip.captions) == 30  # a class is encoded once


def test_a_colour_s_embedding_is_the_mean_of_three_of_length_one():
    """The third caption's embedding is ten times as long, which must not count."""

    class Uneven(FakeClip):
        def read(self, captions):
            rows = super().read(captions)
            rows[::3] = np.array([0, 1, 0])
            return rows

    red = colour_embeddings(Uneven(), "car")[0]
    np.testing.assert_allclose(red, np.array([2, 1, 0]) / np.sqrt(5), rtol=1e-12)


@pytest.fixture
def folder(tmp_path):
    """Two prompts with two images each, in GenEval's layout."""
    for number, metadata in enumerate((METADATA, PLAIN)):
        place = tmp_path / f"images/{number:05d}"
        (place / "samples").mkdir(parents=True)
        (place / "metadata.jsonl").write_text(json.dumps(metadata) + "\n")
        for image in range(2):
            pixels = np.full((8, 8, 3), (200, 0, 0) if image == 0 else (0, 0, 200), np.uint8)
            Image.fromarray(pixels).save(place / f"samples/{image:04d}.png")
    return tmp_path / "images"


EVERYWHERE = Instances(
    np.array([[0, 0, 8, 8, 0.2], [0, 0, 8, 8, 0.9], [0, 0, 8, 8, 0.1]], np.float32),
    np.array([CAR, CAR, DOG]),
    np.array([0, 1, 0]),
    {0: np.ones((8, 8), bool), 1: np.ones((8, 8), bool)},
)


def test_lines_are_those_that_the_scorer_reads(folder, tmp_path):
    out = tmp_path / "detections.jsonl"
    classify = colour_classifier(FakeClip())
    names = list(look(samples(folder), lambda image: EVERYWHERE, classify, {}, out))
    assert names == [f"0000{prompt}/samples/000{image}.png" for prompt in (0, 1) for image in (0, 1)]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines[0]["detections"]["car"][1] == [0, 0, 8, 8, float(np.float32(0.9))]
    assert [line["colors"] for line in lines] == [{"car": [None, "red"]}, {"car": [None, "blue"]}, {}, {}]
    assert [verdict.correct for verdict in judge_lines(out)] == [True, False, False, False]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["detections.jsonl", "images"]


def test_only_boxes_that_can_count_have_colours(folder):
    """The classifier sees the box above the threshold alone, and in the order of its score."""
    seen = []

    def classify(image, boxes, masks, name):
        seen.append((name, boxes[:, 4].tolist(), len(masks)))
        return ["green"] * len(boxes)

    line = line_of(samples(folder)[0], Image.new("RGB", (8, 8)), EVERYWHERE, classify)
    assert seen == [("car", [pytest.approx(0.9)], 1)]
    assert line["colors"] == {"car": [None, "green"]}
    image_of(line)


def test_each_box_is_given_the_mask_of_its_own_query(folder):
    """The car's box is the second of all, of query 3; the first is a dog's, of query 5."""
    masks = {3: np.eye(8, dtype=bool), 5: np.ones((8, 8), bool)}
    found = Instances(np.array([[0, 0, 8, 8, 0.8]] * 2, np.float32), np.array([DOG, CAR]), np.array([5, 3]), masks)
    seen = []

    def classify(image, boxes, masks, name):
        seen.extend(masks)
        return ["red"]

    line_of(samples(folder)[0], Image.new("RGB", (8, 8)), found, classify)
    np.testing.assert_array_equal(seen, [np.eye(8, dtype=bool)])


def test_an_unreadable_image_is_named_and_the_lines_before_it_are_kept(folder, tmp_path):
    out, broken = tmp_path / "detections.jsonl", folder / "00001/samples/0000.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:40])
    calls = []

    def detect(image):
        calls.append(image)
        return EVERYWHERE

    def detect_all():
        calls.clear()
        return list(look(samples(folder), detect, colour_classifier(FakeClip()), {"detector": "a"}, out))

    with pytest.raises(UserError, match=r"00001/samples/0000\.png: cannot be read as an image"):
        detect_all()
    assert not out.exists()
    assert len(calls) == 2
    with (tmp_path / "detections.jsonl.part").open("a") as file:
        file.write('{"filename": "00001/sam')  # of a process that was killed
    broken.write_bytes(whole)
    assert len(detect_all()) == 4
    assert len(calls) == 2  # the first two are not looked at again
    assert [json.loads(line)["filename"] for line in out.read_text().splitlines()] == [
        f"0000{prompt}/samples/000{image}.png" for prompt in (0, 1) for image in (0, 1)
    ]
    assert not (tmp_path / "detections.jsonl.part").exists()


def test_lines_of_another_detector_are_not_continued(folder, tmp_path):
    out = tmp_path / "detections.jsonl"
    first = look(samples(folder), lambda image: EVERYWHERE, colour_classifier(FakeClip()), {"detector": "a"}, out)
    next(first)
    first.close()
    with pytest.raises(UserError, match=r"detections\.jsonl\.part: is of another detector"):
        next(look(samples(folder), lambda image: EVERYWHERE, None, {"detector": "b"}, out))
    with (tmp_path / "detections.jsonl.part").open("a") as file:
        file.write("\0\0\n")  # a power failure
    with pytest.raises(UserError, match=r"detections\.jsonl\.part: is damaged .* remove it to begin again"):
        next(look(samples(folder), lambda image: EVERYWHERE, None, {"detector": "a"}, out))


def test_lines_of_images_that_were_drawn_again_are_not_continued(folder, tmp_path):
    """By other weights, say: the manifest tells, where a copy has given the new images the sizes and times of old ones.

    Without a manifest the folder is another program's, and goes on as long as its images are the same.
    """
    out, manifest = tmp_path / "detections.jsonl", folder / "manifest.json"

    def begin():
        wanted = samples(folder)
        made_by = state_of(folder, wanted) | {"detector": "a"}
        lines = look(wanted, lambda image: EVERYWHERE, colour_classifier(FakeClip()), made_by, out)
        next(lines)
        lines.close()

    begin()
    begin()
    (tmp_path / "detections.jsonl.part").unlink()
    for step, refused in ((100, False), (100, False), (200, True)):
        manifest.write_text(json.dumps({"step": step, "finished": True, "images": []}))
        with pytest.raises(UserError, match="or of other images") if refused else contextlib.nullcontext():
            begin()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "00001/metadata.jsonl").unlink(), r"00001/metadata\.jsonl: is missing"),
        (
            lambda folder: (folder / "00001/metadata.jsonl").write_text('{"tag": "colors", "prompt": "a"}'),
            r"metadata\.jsonl, line 1: metadata\.include is missing",
        ),
        (
            lambda folder: (folder / "00001/metadata.jsonl").write_text(json.dumps(PLAIN).replace("dog", "dragon")),
            "unknown class",
        ),
        (
            lambda folder: (folder / "00001/metadata.jsonl").write_text(2 * (json.dumps(PLAIN) + "\n")),
            "has 2 lines; it must have one",
        ),
        (
            lambda folder: [path.unlink() for path in (folder / "00001/samples").iterdir()],
            "00001/samples has no images",
        ),
        (lambda folder: (folder / "manifest.json").write_text('{"finished": false, "images": []}'), "is not finished"),
    ],
)
def test_folders_that_are_not_genevals_are_refused(folder, change, said):
    change(folder)
    with pytest.raises(UserError, match=said):
        samples(folder)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no folders such as 00000/"):
        samples(tmp_path)
    with pytest.raises(UserError, match="is no directory"):
        samples(tmp_path / "none")


def command(*arguments):
    module, values = importlib.import_module(evaluate.EVALUATIONS["geneval"]), flags.FlagValues()
    module.define_flags(values)
    values(["geneval", *arguments])
    module.run(values)


def test_without_weights_it_says_what_to_download_and_where_to_put_it(folder, tmp_path):
    given = [f"--images={folder}", f"--out={tmp_path}/d.jsonl"]
    with pytest.raises(UserError, match=r"--detector is missing\..*\n *hf download facebook/mask2former"):
        command(*given)
    with pytest.raises(UserError, match=r"--clip is missing\..*(\n.*)*openai/clip-vit-large-patch14"):
        command(*given, f"--detector={tmp_path}")
    with pytest.raises(UserError, match=r"--detector=.*/none is no directory"):
        command(*given, f"--detector={tmp_path}/none")


def write_config(folder, labels, **more):
    config = {"model_type": "mask2former", "id2label": {str(i): label for i, label in enumerate(labels)}, **more}
    (folder / "config.json").write_text(json.dumps(config))


NAMES = ["mouse" if name == "computer mouse" else name for name in CLASSES]


@pytest.mark.parametrize(
    ("labels", "more", "said"),
    [
        (NAMES, {"model_type": "maskformer"}, "model_type = 'maskformer': must be 'mask2former'"),
        ([*NAMES, "wall"], {}, "id2label has 81 classes; it must have COCO's 80 instances"),
        ([*NAMES[1:], "person"], {}, r"id2label\.0 = 'bicycle': must be 'person'"),
        (NAMES, {}, r"is a pickle, which can run any code"),
    ],
)
def test_folders_of_other_detectors_and_pickles_are_refused(tmp_path, labels, more, said):
    write_config(tmp_path, labels, **more)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match=said):
        read_detector(tmp_path, "cpu")


def test_numbers_that_are_not_finite_are_named_by_their_image_and_network(folder, tmp_path):
    """NaN would be the first colour, red, and so a right answer."""
    clip, out = FakeClip(), tmp_path / "detections.jsonl"
    clip.see = lambda images: np.full((len(images), 3), np.nan)
    with pytest.raises(UserError, match=r"00000/samples/0000\.png: the embedding of a car by --clip is not finite"):
        list(look(samples(folder), lambda image: EVERYWHERE, colour_classifier(clip), {}, out))
    broken = dataclasses.replace(EVERYWHERE, boxes=np.full((3, 5), np.nan, np.float32))
    with pytest.raises(UserError, match=r"00000/samples/0000\.png: a score or box by --detector is not finite"):
        list(look(samples(folder), lambda image: broken, colour_classifier(FakeClip()), {}, out))
