"""Tests grids and pages of images: each image is above its own caption, in order, in any script."""

import json

import numpy as np
import pytest
from PIL import Image

from ecdit.diffusion.solvers import call_times
from ecdit.sampling import grids
from ecdit.sampling.grids import save_grid, save_png, wrapped
from ecdit.sampling.image_folder import begin_folder, finish_folder
from ecdit.sampling.layouts import Planned
from ecdit.sampling.routing_maps import draw_maps

CAPTIONS = ["red heart", "tiger", "owl", "flag of Chad", "fire", "a caption that needs more than a single line", "x"]
IMAGES = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), np.uint8)
CELL = (136, 160)  # width and height: 128 pixels of image, with the gap, and the lines of the caption below


def read(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """Each image with its caption, as a grid of one."""
    path, found = tmp_path_factory.mktemp("cells") / "cell.png", []
    for i in range(len(CAPTIONS)):
        save_grid(IMAGES[i : i + 1], CAPTIONS[i : i + 1], path)
        found.append(read(path))
    return found


def assert_cells(grid, cells):
    """Three columns: the cells in rows, then white."""
    rows = np.stack([grid[y : y + CELL[1], x : x + CELL[0]] for y in (0, 160, 320) for x in (0, 136, 272)])
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(row, cells[i] if i < len(cells) else 255, err_msg=f"cell {i}")


def test_a_cell_is_the_image_enlarged_above_its_caption(cells):
    for image, cell in zip(IMAGES, cells, strict=True):
        assert cell.shape == (CELL[1], CELL[0], 3)
        np.testing.assert_array_equal(cell[:128, 4:132], image.repeat(4, axis=0).repeat(4, axis=1))
    assert len({cell[128:].tobytes() for cell in cells}) == len(CAPTIONS)


def test_every_image_of_a_grid_has_its_own_caption(cells, tmp_path):
    save_grid(IMAGES, CAPTIONS, tmp_path / "grid.png")
    assert_cells(read(tmp_path / "grid.png"), cells)


def test_what_the_sample_command_writes_belongs_together(cells, tmp_path):
    repeats, out = [0, 0, 0, 1, 0, 0, 2], tmp_path / "out"
    files = [f"{i:05d}.png" for i in range(7)]
    planned = [Planned(*one, "") for one in zip(files, CAPTIONS, repeats, strict=True)]
    begin_folder(out, planned, {"step": 3}, {})
    for image, file in zip(IMAGES, files, strict=True):
        save_png(image, out / file)
    finish_folder(out, planned)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["step"] == 3
    assert [(row["prompt"], row["repeat"]) for row in manifest["images"]] == list(zip(CAPTIONS, repeats, strict=True))
    for row, image in zip(manifest["images"], IMAGES, strict=True):
        np.testing.assert_array_equal(read(tmp_path / "out" / row["file"]), image)
    assert_cells(read(tmp_path / "out/grid.png"), cells)


def test_every_row_of_the_maps_has_its_own_image_counts_and_caption():
    """A page of seven has the rows of seven pages of one; the largest count, which sets the colours, is in each."""
    counts = np.random.default_rng(1).integers(0, 4, (7, 2, 2, 4))
    counts[:, :, :, 0] = 5
    page = np.asarray(draw_maps(IMAGES, CAPTIONS, counts, call_times(2)))
    for i in range(7):
        alone = np.asarray(draw_maps(IMAGES[i : i + 1], CAPTIONS[i : i + 1], counts[i : i + 1], call_times(2)))
        np.testing.assert_array_equal(page[32 + 160 * i :][:160], alone[32:][:160], err_msg=f"row {i}")


SCRIPTS = {
    "accents": ("é", "ô"),
    "Cyrillic": ("куб", "шар"),
    "Han": ("红心", "蓝海"),
    "Arabic": ("قلب", "بحر"),
    "Devanagari": ("लाल", "नाक"),
    "emoji": ("😀", "🦊"),
}


@pytest.fixture
def fonts_of_the_system(monkeypatch):
    """Replaces fontconfig: sets the only font of the system, or none."""

    def replace(font):
        monkeypatch.setattr(grids, "_system_font", lambda characters: font)
        grids._covering_font.cache_clear()

    yield replace
    grids._covering_font.cache_clear()


@pytest.mark.parametrize("script", SCRIPTS)
def test_captions_of_any_script_are_told_apart(script, tmp_path):
    """Missing glyphs are all the same box, so that captions as long as each other would look the same."""
    same = IMAGES[:1].repeat(2, axis=0)
    save_grid(same, SCRIPTS[script], tmp_path / "grid.png", columns=2)
    grid = read(tmp_path / "grid.png")
    assert (grid[:, : CELL[0]] != grid[:, CELL[0] :]).any()


@pytest.mark.parametrize("font", [None, grids._pillow_font()], ids=["no font", "a font without the glyphs"])
def test_captions_that_no_font_covers_are_numbered_and_listed(font, tmp_path, fonts_of_the_system):
    fonts_of_the_system(font)
    captions = ["red heart", *(one for one, _ in SCRIPTS.values())]
    save_grid(IMAGES, captions, tmp_path / "grid.png")
    numbered = ["red heart", *(f"caption {i}: see grid.txt" for i in range(2, 8))]
    assert (tmp_path / "grid.txt").read_text(encoding="utf-8").splitlines() == [
        f"{i}: {caption}" for i, caption in enumerate(captions, 1)
    ]
    save_grid(IMAGES, numbered, tmp_path / "ascii.png")
    np.testing.assert_array_equal(read(tmp_path / "grid.png"), read(tmp_path / "ascii.png"))
    assert not (tmp_path / "ascii.txt").exists()


def test_lines_fit_their_width_and_keep_every_character():
    font = grids._pillow_font()
    text = "a  caption of words and\nincomprehensibilities-without-end " + "W" * 40
    lines = wrapped(text, font, 100, 99)
    assert max(map(font.getlength, lines)) <= 100
    assert "".join(lines).replace(" ", "") == "".join(text.split())
    assert wrapped(text, font, 100, 2) == lines[:2]
    assert wrapped("red heart", font, 100, 2) == ["red heart"]


@pytest.mark.parametrize("piece", ["ab", "a "])
def test_of_a_long_caption_only_what_is_shown_is_measured(monkeypatch, piece):
    """Measuring all 10,000 characters of 64 captions takes longer than drawing the images."""
    font, measured = grids._pillow_font(), []

    def width(self, text):
        measured.append(text)
        return 6.0 * len(text)

    monkeypatch.setattr(type(font), "getlength", width)
    text = 5000 * piece
    assert wrapped(text, font, 59, 2) == [
        text[:9].strip(),
        text[9:18].strip() if piece == "ab" else text[10:19].strip(),
    ]
    assert len(measured) < 50
