"""Tests the way from image files to features: preparations by hand, batches, and errors that name the file."""

import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ecdit.errors import UserError
from ecdit.evaluation import image_features as module
from ecdit.evaluation.image_features import Extractor, image_features, square_bicubic
from ecdit.evaluation.image_files import check_sizes, image_files, read_image, read_upright
from ecdit.evaluation.moments import moments
from ecdit.evaluation.preparation import SIZE, VARIANTS, clean_fid, pytorch_fid, torch_fidelity, torchmetrics
from ecdit.evaluation.resizing import bilinear, resized, tensorflow_bilinear
from tests.evaluation.test_scorer_commands import result, run


def test_interpolation_by_hand():
    """Two pixels become four: between centres, or as points."""
    np.testing.assert_allclose(bilinear(2, 4), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    np.testing.assert_allclose(tensorflow_bilinear(2, 4), [[1, 0], [0.5, 0.5], [0, 1], [0, 1]])
    np.testing.assert_allclose(bilinear(4, 2), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    np.testing.assert_allclose(tensorflow_bilinear(4, 2), [[1, 0, 0, 0], [0, 0, 1, 0]])
    image = np.arange(6.0).reshape(2, 3, 1)
    np.testing.assert_allclose(resized(image, bilinear(2, 1), bilinear(3, 3))[:, :, 0], [[1.5, 2.5, 3.5]])


@pytest.mark.parametrize(
    ("variant", "of_51"), [*((name, -77 / 128) for name in VARIANTS if name != "pytorch-fid"), ("pytorch-fid", -0.6)]
)
def test_a_flat_image_is_only_normalised(variant, of_51):
    prepared = VARIANTS[variant](np.full((40, 60, 3), 51, np.uint8))
    assert (prepared.shape, prepared.dtype) == ((SIZE, SIZE, 3), np.float32)
    np.testing.assert_allclose(prepared, np.full(prepared.shape, of_51), atol=1e-5)


def stripes(width):
    """Black and white columns, each of one pixel."""
    return np.tile(np.array([0, 255], np.uint8)[np.arange(width) % 2][None, :, None], (SIZE, 1, 3))


def test_variants_differ_in_what_they_make_of_stripes():
    """At half the size, antialiasing mixes columns to grey; without it, one column or the mean of two is taken."""
    image = stripes(2 * SIZE)
    spread = {name: np.ptp(prepare(image)[:, 4:-4]) for name, prepare in VARIANTS.items()}
    assert spread["clean-fid"] < 0.05
    assert spread["torchmetrics"] < 0.05
    np.testing.assert_allclose(torch_fidelity(image), np.full((SIZE, SIZE, 3), -1), atol=1e-5)  # the black ones alone
    np.testing.assert_allclose(pytorch_fid(image), np.zeros((SIZE, SIZE, 3)), atol=1e-5)  # 127.5 between two centres
    # At another ratio only those without antialiasing keep stripes.
    image = stripes(700)
    assert np.ptp(pytorch_fid(image)) > 1.5 < np.ptp(torch_fidelity(image))
    assert np.ptp(torchmetrics(image)[:, 4:-4]) < 0.5


def test_bicubic_overshoot_is_clipped_and_not_rounded():
    image = np.zeros((SIZE, 20, 3), np.uint8)
    image[:, 10:] = 255
    prepared = clean_fid(image)
    assert prepared.min() == -1
    assert prepared.max() == 127 / 128
    levels = prepared[0, :, 0] * 128 + 128
    assert np.abs(levels - np.rint(levels)).max() > 0.1


def test_channels_and_axes_stay_where_they_are():
    image = np.zeros((30, 50, 3), np.uint8)
    image[:15, :, 0] = image[:, :25, 1] = 200
    for prepare in VARIANTS.values():
        prepared = prepare(image)
        assert prepared[10, 290, 0] > 0 > prepared[290, 10, 0]
        assert prepared[290, 10, 1] > 0 > prepared[10, 290, 1]
        assert prepared[:, :, 2].max() < -0.9


def test_cmmd_cuts_the_centre_square_before_it_resizes():
    image = np.zeros((4, 9, 3), np.uint8)
    image[:, 2:6] = 100  # (9 - 4) // 2 = 2
    np.testing.assert_array_equal(square_bicubic(image, 4), np.full((4, 4, 3), 100))
    np.testing.assert_array_equal(square_bicubic(image, 8), np.full((8, 8, 3), 100))


@pytest.fixture
def folder(tmp_path):
    """Seven images of one colour each, 6 x 4 pixels, and another file."""
    (tmp_path / "images/below").mkdir(parents=True)
    for number in range(7):
        place = "images/below" if number > 4 else "images"
        Image.new("RGB", (6, 4), (10 * number, number, 5)).save(tmp_path / place / f"{number}.png")
    (tmp_path / "images/notes.txt").write_text("no image")
    return tmp_path / "images"


MEANS = Extractor("means", lambda image: image.astype(np.float32), lambda images: images.mean(axis=(1, 2)))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 20])
def test_features_come_in_the_files_order_whatever_the_batch(folder, batch_size):
    files = image_files(folder, "--images")
    assert [path.name for path in files] == ["0.png", "1.png", "2.png", "3.png", "4.png", "5.png", "6.png"]
    sizes = []
    extractor = MEANS._replace(features=lambda images: sizes.append(len(images)) or images.mean(axis=(1, 2)))
    found = np.concatenate(list(image_features(files, extractor, batch_size)))
    np.testing.assert_allclose(found, [[10 * number, number, 5] for number in range(7)])
    assert set(sizes) == {batch_size}  # one program is compiled


