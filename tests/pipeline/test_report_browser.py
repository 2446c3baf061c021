"""The report in a browser: headless Chromium, driven through chromedriver.

LEGRAD_SCREENSHOTS names a folder for screenshots; without it none are taken.
"""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from legrad.heatmaps import heatmap_columns
from pipeline.config.marks import marks_of, read_mark_list
from pipeline.report import write_report
from pipeline.report.level_maps import LevelMap
from tests.helpers.report_jobs import HOSTILE, error, varied_rows, write_job

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="chromium and chromedriver are not on PATH (apt-get install chromium-driver)",
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    """The folder where the browser saves files."""
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(tmp_path_factory, downloads):
    """A browser that logs its console and every request."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    driver.set_page_load_timeout(240)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A page of varied rows, one of them hostile; classes, rejections, errors and a run."""
    rows = varied_rows(24, classes=3)
    rows[0] = {**rows[0], "prompt": HOSTILE, "key": "key000"}
    out = write_job(
        tmp_path_factory.mktemp("job"), [rows], errors=[error(40, kind=HOSTILE, message=HOSTILE, key=HOSTILE)]
    )
    classes = out.parent / "classes.txt"
    classes.write_text(f"cat\ndog\n{HOSTILE}\n")
    write_report(str(out), classes_file=str(classes), samples=20)
    return (out / "report.html").as_uri()


@pytest.fixture
def page(browser, address):
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(address)
    # marks of an earlier test
    if browser.execute_script("const kept = localStorage.length; localStorage.clear(); return kept"):
        browser.get(address)
    browser.get_log("performance")
    return browser


def script(page, code, *arguments):
    return page.execute_script(code, *arguments)


def shown(page, score="similarity"):
    """The score of each card that is seen, in the order in which they are seen."""
    found = script(
        page,
        "return [...document.querySelectorAll('.card')].filter(card => card.offsetParent !== null)"
        ".map(card => card.dataset[arguments[0]])",
        score,
    )
    return [float(value) if value else None for value in found]


def choose(page, name, value):
    script(
        page,
        "const field = document.getElementById(arguments[0]); field.value = arguments[1];"
        "field.dispatchEvent(new Event('input', {bubbles: true}));",
        name,
        value,
    )


def press(page, *keys):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(page).send_keys(*keys).perform()


def focused(page, attribute="textContent"):
    return script(page, "return document.activeElement[arguments[0]]", attribute)


def current(page):
    """Position among the cards that are seen of the one that has the focus."""
    return script(
        page,
        "const seen = [...document.querySelectorAll('.card')].filter(card => card.offsetParent !== null);"
        "return seen.indexOf(document.activeElement.closest('.card'))",
    )


def requests(page):
    """Addresses of what the page asked for."""
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    # the browser's own first tab loads parts of itself
    return [url for url in sent if not url.startswith(("data:", "chrome"))]


def test_a_page_loads_without_a_word_on_the_console_and_asks_nobody(page, address):
    page.get(address)
    script(page, "for (const details of document.querySelectorAll('details')) details.open = true")
    choose(page, "order", "best")
    assert requests(page) == [address]
    assert page.get_log("browser") == []


def test_every_picture_is_drawn(page):
    widths = page.execute_async_script(
        "const done = arguments[0];"
        "for (const image of document.images) image.loading = 'eager';"
        "Promise.all([...document.images].map(image => image.decode().then(() => image.naturalWidth)))"
        ".then(done, error => done(String(error)));"
    )
    assert isinstance(widths, list), widths
    assert len(widths) > 40
    assert min(widths) > 10


