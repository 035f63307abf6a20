"""The pages as a reader sees them, in a headless Chromium. CI has one; elsewhere the tests are skipped without it."""

import base64
import json
import os
import shutil

import numpy as np
import pytest
from pages import HOSTILE, in_progress, record
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from outside_in.reports import page as page_file
from outside_in.reports.comparison_page import ComparedRun, comparison_page
from outside_in.reports.run_page import run_page
from outside_in.storage.metrics import read
from outside_in.storage.records import Records
from outside_in.storage.run_directory import RunDirectory

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chromium():
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs and not os.environ.get("NEEDS_BROWSER"):
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in ("--headless", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium):
    """A browser for one test, in which no page may have logged anything."""
    yield chromium
    assert chromium.get_log("browser") == []
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.fixture
def show(browser, tmp_path):
    """Write a page, and open it from the disk."""

    def open_page(page):
        page_file.write(tmp_path / "page.html", page)
        browser.get("about:blank")
        browser.get((tmp_path / "page.html").as_uri())
        return browser

    return open_page


def texts(browser, selector):
    return [element.get_attribute("textContent") for element in browser.find_elements(By.CSS_SELECTOR, selector)]


def tiles(browser):
    parts = [
        tile.find_elements(By.XPATH, "./b | ./span") for tile in browser.find_elements(By.CSS_SELECTOR, ".tiles div")
    ]
    names = browser.execute_script("return [...document.querySelectorAll('.tiles div')].map(t => t.firstChild.data)")
    return {name: value.text for name, (value, _) in zip(names, parts)}


def press(browser, name, value):
    browser.find_element(By.CSS_SELECTOR, f"input[name={name}][value='{value}']").click()


def axis(browser, chart=0):
    """The horizontal axis of a chart: its name and the texts of its ticks."""
    svg = browser.find_elements(By.CSS_SELECTOR, ".drawing > svg")[chart]
    found = [
        text.get_attribute("textContent") for text in svg.find_elements(By.CSS_SELECTOR, "text[text-anchor=middle]")
    ]
    return found[-1], found[:-1]


def usual_records(count=200):
    return [
        record(s, 8 - s / 50, 1 + s % 7, val_loss=8 - s / 50 if s % 50 == 0 else None, learning_rate=s / 1e5)
        for s in range(1, count + 1)
    ]


def test_a_page_shows_the_last_values_and_every_chart(show, tmp_path):
    records = [*usual_records(), record(201, 3.96875, 2.03125, learning_rate=3.3e-05, val_loss=3.984375)]
    browser = show(run_page(in_progress(tmp_path / "a run", records, bytes_per_token=2.0, mfu_of_one=0.001)))
    shown = tiles(browser)
    assert (shown["training loss"], shown["validation loss"], shown["gradient norm"]) == ("3.9688", "3.9844", "2.0313")
    assert (shown["tokens/s"], shown["MFU"], shown["learning rate"]) == ("256", "25.6%", "3.3e-5")
    assert browser.find_element(By.TAG_NAME, "h1").text == browser.title == "a run"
    assert browser.find_element(By.ID, "status").text.startswith("running: step 201 of 100 · written ")
    assert [text.split("  ")[0] for text in texts(browser, "h2")][:4] == [
        "Loss nats per token; right: bits per byte",
        "Gradient norm before clipping",
        "Learning rate ",
        "Speed tokens/s; right: MFU",
    ]
    assert len(browser.find_elements(By.CSS_SELECTOR, ".drawing path.main")) == 4
    cells = dict(zip(*[iter(texts(browser, "details:last-of-type td"))] * 2))
    assert {name: json.loads(value) for name, value in cells.items()} == records[-1]


def test_the_switches_change_the_axes_and_outlive_a_reload(show, tmp_path):
    browser = show(run_page(in_progress(tmp_path, usual_records())))
    assert axis(browser) == ("global step", [str(step) for step in range(20, 201, 20)])
    press(browser, "x", "tokens")
    assert axis(browser) == ("training tokens", ["5k", "10k", "15k", "20k", "25k"])
    press(browser, "x", "seconds")
    assert axis(browser)[0] == "seconds of training steps, compiling included"
    linear = texts(browser, ".drawing text[text-anchor=end]")
    press(browser, "y", "log")
    press(browser, "xs", "log")
    assert texts(browser, ".drawing text[text-anchor=end]") != linear
    assert axis(browser)[1] == ["0.5", "1", "2", "5", "10", "20", "50", "100"]
    browser.find_element(By.CSS_SELECTOR, "summary").click()
    before = axis(browser), texts(browser, ".drawing text")
    browser.refresh()
    assert (axis(browser), texts(browser, ".drawing text")) == before
    chosen = [e.get_attribute("value") for e in browser.find_elements(By.CSS_SELECTOR, "input:checked")]
    assert chosen == ["seconds", "log", "log"]
    assert browser.find_element(By.CSS_SELECTOR, "details").get_attribute("open")