def test_moments_over_batches_are_those_of_all_features(folder):
    files = image_files(folder, "--images")
    found = moments(image_features(files, MEANS, 2))
    expected = np.array([[10 * number, number, 5] for number in range(7)], float)
    np.testing.assert_allclose(found.mean, expected.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(expected, rowvar=False), rtol=1e-12)
    assert found.covariance.dtype == np.float64


def test_an_unreadable_image_is_named(folder):
    whole = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(whole[:-30])
    for read in (read_image, read_upright):
        with pytest.raises(UserError, match=r"images/3\.png: cannot be read as an image"):
            read(folder / "3.png")
    with pytest.raises(UserError, match=r"images/3\.png: cannot be read as an image"):
        list(image_features(image_files(folder, "--images"), MEANS, 2))


@pytest.mark.parametrize("pixel", [np.uint16(40_000), np.int32(40_000), np.float32(0.5)], ids=["I;16", "I", "F"])
def test_images_that_pillow_would_clip_to_white_or_black_are_refused(tmp_path, pixel):
    path = tmp_path / "deep.tif"
    Image.fromarray(np.full((4, 4), pixel)).save(path)
    for read in (read_image, read_upright, lambda path: check_sizes([path], "--images")):
        with pytest.raises(UserError, match=r"deep\.tif: has mode .*, of more than 8 bits"):
            read(path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_images_of_eight_bits_are_read_in_rgb(tmp_path, mode):
    grey = 255 if mode == "1" else 204  # which Pillow's palette has
    Image.new("RGB", (4, 4), (grey, grey, grey)).convert(mode).save(tmp_path / "a.tif")
    assert (read_image(tmp_path / "a.tif") == grey).all()


def test_features_that_are_not_finite_are_named_by_their_image(folder):
    extractor = MEANS._replace(features=lambda images: np.where(images == 40, np.nan, images).mean(axis=(1, 2)))
    with pytest.raises(UserError, match=r"images/4\.png: its features are not finite; means"):
        list(image_features(image_files(folder, "--images"), extractor, 3))


def test_folders_without_whole_sets_of_images_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"--images=.*/none: is no directory"):
        image_files(tmp_path / "none", "--images")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--images=.*/empty: has no images; their names end in .*\.png"):
        image_files(tmp_path / "empty", "--images")
    (folder / "manifest.json").write_text(json.dumps({"finished": False, "images": []}))
    for place in (folder, folder / "below"):
        with pytest.raises(UserError, match="is not finished"):
            image_files(place, "--images")
    (folder / "manifest.json").write_text(json.dumps({"other": "program"}))
    assert len(image_files(folder, "--images")) == 7


def test_of_a_folder_of_samples_only_the_samples_are_taken(folder):
    """`ecdit.sample` draws a grid and maps of experts beside them."""
    rows = [{"file": "below/5.png"}, {"file": "3.png"}]
    (folder / "manifest.json").write_text(json.dumps({"finished": True, "images": rows}))
    assert image_files(folder, "--images") == [folder / "3.png", folder / "below/5.png"]
    assert len(image_files(folder / "below", "--images")) == 2