def test_a_hostile_caption_does_nothing_and_is_shown_as_it_is(page):
    assert page.title.startswith("LeGrad report")
    choose(page, "order", "best")
    prompts = script(
        page, "return [...document.querySelectorAll('.prompt')].map(prompt => prompt.textContent)"
    )
    assert HOSTILE in prompts
    counts = script(
        page, "return [document.scripts.length, document.querySelectorAll('[src=x]').length, document.title]"
    )
    assert counts[:2] == [1, 0]
    assert counts[2].startswith("LeGrad report")
    place = prompts.index(HOSTILE)
    script(page, "document.querySelectorAll('.open')[arguments[0]].click()", place)
    assert script(page, "return document.getElementById('large-prompt').textContent") == HOSTILE
    assert page.title.startswith("LeGrad report")
    assert page.get_log("browser") == []


def test_the_policy_stops_what_would_ask_or_run(page):
    blocked = page.execute_async_script(
        "const done = arguments[0]; const seen = [];"
        "document.addEventListener('securitypolicyviolation', event => seen.push(event.effectiveDirective));"
        "const run = document.createElement('script'); run.textContent = \"document.title = 'hit'\";"
        "document.body.append(run);"
        "const ask = new Image(); ask.src = 'http://127.0.0.1:9/x.png'; document.body.append(ask);"
        "setTimeout(() => done([seen, document.title]), 300);"
    )
    assert sorted(blocked[0]) == ["img-src", "script-src-elem"]
    assert blocked[1] != "hit"
    page.get_log("browser")


def test_orders_put_the_best_or_the_worst_first_and_random_shows_the_drawn_ones(page):
    drawn = shown(page)
    assert len(drawn) == 10, "half of the rows are drawn at random"
    choose(page, "order", "best")
    assert shown(page) == sorted(shown(page), reverse=True)
    assert len(shown(page)) == 20
    choose(page, "order", "worst")
    assert shown(page) == sorted(shown(page))
    choose(page, "score", "peak")
    assert shown(page, "peak") == sorted(shown(page, "peak"))
    choose(page, "score", "area")
    areas = [area for area in shown(page, "area") if area is not None]
    assert areas == sorted(areas)
    assert shown(page, "area")[: len(areas)] == areas, "rows without a mask come last"
    choose(page, "order", "random")
    choose(page, "score", "similarity")
    assert shown(page) == drawn


def test_filters_by_text_class_status_and_score(page):
    choose(page, "order", "best")
    everything = shown(page)
    choose(page, "text", "thing NUMBER key01")
    assert script(page, "return document.getElementById('count').textContent").startswith(
        f"{len(shown(page))} of 20"
    )
    assert 0 < len(shown(page)) < 20
    choose(page, "text", "no such words")
    assert shown(page) == []
    assert script(page, "return document.getElementById('nothing').offsetParent !== null")
    choose(page, "text", "")
    for name, value in (("class", "2"), ("status", "rejected_similarity")):
        choose(page, name, value)
        found = script(
            page,
            "return [...document.querySelectorAll('.card')].filter(card => card.offsetParent !== null)"
            ".map(card => card.dataset[arguments[0]])",
            name,
        )
        assert set(found) == {value}
        choose(page, name, "")
    choose(page, "least", "0.15")
    choose(page, "most", "0.25")
    assert shown(page) == [value for value in everything if 0.15 <= value <= 0.25]
    script(page, "document.querySelector('#controls [type=reset]').click()")
    page.execute_async_script("setTimeout(arguments[0], 50)")
    assert len(shown(page)) == 10