def test_the_switches_work_from_the_keyboard(show, tmp_path):
    browser = show(run_page(in_progress(tmp_path, usual_records())))
    ActionChains(browser).send_keys(Keys.TAB, Keys.ARROW_RIGHT).perform()
    assert axis(browser)[0] == "training tokens"


def test_where_the_pointer_is_the_page_shows_the_values(show, tmp_path):
    events = [{"global_step": 100, "time": 1e9, "text": "resumed"}]
    browser = show(run_page(in_progress(tmp_path, usual_records(), events=events)))
    svg = browser.find_element(By.CSS_SELECTOR, ".drawing > svg")
    middle = browser.execute_script("return arguments[0].querySelector('.mark').getBBox().x", svg)
    ActionChains(browser).move_to_element_with_offset(svg, round(middle - svg.size["width"] / 2), 0).perform()
    [box] = browser.find_elements(By.CSS_SELECTOR, ".values")
    lines = box.text.splitlines()
    assert lines[0].startswith("step 100 · 12.8k tokens · 0:00:")
    assert "training, every step 6" in lines and "validation 6" in lines and "resumed" in lines
    ActionChains(browser).move_to_element(browser.find_element(By.TAG_NAME, "h1")).perform()
    assert not browser.find_elements(By.CSS_SELECTOR, ".values")
    browser.execute_script("arguments[0].focus()", svg)
    ActionChains(browser).send_keys(Keys.ARROW_LEFT).perform()
    assert "step 99 " in browser.find_element(By.CSS_SELECTOR, ".values").text


@pytest.mark.parametrize("records", [[], [record(1)], [record(1, None, None)], [record(1), record(2, 0.0, 0.0)]])
@pytest.mark.parametrize("scale", ["auto", "linear", "log"])
def test_runs_of_hardly_any_step_are_drawn_on_every_scale(show, tmp_path, records, scale):
    browser = show(run_page(in_progress(tmp_path, records)))
    for name, value in [("x", "seconds"), ("xs", "log"), ("y", scale)] if records else []:
        press(browser, name, value)
    drawn = " ".join(e.get_attribute("d") for e in browser.find_elements(By.CSS_SELECTOR, "path"))
    assert not {"NaN", "Infinity", "undefined"} & set(drawn.replace(",", " ").split())
    if records:
        assert browser.find_elements(By.CSS_SELECTOR, "circle, path.line")


def test_a_million_steps_are_drawn_and_end_where_the_records_do(show, tmp_path):
    losses = np.random.default_rng(0).normal(3, 0.1, 1_000_000).tolist()
    records = [record(step, loss) for step, loss in enumerate(losses, start=1)]
    browser = show(run_page(in_progress(tmp_path, records)))
    assert axis(browser)[1][-1] == "1,000,000"
    assert float(tiles(browser)["training loss"]) == pytest.approx(losses[-1], abs=1e-4)


def test_rejected_updates_are_crosses_and_events(show, tmp_path):
    records = [record(step, *((None, None) if step in (3, 4) else ())) for step in range(1, 11)]
    browser = show(run_page(in_progress(tmp_path, records)))
    [cross] = browser.find_elements(By.CSS_SELECTOR, ".drawing path.cross")
    assert cross.get_attribute("d").count("M") == 2
    assert texts(browser, "td").count("update rejected") == 2


def test_names_and_samples_that_look_like_html_are_text(show, tmp_path):
    run = in_progress(tmp_path, [record(1) | {f"norm/{HOSTILE}": 1.0}], versions={HOSTILE: HOSTILE})
    RunDirectory(tmp_path).samples.write_text(f"step 1 | <img src=x onerror='window.broken = 1'>{HOSTILE[:40]}\n")
    page = run_page(run, HOSTILE)
    page.title = page.runs[0] = HOSTILE
    browser = show(page)
    assert texts(browser, "h1") == [HOSTILE]
    assert texts(browser, "p.sample")[0].startswith("<img src=x")
    assert not browser.execute_script("return window.broken")
    assert not browser.find_elements(By.TAG_NAME, "img")


