"""The dashboard in a real headless Chromium: what a reader does, and what the page then shows."""

import shutil
import threading
import time

import numpy as np
import pytest
from test_dashboard import GAP, STEPS, run_folder

from funcscope.view import dashboard

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.actions.action_builder import ActionBuilder  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver on this machine"),
]

SECONDS = 120
"""Patience with a machine that does other things, too."""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    made = dashboard.app(run_folder(tmp_path_factory.mktemp("run")))
    with dashboard.listen(made, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield dashboard.address("127.0.0.1", server.port)
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(downloads):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1400,1800",
    ):  # fmt: skip
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, address):
    """The page at p37, step 100, drawn."""
    browser.get(f"{address}?variant=p37&step=100")
    until(lambda: "step 100" in title(browser, "distribution"))
    yield browser
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert errors == []


def until(holds):
    """Wait for what the page is to show, and return it."""
    end = time.monotonic() + SECONDS
    while not (found := holds()):
        assert time.monotonic() < end, "the page did not come to show it"
        time.sleep(0.05)
    return found


def plot(browser, name, expression):
    """A value of a drawn figure; None before it is drawn."""
    return browser.execute_script(
        "const graph = document.querySelector(`#plot-${arguments[0]} .js-plotly-plot`);"
        f"return graph && graph.layout ? {expression} : null",
        name,
    )


def title(browser, name):
    return plot(browser, name, "(graph.layout.title || {}).text") or ""


def marked(browser, name):
    """The step of the vertical line, drawn on a square-root scale; None without one."""
    x = plot(browser, name, "(graph.layout.shapes || []).filter((s) => s.name == 'current step').map((s) => s.x0)[0]")
    return None if x is None else round(x**2)


def curve(browser):
    """Values of the trajectory, nan in its gaps."""
    values = plot(browser, "flatness", "Array.from(graph._fullData.at(-1).y, (y) => Number.isFinite(y) ? y : null)")
    return np.array(values, dtype=float)


def text(browser, selector):
    """What a reader sees of an element; nothing while it is not there."""
    return " ".join(found.text for found in browser.find_elements(By.CSS_SELECTOR, selector))


def choose(browser, within, label):
    """Pick an entry of a menu by its text."""
    browser.find_element(By.CSS_SELECTOR, f"{within} .dash-dropdown").click()
    entries = until(lambda: browser.find_elements(By.CSS_SELECTOR, ".dash-dropdown-content .dash-dropdown-option"))
    next(entry for entry in entries if entry.text == label).click()


def clear(browser):
    browser.get_log("browser")


def test_the_page_loads_without_a_console_error_and_shows_every_panel(page):
    names = page.execute_script("return [...document.querySelectorAll('#panels > section')].map((s) => s.id)")
    assert names == [f"panel-{panel.name}" for panel in dashboard.callbacks.PANELS]
    drawn = "return [...document.querySelectorAll('.js-plotly-plot')].every((g) => g.layout && g.layout.meta)"
    until(lambda: page.execute_script(drawn))
    assert text(page, "#now") == "Step 100 · 3 of 6"
    assert page.title.endswith("funcscope")
    assert "5 of 6" in text(page, "#run-time")
    assert not page.find_element(By.ID, "message").text


def test_nothing_is_loaded_from_elsewhere(page, address):
    loaded = page.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert any("plotly" in name for name in loaded)
    assert [name for name in loaded if not name.startswith((address, "data:", "blob:"))] == []


def test_the_slider_moves_every_panel_by_keyboard(page):
    handle = page.find_element(By.CSS_SELECTOR, "#bar [role=slider]")
    assert handle.get_attribute("aria-valuetext") == "Step 100"
    assert marked(page, "flatness") == 100
    handle.send_keys(Keys.ARROW_RIGHT)
    until(lambda: text(page, "#now").startswith("Step 150"))
    until(lambda: marked(page, "flatness") == marked(page, "curvature") == 150)
    until(lambda: "No sample of perturbations is stored at step 150" in text(page, "#plot-distribution"))  # a gap
    handle.send_keys(Keys.ARROW_RIGHT)
    until(lambda: "step 200" in title(page, "distribution") and marked(page, "flatness") == 200)
    assert handle.get_attribute("aria-valuetext") == "Step 200"
    assert page.current_url.endswith("?variant=p37&step=200")
    handle.send_keys(Keys.END)
    until(lambda: "step 300" in title(page, "distribution") and "step 300" in title(page, "plane"))


