"""The page of a sample's routing in a real browser: what it shows, by mouse, by keys and to a screen reader.

With ECDIT_SCREENSHOTS=FOLDER it writes the images of docs/routing_maps.md, of the page ECDIT_ROUTING_PAGE if that is
set and else of this test's own.
"""

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ecdit.diffusion.solvers import call_times
from ecdit.errors import UserError
from ecdit.sampling import routing_page
from ecdit.sampling.routing_maps import VIRIDIS, colour
from ecdit.sampling.routing_page import quantise, render_page
from ecdit.sampling.routing_tables import counts_of, takings
from tests.browser import CHROMIUM, Browser

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
PROMPTS = ["a red disc", 'a "green" square</script><b>', "a blue bar"]  # a prompt is text, whatever it has in it
STEPS, LAYERS, GRID, EXPERTS = 4, 3, 4, 5
READY = "document.body?.dataset.ready === ''"


def draw_images():
    """Three images of 32 pixels."""
    pages = [Image.new("RGB", (32, 32), shade) for shade in ("#dfe7ee", "#f3ead8", "#e6e6f2")]
    draws = [ImageDraw.Draw(page) for page in pages]
    draws[0].ellipse((9, 9, 22, 22), fill="#c22f2f")
    draws[1].rectangle((3, 12, 17, 28), fill="#2f8f3f")
    draws[2].rectangle((2, 5, 29, 10), fill="#2f4fc2")
    return np.stack([np.asarray(page) for page in pages])


def choose(seed=0):
    """Gates of an expert choice in which each expert takes 4 of 16 tokens, more of them on the drawn shapes later."""
    rng = np.random.default_rng(seed)
    patches = draw_images().reshape(3, GRID, 8, GRID, 8, 3).std(axis=(2, 4, 5)).reshape(3, 1, 1, GRID**2, 1) / 30
    weight = np.linspace(0, 0.5, STEPS)[None, :, None, None, None]
    logits = rng.normal(size=(3, STEPS, LAYERS, GRID**2, EXPERTS)) + weight * patches
    affinity = 1 / (1 + np.exp(-logits))
    lowest = np.sort(affinity, axis=3)[:, :, :, -4:-3]
    return np.where(affinity >= lowest, affinity, 0).astype(np.float32)


GATES = choose()
GATES[1, 2, 1, 6] = [0, 0.25, 0, 0, 0.5]  # what several tests look at: prompt 1, step 2, layer 1, token 6
TOP = float(GATES.max())
SPOT = "#prompt=1&step=2&layer=1&token=6"


