"""The page in a browser: every chart is drawn, nothing is asked of a network, and a phone or a keyboard will do."""

import contextlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from pipeline.report import page as report
from tests.factories import HOSTILE, make_study

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="chromium and chromedriver are not installed"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a study whose names are hostile."""
    root = tmp_path_factory.mktemp("study")
    make_study(root)
    with contextlib.chdir(root):
        report.write()
    return root / report.PAGE


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(str(DRIVER), env=os.environ | {"NO_PROXY": "127.0.0.1,localhost"}))
    yield driver
    driver.quit()


def show(browser: webdriver.Chrome, page: Path, width: int = 1280, scheme: str = "light") -> None:
    """Open the page and wait until its charts are drawn."""
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what was there before
    mode = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", mode)
    size: dict[str, Any] = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())
    wait_until_drawn(browser, scheme)


def wait_until_drawn(browser: webdriver.Chrome, scheme: str) -> None:
    last = time.monotonic() + 60
    while browser.execute_script("return document.documentElement.dataset.drawn") != scheme:
        if time.monotonic() > last:
            pytest.fail(f"the charts are not drawn: {browser.get_log('browser')}")
        time.sleep(0.1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_chart_is_drawn_without_a_word_on_the_console(browser: webdriver.Chrome, page: Path, scheme: str):
    show(browser, page, scheme=scheme)
    empty = browser.execute_script(
        "return [...document.querySelectorAll('[data-chart]')].filter((place) => {"
        "  const drawn = place.querySelector('svg, canvas');"
        "  return !drawn || drawn.getBoundingClientRect().width < 150 || drawn.getBoundingClientRect().height < 50;"
        "}).map((place) => place.getAttribute('aria-label'));"
    )
    assert empty == []
    assert browser.execute_script("return document.querySelectorAll('[data-chart]').length") >= 10
    assert browser.get_log("browser") == []
    broken = "return [...document.images].filter((image) => !image.naturalWidth).map((image) => image.alt);"
    assert browser.execute_script(broken) == []


def test_a_point_of_the_map_says_its_file_without_asking_for_it(browser: webdriver.Chrome, page: Path):
    show(browser, page)
    canvas = browser.find_element("css selector", "[data-chart] canvas")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'});", canvas)
    right, down = canvas.size["width"] // 2, canvas.size["height"] // 2
    tip = ""
    for x, y in itertools.product(
        range(8 - right, right - 8, 6), range(20 - down, down - 40, 9)
    ):  # until a point is met
        ActionChains(browser, duration=0).move_to_element_with_offset(canvas, x, y).perform()
        tip = browser.execute_script("return document.querySelector('#vg-tooltip-element.visible')?.textContent ?? '';")
        if tip:
            break
    assert ".png" in tip
    assert browser.execute_script("return document.querySelectorAll('#vg-tooltip-element img').length") == 0
    assert browser.get_log("browser") == []


def test_no_request_leaves(browser: webdriver.Chrome, page: Path):
    show(browser, page)
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith("data:")} == {page.as_uri()}


def test_names_run_no_script(browser: webdriver.Chrome, page: Path):
    show(browser, page)
    assert browser.execute_script("return document.querySelectorAll('script').length") == 4
    injected = "return document.querySelectorAll('img[onerror], [src=x]').length"
    assert browser.execute_script(injected) == 0
    for name in HOSTILE:
        shown = " ".join(str(browser.execute_script("return document.body.textContent")).split())
        assert " ".join(name.split()) in shown


@pytest.mark.parametrize("width", [320, 375, 768])
def test_nothing_scrolls_sideways_but_tables_in_themselves(browser: webdriver.Chrome, page: Path, width: int):
    show(browser, page, width)
    browser.execute_script("document.querySelectorAll('details').forEach((part) => { part.open = true; });")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_dark_and_light_differ_in_ground_and_charts_and_change_at_once(browser: webdriver.Chrome, page: Path):
    seen = {}
    show(browser, page)
    for scheme in ("light", "dark"):
        mode = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", mode)
        wait_until_drawn(browser, scheme)
        seen[scheme] = browser.execute_script(
            "return [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,"
            " document.querySelector('[data-chart] svg text').getAttribute('fill')]"
        )
    assert all(light != dark for light, dark in zip(seen["light"], seen["dark"], strict=True))


def test_the_keyboard_reaches_the_parts_in_their_order(browser: webdriver.Chrome, page: Path):
    show(browser, page)
    reached, outlines = [], []
    for _ in range(12):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        focused = browser.switch_to.active_element
        reached.append(focused.get_attribute("href") or focused.get_attribute("aria-label") or focused.text)
        outlines.append(focused.value_of_css_property("outline-style"))
    parts = ["main", "advice", "answer", "evidence", "mistakes", "features", "cost", "data", "provenance"]
    assert [str(link).rpartition("#")[2] for link in reached[:9]] == parts
    assert reached[9] == "Comparison of the strategies"
    assert set(outlines) == {"solid"}
    browser.switch_to.active_element.send_keys(Keys.ENTER)


def test_headings_follow_each_other_and_every_table_and_picture_is_named(browser: webdriver.Chrome, page: Path):
    show(browser, page)
    levels = browser.execute_script("return [...document.querySelectorAll('h1, h2, h3, h4')].map((h) => +h.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    unnamed = (
        "return [...document.querySelectorAll('table')].filter((t) => !t.caption || !t.querySelector('th[scope=col]'))"
        ".length + [...document.images].filter((image) => !image.alt).length"
        " + [...document.querySelectorAll('[role=img]')].filter((place) => !place.getAttribute('aria-label')).length"
    )
    assert browser.execute_script(unnamed) == 0