def test_mixed_sizes_are_refused_with_two_examples(folder):
    Image.new("RGB", (6, 5)).save(folder / "9.png")
    with pytest.raises(UserError, match=r"9\.png is 6 x 5, .*0\.png is 6 x 4; --mixed_sizes"):
        check_sizes(image_files(folder, "--images"), "--images")


def test_an_image_is_turned_as_its_camera_says(tmp_path):
    """Only for the detector: the packages for FID do not turn images."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert read_upright(tmp_path / "a.jpg").size == (4, 6)
    assert read_image(tmp_path / "a.jpg").shape == (4, 6, 3)


@pytest.fixture
def commands(folder, tmp_path, monkeypatch):
    """Runs a distance of `folder` to another one with `MEANS` as Inception; returns the result."""
    (tmp_path / "real").mkdir()
    for number in range(7):
        Image.new("RGB", (8, 8), (7 * number, 3 * number, number * number)).save(tmp_path / f"real/{number}.png")
    monkeypatch.setattr(module, "inception_extractor", lambda folder, variant: MEANS._replace(name=f"means, {variant}"))

    def measure(name, *options, images=folder, reference=tmp_path / "real", inception=("--inception=x",)):
        given = [f"--images={images}", f"--reference={reference}", *inception, *options]
        run(name, *given, f"--json={tmp_path}/result.json")
        return result(tmp_path / "result.json")

    return measure


def test_distances_of_images_name_their_preparation(commands, tmp_path, capsys):
    found = commands("frechet", f"--save={tmp_path}/a.npz")
    assert found.pop("frechet") > 0
    expected = {"extractor": "means, clean-fid", "preprocessing": "clean-fid", "dimensions": 3}
    assert found == expected | {"samples": 7, "reference_samples": 7}
    assert commands("frechet", "--preprocessing=torchmetrics")["preprocessing"] == "torchmetrics"
    assert commands("frechet", reference=tmp_path / "a.npz")["frechet"] == pytest.approx(0, abs=1e-9)
    with pytest.raises(UserError, match=r"--reference: its features are of 'means, clean-fid', .*'means, pytorch-fid'"):
        commands("frechet", "--preprocessing=pytorch-fid", reference=tmp_path / "a.npz")
    assert "does not say" not in capsys.readouterr().out
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(3), sigma=np.eye(3))
    commands("frechet", reference=tmp_path / "theirs.npz")
    assert "--reference does not say what its features are of" in capsys.readouterr().out
    run("frechet", f"--features={tmp_path}/theirs.npz", f"--reference={tmp_path}/a.npz")
    assert "--features does not say what its features are of" in capsys.readouterr().out
    saved = (f"--features={tmp_path}/a.npz", f"--reference={tmp_path}/real", "--inception=x")
    run("frechet", *saved)
    with pytest.raises(UserError, match=r"--reference: .*'means, pytorch-fid', .* of 'means, clean-fid'"):
        run("frechet", *saved, "--preprocessing=pytorch-fid")
    found = commands("kid", "--subset_size=7", "--subsets=2")
    assert (found["std"], found["preprocessing"]) == (pytest.approx(0, abs=1e-6), "clean-fid")
    assert commands("precision-recall")["samples"] == 7


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("frechet", ()),
        ("kid", ("--subset_size=7", "--subsets=2")),
        ("cmmd", ()),
        ("precision-recall", ()),
    ],
)
def test_the_extractor_of_images_is_not_said_of_files_beside_them(commands, name, options, tmp_path, monkeypatch):
    unit = lambda images: np.eye(3)[np.arange(len(images)) % 3]  # noqa: E731  # of length 1, for CMMD
    monkeypatch.setattr(module, "clip_extractor", lambda folder: MEANS._replace(name="unit", features=unit))
    np.save(tmp_path / "own.npy", np.eye(3)[np.arange(7) % 3])
    network = ("--clip=x",) if name == "cmmd" else ("--inception=x",)
    named = "unit" if name == "cmmd" else "means, clean-fid"
    found = commands(name, *options, reference=tmp_path / "own.npy", inception=network)
    assert (found["extractor"], found["reference_extractor"]) == (named, None)
    given = [f"--features={tmp_path}/own.npy", f"--reference={tmp_path}/real", f"--json={tmp_path}/other.json"]
    run(name, *given, *network, *options)
    found = result(tmp_path / "other.json")
    assert (found["extractor"], found["reference_extractor"]) == (None, named)


def test_images_of_other_kinds_are_refused_by_the_commands(commands, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--reference=.*/empty: has no images"):
        commands("frechet", reference=tmp_path / "empty")
    with pytest.raises(UserError, match=r"--inception is missing: images need a folder .*in safetensors"):
        commands("frechet", inception=())
    with pytest.raises(UserError, match="--extractor=a: images have that of their network"):
        commands("kid", "--extractor=a")
    with pytest.raises(UserError, match="either --features or --images"):
        commands("kid", "--features=a.npy")
    with pytest.raises(UserError, match="--clip is missing: images need the folder of a CLIP"):
        commands("cmmd", inception=())
    Image.new("RGB", (3, 3)).save(folder / "9.png")
    with pytest.raises(UserError, match=r"--images=.*images of several sizes"):
        commands("frechet")
    few = MEANS._replace(prepare=lambda image: image[:1, :1].astype(np.float32))
    module.inception_extractor = lambda folder, variant: few  # monkeypatch restores it
    assert commands("frechet", "--mixed_sizes")["samples"] == 8
    for path in image_files(folder, "--images")[2:]:
        path.unlink()
    with pytest.raises(UserError, match="--images: 2 samples, fewer than the 3 dimensions"):
        commands("frechet", "--mixed_sizes")


def test_what_is_known_to_be_refused_is_refused_before_the_network_runs(commands, monkeypatch, tmp_path):
    ran = []
    extractor = MEANS._replace(
        name="means, now", dimensions=2048, features=lambda images: ran.append(0) or images.mean(axis=(1, 2))
    )
    monkeypatch.setattr(module, "inception_extractor", lambda folder, variant: extractor)
    with pytest.raises(UserError, match="--images: 7 samples, fewer than the 2048 dimensions"):
        commands("frechet")
    with pytest.raises(UserError, match="--subset_size=1000: --images has 7 images"):
        commands("kid")
    np.savez(tmp_path / "before.npz", mu=np.zeros(3), sigma=np.eye(3), extractor="means, before")
    with pytest.raises(UserError, match=r"its features are of 'means, before', .*'means, now'"):
        commands("frechet", "--allow_few_samples", reference=tmp_path / "before.npz")
    np.save(tmp_path / "bad.npy", np.full((9, 3), np.nan))
    with pytest.raises(UserError, match="must be finite"):
        commands("precision-recall", reference=tmp_path / "bad.npy")
    assert not ran


def test_images_in_linked_folders_count_and_a_link_upwards_ends(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (6, 4)).save(tmp_path / "elsewhere/8.png")
    for name, target in (("linked", tmp_path / "elsewhere"), ("again", tmp_path / "elsewhere"), ("below/up", folder)):
        (folder / name).symlink_to(target)
    found = image_files(folder, "--images")
    assert sorted(path.name for path in found) == [f"{number}.png" for number in (*range(7), 8)]


@pytest.mark.parametrize(("kind", "channels"), [(2, 3), (6, 4)], ids=["RGB", "RGBA"])
def test_sixteen_bits_a_colour_are_refused_although_pillow_takes_them_for_eight(tmp_path, kind, channels):
    """Such a PNG, 1 x 1, by hand: Pillow writes none."""
    pixel = b"".join(value.to_bytes(2, "big") for value in (300, 70, 5000, 65535)[:channels])
    header = struct.pack(">IIBBBBB", 1, 1, 16, kind, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + pixel)), (b"IEND", b""))
    written = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + written)
    with Image.open(tmp_path / "deep.png") as image:
        assert image.mode in ("RGB", "RGBA")
        image.load()
    for read in (read_image, read_upright, lambda path: check_sizes([path], "--images")):
        with pytest.raises(UserError, match=r"deep\.png: has mode RGBA?;16B, of more than 8 bits"):
            read(tmp_path / "deep.png")


@pytest.mark.parametrize("images", [["0.png"], [], [{"path": "0.png"}], {"0.png": {}}])
def test_another_program_s_manifest_is_none(folder, images):
    (folder / "manifest.json").write_text(json.dumps({"finished": True, "images": images}))
    assert len(image_files(folder, "--images")) == 7