def render(gates=GATES, num_images=3, steps=range(STEPS)):
    images, found = draw_images(), takings(draw_images(), gates, 2)
    when = "in the last 2 of 4 steps"
    return render_page(PROMPTS, images, gates, call_times(STEPS), found, "Made up.", when, num_images, list(steps))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "routing.html"
    path.write_text(render(), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tab(page):
    with Browser() as browser:
        browser.open(page.as_uri(), READY)
        yield browser


@pytest.fixture
def browser(tab):
    """The page as it is after a click on nothing: the first prompt, time and layer, all experts."""
    tab.evaluate("(document.activeElement.blur(), change({prompt: 0, step: 0, layer: 0, expert: -1, token: 0}))")
    yield tab
    assert tab.problems == []


def text(browser, name):
    return browser.evaluate(f"document.getElementById({name!r}).textContent")


def labels(browser):
    return browser.evaluate("[...document.querySelectorAll('[role=gridcell]')].map((cell) => cell.ariaLabel)")


def table(browser, name):
    """Rows of cells."""
    rows = f"[...document.querySelectorAll('#{name} tr')]"
    return browser.evaluate(f"{rows}.map((row) => [...row.cells].map((cell) => cell.textContent))")


def expected_labels(prompt, step, layer):
    counts = counts_of(GATES)[prompt, step, layer]
    return [
        f"row {token // GRID + 1}, column {token % GRID + 1}: {count} expert{'' if count == 1 else 's'}"
        for token, count in enumerate(counts)
    ]


def test_quantised_gates_by_hand():
    """Steps of 2 / 255; what is above 0 stays above 0."""
    found = quantise(np.array([0, 1e-30, 0.0039, 1, 2], np.float32), 2.0)
    np.testing.assert_array_equal(found, [0, 1, 1, 128, 255])


def test_a_page_that_is_too_large_is_refused_before_it_is_written(monkeypatch):
    monkeypatch.setattr(routing_page, "MAX_BYTES", 10_000)
    with pytest.raises(UserError, match=r"page of 3 images and 4 times .* --page_images or --page_times"):
        render()


def test_fewer_images_and_times_make_a_smaller_page():
    assert len(render(num_images=1, steps=[0, 3])) < len(render())


def test_no_prompt_ends_the_page_s_data():
    assert "</script><b>" not in render()


@needs_chromium
def test_long_words_and_other_directions_keep_the_page_s_width_and_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PROMPTS", ["x" * 3000, "قطة حمراء كبيرة", "a blue bar"])
    (tmp_path / "page.html").write_text(render(), encoding="utf-8")
    with Browser() as browser:
        browser.open((tmp_path / "page.html").as_uri(), READY)
        browser.evaluate("change({expert: 1})")
        assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        caption = "document.querySelectorAll('#gallery figcaption')[1]"
        assert browser.evaluate(f"{caption}.firstChild.outerHTML") == "<bdi>قطة حمراء كبيرة</bdi>"
        assert browser.evaluate(f"{caption}.textContent").endswith("of 16 patches")


@needs_chromium
def test_it_loads_without_errors_and_asks_for_nothing(browser, page):
    assert browser.evaluate("document.title") == "Which experts take which patches"
    assert text(browser, "problem") == ""
    assert {url.partition(":")[0] for url in browser.requests} <= {"file", "data", "blob"}
    assert [url for url in browser.requests if url.startswith("file:")] == [page.as_uri()]
    assert "http" not in re.sub(r'http-equiv="', "", page.read_text())


@needs_chromium
def test_every_map_has_the_counts_of_the_gates(browser):
    for prompt, step, layer in np.ndindex(3, STEPS, LAYERS):
        browser.evaluate(f"change({{prompt: {prompt}, step: {step}, layer: {layer}}})")
        assert labels(browser) == expected_labels(prompt, step, layer)


@needs_chromium
def test_a_page_of_some_images_and_times_shows_those(tmp_path):
    path = tmp_path / "routing.html"
    path.write_text(render(num_images=2, steps=[1, 3]), encoding="utf-8")
    with Browser() as browser:
        browser.open(f"{path.as_uri()}#prompt=1&step=1&layer=2", READY)
        assert text(browser, "time") == "t = 0.25"
        assert labels(browser) == expected_labels(1, 3, 2)
        assert browser.evaluate("document.querySelectorAll('#prompt option').length") == 2


@needs_chromium
def test_colours_are_those_of_the_pngs(browser):
    """The map's strength is made 1, so that no image shines through."""
    set_strength = "(strength.value = {}, strength.dispatchEvent(new Event('input')))"
    browser.evaluate(set_strength.format(1))
    cells = "[...document.querySelectorAll('[role=gridcell]')].map((cell) => cell.style.backgroundColor)"
    counts = counts_of(GATES)
    expected = colour(counts[0, 0, 0].astype(float), float(counts.max()))
    found = np.array([re.findall(r"\d+", cell)[:3] for cell in browser.evaluate(cells)], int)
    assert np.abs(found - expected.astype(int)).max() <= 1
    assert (VIRIDIS[0] == expected).all(axis=1).any(), "a token without experts"
    browser.evaluate(set_strength.format(0.65))


@needs_chromium
def test_sliders_move_by_keys_and_the_address_keeps_the_place(browser):
    browser.evaluate("document.getElementById('step').focus()")
    for _ in range(3):
        browser.press("ArrowRight")
    assert text(browser, "time") == "t = 0.25"
    assert labels(browser) == expected_labels(0, 3, 0)
    browser.evaluate("document.getElementById('layer').focus()")
    browser.press("End")
    assert text(browser, "layerName") == "3 of 3"
    assert labels(browser) == expected_labels(0, 3, 2)
    assert browser.evaluate("location.hash") == "#prompt=0&step=3&layer=2&expert=-1&token=0"
    browser.evaluate(
        f"new Promise((done) => {{ addEventListener('hashchange', done); location.hash = '{SPOT}'; }}) && 0"
    )
    assert labels(browser) == expected_labels(1, 2, 1)


@needs_chromium
def test_an_impossible_address_changes_nothing(browser):
    browser.evaluate("location.hash = '#prompt=3&step=x&layer=-1&expert=1.5&__proto__=1'; readHash(); draw()")
    assert labels(browser) == expected_labels(0, 0, 0)


@needs_chromium
def test_a_patch_under_the_mouse_shows_its_experts_and_gates(browser):
    """0.25 and 0.5, rounded to 1 / 255 of the largest gate."""
    browser.evaluate("change({prompt: 1, step: 2, layer: 1})")
    browser.hover("document.querySelectorAll('[role=gridcell]')[6]")
    assert text(browser, "patchTitle") == "Patch in row 2, column 3: 2 experts"
    found = table(browser, "gates")
    assert [row[0] for row in found] == ["4", "1"]
    np.testing.assert_allclose([float(row[1]) for row in found], [0.5, 0.25], atol=0.005 + TOP / 510)


@needs_chromium
def test_patches_are_walked_through_by_keys(browser):
    browser.evaluate("change({prompt: 1, step: 2, layer: 1})")
    browser.evaluate("document.querySelector('[role=gridcell]').focus()")
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        browser.press(key)
    assert browser.evaluate("document.activeElement.ariaLabel") == "row 2, column 3: 2 experts"
    assert text(browser, "patchTitle") == "Patch in row 2, column 3: 2 experts"
    browser.press("Enter")
    assert text(browser, "mapTitle") == "Gate of expert 4"
    assert browser.evaluate("document.activeElement.ariaLabel").startswith("row 2, column 3: gate 0.5")
    browser.press("Escape")
    assert text(browser, "mapTitle") == "Experts per patch"
    for key, column in (("End", 4), ("ArrowRight", 4), ("Home", 1), ("ArrowLeft", 1)):
        browser.press(key)
        assert browser.evaluate("document.activeElement.ariaLabel").startswith(f"row 2, column {column}:")
    tabs = "[...document.querySelectorAll('[role=gridcell]')].filter((cell) => cell.tabIndex === 0).length"
    assert browser.evaluate(tabs) == 1, "one stop of the tab key, not sixteen"


@needs_chromium
def test_a_selected_expert_shows_what_it_takes_everywhere(browser):
    browser.evaluate("change({prompt: 1, step: 2, layer: 1})")
    browser.hover("document.querySelectorAll('[role=gridcell]')[6]")
    browser.click("document.querySelector('#gates button')")
    assert text(browser, "takesTitle") == "What expert 4 of sparse layer 2 takes"
    taken = (GATES[:, 2, 1, :, 4] > 0).sum(axis=1)
    captions = browser.evaluate("[...document.querySelectorAll('#gallery figcaption')].map((f) => f.textContent)")
    assert captions == [f"{prompt}: {n} of 16 patches" for prompt, n in zip(PROMPTS, taken, strict=True)]
    gates = GATES[1, 2, 1, :, 4]
    for label, gate in zip(labels(browser), gates, strict=True):
        if gate:
            assert float(label.split("gate ")[1]) == pytest.approx(gate, abs=0.005 + TOP / 255)
        else:
            assert label.endswith("not taken")
    found = takings(draw_images(), GATES, 2)
    mean = "[...document.getElementById('mean').getContext('2d').getImageData(0, 0, 8, 8).data]"
    pixels = np.array(browser.evaluate(mean)).reshape(8, 8, 4)
    np.testing.assert_array_equal(pixels[:, :, :3], found.patches[1, 4])
    first = browser.evaluate("document.querySelector('#favourites li').textContent")
    assert first.startswith(PROMPTS[int(found.tokens[1, 4].argmax())])


@needs_chromium
def test_the_gallery_darkens_what_the_expert_does_not_take(browser):
    browser.evaluate("change({step: 3, expert: 0})")
    canvas = "document.querySelectorAll('#gallery canvas')[2].getContext('2d').getImageData(0, 0, 32, 32).data"
    pixels = np.array(browser.evaluate(f"[...{canvas}]")).reshape(32, 32, 4)[:, :, :3]
    taken = (GATES[2, 3, 0, :, 0] > 0).reshape(GRID, GRID).repeat(8, axis=0).repeat(8, axis=1)
    image = draw_images()[2]
    np.testing.assert_array_equal(pixels[taken], image[taken])
    np.testing.assert_allclose(pixels[~taken], 0.2 * image[~taken], atol=1.5)


@needs_chromium
def test_the_table_counts_the_tokens_of_the_map(browser):
    counts = counts_of(GATES)[0, 0, 0]
    *rows, (name, most) = table(browser, "cover")
    assert [row[0] for row in rows] == ["0 experts", "1 expert", "2 experts", "3 or more"]
    shares = [100 * np.mean(counts == n) for n in range(3)] + [100 * np.mean(counts >= 3)]
    np.testing.assert_allclose([float(row[1].removesuffix(" %")) for row in rows], shares, atol=0.051)
    assert (name, most) == ("most on one token", f"{counts.max()} ({20 * counts.max()}.0 % of the experts)")


@needs_chromium
def test_a_screen_reader_is_told_the_name_of_everything(browser):
    names = browser.names()
    assert {("combobox", "Prompt"), ("combobox", "Expert"), ("slider", "Map over image")} <= set(names)
    assert any(role == "slider" and name.startswith("Time") for role, name in names)
    assert any(role == "slider" and name.startswith("Sparse layer") for role, name in names)
    assert ("grid", "Experts per patch") in names
    assert [name for role, name in names if role == "gridcell"] == expected_labels(0, 0, 0)
    operable = {"button", "combobox", "slider", "gridcell", "grid", "image", "img"}
    assert [role for role, name in names if role in operable and not name] == []


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(browser, scheme):
    """A contrast of 4.5 or more (WCAG 2.2, 1.4.3), for the text and for what is softer."""
    browser.colours(scheme)
    pairs = browser.evaluate(
        "['#about', 'h1'].map((name) => [getComputedStyle(document.querySelector(name)).color,"
        " getComputedStyle(document.body).backgroundColor])"
    )

    def luminance(css):
        rgb = np.array(re.findall(r"\d+", css)[:3], float) / 255
        return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    for front, back in pairs:
        low, high = sorted([luminance(front), luminance(back)])
        assert (high + 0.05) / (low + 0.05) >= 4.5
    assert (luminance(pairs[0][1]) < 0.1) == (scheme == "dark")
    browser.colours("")


@needs_chromium
@pytest.mark.skipif("ECDIT_SCREENSHOTS" not in os.environ, reason="ECDIT_SCREENSHOTS names no folder")
def test_screenshots(page):
    folder = Path(os.environ["ECDIT_SCREENSHOTS"])
    shown = Path(os.environ.get("ECDIT_ROUTING_PAGE", page)).resolve()
    for scheme in ("light", "dark"):
        with Browser() as browser:
            browser.colours(scheme)
            browser.open(f"{shown.as_uri()}#step=3&layer=1&token=5&expert=1", READY)
            file = folder / f"routing_page_{scheme}.png"
            file.write_bytes(browser.screenshot())
        with Image.open(file) as image:  # few colours: a small file
            image.convert("RGB").quantize(128).save(file, optimize=True)
        assert file.stat().st_size < 200_000
