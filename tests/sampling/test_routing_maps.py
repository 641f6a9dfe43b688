"""Tests heat maps of experts per token: their averages, colours and positions in the image."""

import numpy as np
import pytest
from PIL import ImageFont

from ecdit.diffusion.solvers import call_times
from ecdit.sampling import routing_maps
from ecdit.sampling.routing_maps import VIRIDIS, colour, draw_layers, draw_maps, spread_steps, stage_steps, summaries


@pytest.mark.parametrize(
    ("num_steps", "steps"), [(50, (5, 25, 45)), (25, (2, 12, 22)), (10, (1, 5, 9)), (2, (0, 1, 1)), (1, (0, 0, 0))]
)
def test_stages_are_the_steps_that_start_nearest_to_their_times(num_steps, steps):
    """Step i of 50 starts at time 1 - i / 50: 0.9 is step 5."""
    assert tuple(stage_steps(call_times(num_steps)).values()) == steps


def test_means_by_hand():
    """One image, ten steps, two layers, four tokens; layer 2 has thrice layer 1's counts, which are the step's."""
    counts = np.arange(10)[None, :, None, None] * np.array([1, 3])[None, None, :, None] * np.ones((1, 1, 1, 4), int)
    means = {label: values[0, 0] for label, values in summaries(counts, call_times(10)).items()}
    assert means == {
        "layer 1\nall steps": 4.5,
        "layer 2\nall steps": 13.5,
        "all layers\nearly, t = 0.90": 2,
        "all layers\nmiddle, t = 0.50": 10,
        "all layers\nlate, t = 0.10": 18,
    }


def test_colours_by_hand():
    """The ends of the table at the ends, a colour of the table at each ninth, and the middle of two between them."""
    np.testing.assert_array_equal(colour(np.array([0.0, 4.5, 9.0]), 4.5), VIRIDIS[[0, 9, 9]])
    np.testing.assert_array_equal(colour(np.arange(10.0), 9.0), VIRIDIS)
    np.testing.assert_array_equal(colour(np.array(0.5), 9.0), [70, 20, 102])


def test_equal_steps_look_equally_large():
    """CIE lightness L* = 116 Y^(1/3) - 16 of sRGB colours (IEC 61966-2-1) rises by the same amount a step."""
    linear = ((VIRIDIS / 255 + 0.055) / 1.055) ** 2.4
    lightness = 116 * np.cbrt(linear @ [0.2126, 0.7152, 0.0722]) - 16
    steps = np.diff(lightness)
    np.testing.assert_allclose(steps, steps.mean(), rtol=0.12)


def test_a_token_is_a_square_at_its_place_under_its_layer():
    """Eleven images of 32 pixels, four tokens: eight rows; the one token that is taken is the upper right one."""
    images = np.full((11, 32, 32, 3), 200, np.uint8)
    counts = np.zeros((11, 10, 2, 4), int)
    counts[:, :, 1, 1] = 6  # in layer 2 alone
    page = np.asarray(draw_maps(images, ["a caption"] * 11, counts, call_times(10)))
    assert page.shape == (32 + 8 * (128 + 32) + 14 + 26 + 8, 8 + 6 * (128 + 8), 3)
    for row in range(8):
        cells = [page[32 + row * 160 :, 8 + column * 136 :][:128, :128] for column in range(6)]
        assert (cells[0] == 200).all()
        assert (cells[1] == VIRIDIS[0]).all()
        expected = np.broadcast_to(VIRIDIS[0], (128, 128, 3)).copy()
        expected[:64, 64:] = VIRIDIS[9]
        np.testing.assert_array_equal(cells[2], expected)
        for cell in cells[3:]:  # the mean over both layers: 3 of the largest, 6
            np.testing.assert_array_equal(cell[0, 64], colour(np.array(3.0), 6.0))
    legend = page[32 + 8 * 160 :]
    np.testing.assert_array_equal(legend[0, [8, 8 + 255]], VIRIDIS[[0, 9]])
    assert (legend[14:, :280] == 0).all(axis=-1).any(), "numbers under the colours"
    assert (legend[:14, 272:] < 128).any(), "what they count beside them"


@pytest.mark.parametrize(
    ("num_steps", "count", "steps"), [(3, 8, [0, 1, 2]), (50, 3, [0, 24, 49]), (10, 4, [0, 3, 6, 9]), (5, 1, [0])]
)
def test_spread_steps_have_both_ends(num_steps, count, steps):
    assert spread_steps(num_steps, count) == steps


def test_one_image_s_maps_stand_in_the_row_of_their_time_and_the_column_of_their_layer():
    """Twelve steps, of which eight are drawn; four tokens, three layers; in step 11 all go to layer 2's token 1."""
    counts = np.zeros((12, 3, 4), int)
    counts[11, 1, 1] = 5
    image = np.full((32, 32, 3), 200, np.uint8)
    page = np.asarray(draw_layers(image, "a caption", counts, call_times(12)))
    assert (page[19 : 19 + 128, 8 : 8 + 128] == 200).all()
    left, step = 8 + 128 + 8 + 52, 64 + 8
    for row in range(8):
        for column in range(3):
            expected = np.broadcast_to(VIRIDIS[0], (64, 64, 3)).copy()
            if (row, column) == (7, 1):
                expected[:32, 32:] = VIRIDIS[9]
            cell = page[19 + row * step :, left + column * step :][:64, :64]
            np.testing.assert_array_equal(cell, expected, err_msg=f"{row} {column}")
        assert (page[19 + row * step :, left - 52 : left][:13] < 128).any(), "the row's time"
    assert (page[147:173, :136] < 128).any(), "the caption"


def test_captions_are_drawn_in_a_font_that_has_their_letters(monkeypatch):
    """Two captions of letters that no font has look alike, and otherwise than a box for each letter would."""
    image, counts, times = np.full((32, 32, 3), 200, np.uint8), np.zeros((2, 1, 4), int), call_times(2)
    pages = {text: np.asarray(draw_layers(image, text, counts, times)) for text in ("\uffff", "\uffff\uffff", "a", "b")}
    assert (pages["a"] != pages["b"]).any()
    np.testing.assert_array_equal(pages["\uffff"], pages["\uffff\uffff"])
    asked = []
    monkeypatch.setattr(routing_maps, "caption_font", lambda text: asked.append(text) or ImageFont.load_default(11))
    draw_maps(image[None], ["кот"], counts[None], times)
    draw_layers(image, "кот", counts, times)
    assert asked == ["кот", "кот"]