def test_numbers_by_layer_are_a_heat_map_of_many_colors(show, tmp_path):
    norms = [{f"gradient_norm/blocks.{i}": 10.0 ** (i - s) for i in range(4)} for s in range(1, 5)]
    browser = show(run_page(in_progress(tmp_path, [record(s) | norms[s - 1] for s in range(1, 5)])))
    pixels = browser.execute_script(
        "const c = document.querySelector('canvas');"
        "return [...new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)]"
    )
    assert len(set(pixels)) == 7  # as many powers of ten
    svg = browser.find_elements(By.CSS_SELECTOR, ".drawing > svg")[-1]
    top = 8 + 18 * 2.5 - svg.size["height"] / 2
    ActionChains(browser).move_to_element_with_offset(svg, svg.size["width"] // 2 - 30, round(top)).perform()
    assert browser.find_element(By.CSS_SELECTOR, ".values").text.splitlines()[1:] == ["blocks.2 0.01"]


def several(count=11):
    records = [Records(record(s, 9 - s / 9 - i / 9, val_loss=9 - i / 9) for s in range(1, 31)) for i in range(count)]
    runs = [ComparedRun(f"run-{i}", records[i], {"seed": i}, i != 3) for i in range(count)]
    return comparison_page(
        "several", runs, {"Results": (["run", "loss"], [[run.name, "1.0"] for run in runs])}, "tokens"
    )


def test_eleven_runs_have_lines_that_differ_and_each_can_be_hidden(show):
    browser = show(several())
    titles = [text for text in texts(browser, "h2") if text.startswith("Loss")]
    assert len(titles) == 2 and "not comparable" in titles[1]
    norms = browser.find_elements(By.CSS_SELECTOR, ".drawing")[2]
    looks = [
        (line.value_of_css_property("stroke"), line.value_of_css_property("stroke-dasharray"))
        for line in norms.find_elements(By.CSS_SELECTOR, "path.line")
    ]
    assert len(looks) == len(set(looks)) == 11
    press(browser, "run", "5")
    assert not browser.find_elements(By.CSS_SELECTOR, "[data-run='5']")
    browser.refresh()
    assert not browser.find_elements(By.CSS_SELECTOR, "[data-run='5']")
    press(browser, "run", "5")
    assert browser.find_elements(By.CSS_SELECTOR, "[data-run='5']")


@pytest.mark.parametrize("kind", ["run", "several"])
def test_on_a_phone_nothing_is_wider_than_the_screen(show, tmp_path, kind):
    page = several() if kind == "several" else run_page(in_progress(tmp_path / ("long-name" * 20), usual_records()))
    browser = show(page)
    phone = {"width": 375, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    browser.refresh()
    assert browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]") == [375, 375]
    assert browser.find_element(By.CSS_SELECTOR, ".drawing > svg").size["width"] <= 375


def test_a_page_follows_the_dark_mode_of_the_system_and_can_be_printed(show, tmp_path):
    browser = show(run_page(in_progress(tmp_path, usual_records())))
    color = "return getComputedStyle(document.body).backgroundColor"
    for scheme, expected in [("light", "rgb(255, 255, 255)"), ("dark", "rgb(21, 23, 26)")]:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        assert browser.execute_script(color) == expected
    assert base64.b64decode(browser.print_page()).startswith(b"%PDF")


def test_the_page_of_a_run_that_is_on_reloads_itself_until_the_run_has_ended(show, tmp_path):
    on, ended = (
        run_page(in_progress(tmp_path, usual_records(count)), ending) for count, ending in [(50, None), (60, "stopped")]
    )
    on.reload_seconds = 0.2
    browser = show(on)
    press(browser, "x", "tokens")
    page_file.write(tmp_path / "page.html", ended)
    WebDriverWait(browser, 30).until(lambda b: b.find_element(By.ID, "status").text.startswith("stopped: step 60"))
    assert axis(browser)[0] == "training tokens"
    browser.execute_script("window.same = 1")
    assert json.loads(texts(browser, "#data")[0])["reload_seconds"] is None


def test_the_page_of_a_real_run_ends_with_its_last_record(browser, call_program, make_run):
    run = make_run("run", train={"sample_prompt": "ab"})
    assert call_program("train", run).returncode == 0
    browser.get((run / "report.html").as_uri())
    assert browser.find_element(By.ID, "status").text.startswith("finished: step 12 of 12")
    last = read(run / "metrics.jsonl")[-1]
    shown = tiles(browser)
    for name, key in [("training loss", "loss"), ("validation loss", "val_loss"), ("gradient norm", "gradient_norm")]:
        assert float(shown[name]) == pytest.approx(last[key], rel=1e-4), name
    assert shown["tokens"] == f"{last['tokens_seen']:,}"
    cells = dict(zip(*[iter(texts(browser, "details:last-of-type td"))] * 2))
    assert {name: json.loads(value) for name, value in cells.items()} == last