def test_the_selector_changes_the_curve(page):
    grown, gap = np.array(STEPS) / STEPS[-1], np.array(STEPS) == GAP
    np.testing.assert_allclose(curve(page), np.where(gap, np.nan, 1 + grown))
    choose(page, "#panel-flatness", "flatness ratio")
    until(lambda: "flatness ratio" in title(page, "flatness"))
    np.testing.assert_allclose(curve(page), np.where(gap, np.nan, 1 - grown / 2))


def test_a_click_on_a_point_of_the_trajectory_selects_its_step(page):
    x, y = page.execute_script("""
        const graph = document.querySelector("#plot-flatness .js-plotly-plot"), full = graph._fullLayout;
        const trace = graph._fullData.at(-1), at = Array.from(trace.customdata).indexOf(50);
        const box = graph.querySelector(".nsewdrag").getBoundingClientRect();
        return [box.left + full.xaxis.d2p(trace.x[at]), box.top + full.yaxis.d2p(trace.y[at])];
    """)
    point = ActionBuilder(page)
    point.pointer_action.move_to_location(round(x), round(y)).pause(0.3).click()  # the point is found on hovering
    point.perform()
    until(lambda: text(page, "#now").startswith("Step 50") and "step 50" in title(page, "distribution"))
    until(lambda: marked(page, "flatness") == 50)


def test_the_variant_is_chosen_and_kept_in_the_address(page):
    choose(page, "header", "p41")
    until(lambda: "variant=p41" in page.current_url)
    until(lambda: plot(page, "distribution", "(graph.layout.meta || {}).file") == "p41-distribution-step-00100")
    page.refresh()
    until(lambda: "p41" in text(page, "header") and text(page, "#now").startswith("Step 100"))


def test_the_two_phases_stand_side_by_side_on_one_scale(page):
    until(lambda: "step 100, memorising" in title(page, "phases-first"))
    until(lambda: "step 300, generalising" in title(page, "phases-last"))
    ranges = [plot(page, f"phases-{side}", "graph.layout.xaxis.range") for side in ("first", "last")]
    assert ranges[0] == ranges[1]
    boxes = [page.find_element(By.ID, f"plot-phases-{side}").rect for side in ("first", "last")]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] < boxes[1]["x"]


def test_exports_are_downloaded_with_names_that_say_what_they_are(page, downloads):
    for kind in ("PNG", "SVG", "HTML"):
        button = page.find_element(By.XPATH, f"//*[@id='plot-distribution']//button[text()='{kind}']")
        page.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()
        file = downloads / f"p37-distribution-step-00100.{kind.lower()}"
        until(lambda file=file: file.is_file() and file.stat().st_size)
    png, svg, html = (next(downloads.glob(f"*.{kind}")).read_bytes() for kind in ("png", "svg", "html"))
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert b"<svg" in svg[:200]
    assert b"step 100" in svg
    assert b"<script src=" not in html
    assert b"Plotly.newPlot" in html
    assert len(html) > 1_000_000


def test_a_variant_outside_the_run_is_refused_in_sight(browser, address):
    clear(browser)
    browser.get(f"{address}?variant=..%2F..%2Fetc&step=100")
    until(lambda: "There is no variant “../../etc” in this run" in text(browser, "#message"))
    assert not browser.find_elements(By.CSS_SELECTOR, ".js-plotly-plot")
    assert not browser.find_element(By.ID, "bar").is_displayed()
    choose(browser, "header", "p41")  # and from there the run is reached
    until(lambda: "p41" in text(browser, "header") and text(browser, "#now").startswith("Step 300"))
    assert not text(browser, "#message")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_a_narrow_window_has_one_column_and_no_sideways_scrolling(page):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 420, "height": 1600, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        lefts = "return new Set([...document.querySelectorAll('#panels > section')].map((s) => s.offsetLeft)).size"
        until(lambda: page.execute_script(lefts) == 1)
        until(lambda: page.execute_script("return document.documentElement.scrollWidth") <= 420)
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