def test_the_page_is_worked_by_keys_alone(page):
    from selenium.webdriver.common.keys import Keys

    press(page, Keys.TAB)
    assert focused(page) == "Skip to the gallery"
    choose(page, "order", "best")
    script(page, "document.querySelector('.open').focus()")
    assert current(page) == 0
    columns = script(
        page,
        "const tops = [...document.querySelectorAll('.card')].map(card => card.offsetTop);"
        "return tops.filter(top => top === tops[0]).length",
    )
    assert columns > 1
    for key, place in (
        (Keys.ARROW_RIGHT, 1),
        (Keys.ARROW_LEFT, 0),
        (Keys.ARROW_LEFT, 0),
        (Keys.ARROW_DOWN, columns),
        (Keys.ARROW_UP, 0),
        (Keys.END, 19),
        (Keys.HOME, 0),
    ):
        press(page, key)
        assert current(page) == place, key
    assert script(page, "return document.querySelectorAll('.open[tabindex=\"0\"]').length") == 1
    press(page, Keys.ENTER)
    assert script(page, "return document.getElementById('large').open")
    assert focused_in_dialog(page)
    first = script(page, "return document.getElementById('large-prompt').textContent")
    press(page, Keys.ARROW_RIGHT)
    assert script(page, "return document.getElementById('large-prompt').textContent") != first
    assert script(page, "return document.getElementById('place').textContent") == "2 of 20"
    press(page, Keys.ESCAPE)
    assert not script(page, "return document.getElementById('large').open")
    assert current(page) == 1, "the focus is back on the card that was last looked at"
    outline = script(page, "return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "where the focus is can be seen"


def focused_in_dialog(page):
    return script(page, "return document.getElementById('large').contains(document.activeElement)")


def slide(page, value, name="cut"):
    choose(page, name, str(value))
    wait_for(page, f"document.getElementById('override').textContent.endsWith('={value}')")


def wait_for(page, condition):
    """Wait until an expression of JavaScript holds: the browser draws and stores when it finds time."""
    deadline_s = time.monotonic() + 120
    while not script(page, f"return {condition}"):
        assert time.monotonic() < deadline_s, condition
        page.execute_async_script("setTimeout(arguments[0], 50)")


def previewed(page):
    """Position of each card that shows a mask of the slider's threshold, and the share that it keeps."""
    return script(
        page,
        "return [...document.querySelectorAll('.card')].filter(card => !card.querySelector('.kept')?.hidden"
        " && card.querySelector('.kept')).map(card => [card.querySelector('.sample-key').textContent,"
        " parseFloat(card.querySelector('.kept dd').textContent)])",
    )


def test_the_slider_shows_masks_of_another_threshold_and_the_share_that_they_keep(page):
    choose(page, "order", "best")
    assert text_of(page, "kept") == "The masks of the job are shown."
    assert previewed(page) == []
    slide(page, 0.5)
    at_half = dict(previewed(page))
    accepted = script(page, "return document.querySelectorAll('.card[data-status=ok]').length")
    assert len(at_half) == accepted
    assert text_of(page, "override") == "masks.rule=fixed masks.value=0.5"
    mean = sum(at_half.values()) / len(at_half)
    assert f"{mean:.1f} % of the image is kept, on average of {accepted} rows" in text_of(page, "kept")
    slide(page, 0.8, "cut-number")
    at_more = dict(previewed(page))
    assert all(0 < at_more[key] < at_half[key] for key in at_half)
    assert script(page, "return document.getElementById('cut').value") == "0.8"
    slide(page, 1)
    assert f"{accepted} of them keep nothing" in text_of(page, "kept")
    script(page, "document.getElementById('own').click()")
    wait_for(page, "document.getElementById('rerun').hidden")
    assert previewed(page) == []
    assert script(page, "return document.querySelectorAll('.mask canvas:not([hidden])').length") == 0
    assert page.get_log("browser") == []


def text_of(page, name):
    return script(page, "return document.getElementById(arguments[0]).textContent", name)


def test_the_share_that_a_threshold_keeps_is_that_of_the_library(page):
    choose(page, "order", "best")
    slide(page, 0.37)
    key, share = previewed(page)[0]
    levels, height, width, rows, columns = script(
        page,
        "const card = [...document.querySelectorAll('.card')].find("
        "card => card.querySelector('.sample-key').textContent === arguments[0]);"
        "const image = card.querySelector('.photo img');"
        "return [card.dataset.levels, card.dataset.levelHeight, card.dataset.levelWidth,"
        " image.getAttribute('height'), image.getAttribute('width')]",
        key,
    )
    values = LevelMap(levels, int(height), int(width)).values()
    heatmap = heatmap_columns(values, int(rows), int(columns), None)
    assert share == pytest.approx(100 * (heatmap > 0.37).mean(), abs=0.051)


def test_the_mask_of_a_threshold_is_drawn_over_that_of_the_job(page):
    choose(page, "order", "best")
    # only what is near the screen is drawn
    script(page, "document.querySelector('.card[data-status=ok]').scrollIntoView()")
    slide(page, 0.5)
    wait_for(page, "document.querySelector('.card[data-status=ok]').classList.contains('previewed')")
    painted = script(
        page,
        "const canvas = document.querySelector('.card[data-status=ok] .mask canvas');"
        "return [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]",
    )
    pixels = np.reshape(painted, (-1, 4))
    outline = (pixels[:, :3] == (255, 214, 10)).all(axis=1)
    assert outline.any()
    assert (pixels[:, 3] == 255).all()
    script(page, "document.querySelector('.card[data-status=ok] .open').click()")
    captions = script(
        page, "return [...document.querySelectorAll('.large .caption')].map(each => each.textContent)"
    )
    assert captions == ["image", "heat map", "mask, preview"]
    slide(page, 0.9, "large-cut")
    assert text_of(page, "override") == "masks.rule=fixed masks.value=0.9"
    wait_for(page, "document.querySelector('#large-figures .kept dd').textContent !== '50.0 %'")
    kept = script(page, "return document.querySelector('#large-figures .kept dd').textContent")
    assert 0 < float(kept.removesuffix(" %")) < 50


def marked(page):
    """Mark of each marked card by its key, in the order of the cards."""
    found = script(
        page,
        "return [...document.querySelectorAll('.card[data-mark]')]"
        ".map(card => [card.querySelector('.sample-key').textContent, card.dataset.mark])",
    )
    return dict(found)


def test_rows_are_marked_by_buttons_and_by_keys_and_stay_marked(page, address):
    from selenium.webdriver.common.keys import Keys

    choose(page, "order", "best")
    script(page, "document.querySelector('.open').focus()")
    press(page, "g")
    press(page, Keys.ARROW_RIGHT)
    press(page, "b")
    press(page, Keys.ARROW_RIGHT)
    press(page, "g")
    press(page, "u")
    assert list(marked(page).values()) == ["good", "bad"]
    assert text_of(page, "marked") == "1 marked good, 1 marked bad."
    script(page, "document.querySelectorAll('.card .mark[data-mark=bad]')[0].click()")
    assert list(marked(page).values()) == ["bad", "bad"]
    pressed = script(
        page,
        "return [...document.querySelector('.card').querySelectorAll('.mark')].map(each => each.ariaPressed)",
    )
    assert pressed == ["false", "true"]
    script(page, "document.querySelectorAll('.card .mark[data-mark=bad]')[0].click()")
    assert list(marked(page).values()) == ["bad"]
    press(page, Keys.ENTER)
    press(page, "g")
    assert (
        script(page, "return document.querySelector('#large-marks [data-mark=good]').ariaPressed") == "true"
    )
    press(page, Keys.ESCAPE)
    before = marked(page)
    page.get(address)
    wait_for(page, "document.querySelectorAll('.card[data-mark]').length === 2")
    choose(page, "order", "best")
    assert marked(page) == before
    choose(page, "mark", "bad")
    assert len(shown(page)) == 1
    choose(page, "mark", "none")
    assert len(shown(page)) == 18
    assert page.get_log("browser") == []


@pytest.mark.parametrize("form", ["csv", "json"])
def test_marks_are_saved_as_a_file_that_the_pipeline_reads(page, downloads, form):
    choose(page, "order", "best")
    script(page, "for (const each of document.querySelectorAll('.card .mark[data-mark=good]')) each.click()")
    path = downloads / f"marks.{form}"
    script(page, f"document.getElementById('save-{form}').click()")
    deadline_s = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    marks = read_mark_list(str(path))
    assert len(marks) == 20
    assert {mark.mark for mark in marks} == {"good"}
    assert {mark.shard.rpartition("/")[2] for mark in marks} == {"0.tar"}
    assert [mark.prompt for mark in marks if mark.key == "key000"] in ([], [HOSTILE])
    assert all(marks_of(marks, "good").keeps(*mark.row, mark.prompt) for mark in marks)


def load_marks(page, path):
    page.find_element("id", "marks-file").send_keys(str(path))
    wait_for(page, f"document.getElementById('loaded').textContent.includes('{path.name}')")
    return text_of(page, "loaded")


@pytest.mark.parametrize("form", ["csv", "json"])
def test_marks_are_loaded_from_a_file_and_kept_beside_those_of_the_browser(page, address, tmp_path, form):
    choose(page, "order", "best")
    script(page, "for (const each of document.querySelectorAll('.card .mark[data-mark=good]')) each.click()")
    saved = script(page, f"return marking.{form}(JSON.parse(Object.values(localStorage)[0]))")
    path = tmp_path / f"marks.{form}"
    path.write_bytes(saved.encode())
    script(page, "localStorage.clear()")
    page.get(address)
    choose(page, "order", "best")
    script(page, "document.querySelectorAll('.card .mark[data-mark=bad]')[0].click()")
    expected = f"20 marks loaded from marks.{form}: 19 new, 1 changed, 0 as before; 20 of them on this page."
    assert load_marks(page, path) == expected
    assert text_of(page, "marked") == "20 marked good, 0 marked bad."
    page.get(address)
    wait_for(page, "document.querySelectorAll('.card[data-mark=good]').length === 20")
    assert page.get_log("browser") == []


def test_a_file_that_is_not_of_marks_changes_nothing_and_its_text_is_never_markup(page, tmp_path):
    choose(page, "order", "best")
    script(page, "document.querySelector('.card .mark').click()")
    path = tmp_path / "marks.csv"
    path.write_text(
        "shard,key,prompt_index,prompt,mark\ns,k,0,,good\n"
        f's,k2,0,,"{HOSTILE.replace(chr(34), chr(34) * 2)}"\n'
    )
    message = load_marks(page, path)
    assert message.startswith("No mark was loaded from marks.csv: line 3: mark is “<img src=x onerror=")
    assert message.endswith("expected good or bad")
    assert text_of(page, "marked") == "1 marked good, 0 marked bad."
    assert script(page, "return document.querySelectorAll('#loaded *').length") == 0
    assert script(page, "return document.title") != "hit"
    path.write_text("shard,key,prompt_index,prompt,mark\ns,k,0,,good\n")
    page.find_element("id", "marks-file").send_keys(str(path))
    wait_for(page, "document.getElementById('loaded').textContent.startsWith('1 mark loaded')")
    assert text_of(page, "marked") == "2 marked good, 0 marked bad; 1 of them on other pages of this job."
    assert page.get_log("browser") == []


def test_all_marks_are_removed_at_once_after_a_question(page):
    choose(page, "order", "best")
    script(page, "document.querySelector('.card .mark').click()")
    for answer, left in (("dismiss", 1), ("accept", 0)):
        script(page, "setTimeout(() => document.getElementById('clear-marks').click())")
        getattr(page.switch_to.alert, answer)()
        assert len(marked(page)) == left
    assert text_of(page, "marked") == "No row is marked."


def test_the_keys_of_an_error_are_copied_or_selected(page):
    script(page, "for (const details of document.querySelectorAll('details')) details.open = true")
    script(page, "document.querySelector('.kind [data-copies]').click()")
    wait_for(page, "document.querySelector('.kind [data-copies]').textContent !== 'Copy'")
    said = script(page, "return document.querySelector('.kind [data-copies]').textContent")
    assert said in ("Copied", "Selected; press Ctrl+C")
    if said != "Copied":
        assert HOSTILE in script(page, "return getSelection().toString()")


def test_every_control_has_a_name(page):
    unnamed = script(
        page,
        "return [...document.querySelectorAll('input, select, button, [role=img]')].filter(element =>"
        " !(element.labels && element.labels.length) && !element.getAttribute('aria-label')"
        " && !element.getAttribute('aria-labelledby') && !element.textContent.trim())"
        ".map(element => element.outerHTML)",
    )
    assert unnamed == []
    broken = script(
        page,
        "return [...document.querySelectorAll('[aria-labelledby]')].flatMap(element =>"
        " element.getAttribute('aria-labelledby').split(' ')).filter(id => !document.getElementById(id))",
    )
    assert broken == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_both_schemes_are_readable_and_nothing_runs_over_the_side(page, scheme, width):
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    script(page, "for (const details of document.querySelectorAll('details')) details.open = true")
    assert script(page, "return document.documentElement.scrollWidth") == width
    overflow = script(
        page,
        "document.querySelector('.open').click(); const dialog = document.getElementById('large');"
        "const found = dialog.scrollWidth - dialog.clientWidth; dialog.close(); return found",
    )
    assert overflow == 0
    faint = [
        contrast(page, selector)
        for selector in ("h1", ".sub", ".detail", ".chip", "nav a", "#controls label", ".mark", ".tool code")
    ]
    assert min(faint) >= 4.5, "WCAG 2.2, 1.4.3: contrast of text"
    screenshots(page, f"{width}-{scheme}")
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_theme_button_overrides_the_system(page):
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
    )

    def darkness():
        return sum(colour(page, "document.body", "backgroundColor")) < 200

    seen = [darkness()]
    for _ in range(3):
        script(page, "document.getElementById('theme').click()")
        seen.append(darkness())
    assert seen == [False, False, True, False]


def test_a_page_without_rows_has_no_error_on_the_console(browser, tmp_path):
    out = write_job(tmp_path, [[]], runs=False)
    write_report(str(out))
    browser.get_log("browser")
    browser.get((out / "report.html").as_uri())
    script(browser, "document.getElementById('theme').click()")
    assert browser.get_log("browser") == []


def colour(page, expression, name):
    """Red, green and blue of a computed colour."""
    return script(
        page,
        f"const canvas = document.createElement('canvas').getContext('2d');"
        f"canvas.fillStyle = getComputedStyle({expression})['{name}']; canvas.fillRect(0, 0, 1, 1);"
        f"return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3)",
    )


def contrast(page, selector):
    """Contrast of a text with what is behind it. Source: WCAG 2.2, relative luminance and contrast ratio."""
    behind = (
        "(() => { let element = document.querySelector(" + json.dumps(selector) + ");"
        "while (getComputedStyle(element).backgroundColor === 'rgba(0, 0, 0, 0)')"
        " element = element.parentElement;"
        "return element; })()"
    )
    lights = sorted(
        luminance(found)
        for found in (
            colour(page, f"document.querySelector({json.dumps(selector)})", "color"),
            colour(page, behind, "backgroundColor"),
        )
    )
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def luminance(rgb):
    linear = [
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in (v / 255 for v in rgb)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def screenshots(page, name):
    folder = os.environ.get("LEGRAD_SCREENSHOTS")
    if not folder:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    page.save_screenshot(str(Path(folder) / f"report-{name}.png"))
    script(page, "document.documentElement.style.scrollBehavior = 'auto'")
    script(page, "document.getElementById('scores').scrollIntoView()")
    page.save_screenshot(str(Path(folder) / f"report-scores-{name}.png"))
    script(page, "document.querySelector('.open').click()")
    page.save_screenshot(str(Path(folder) / f"report-row-{name}.png"))
