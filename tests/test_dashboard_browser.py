"""The dashboard in a real headless Chromium: what a reader does, and what the page then shows."""

import shutil
import threading
import time

import pytest
import results as made
from test_dashboard import NAMES, RUN, study_folder

from funcscope.study.cache import Outcome
from funcscope.study.results import Results
from funcscope.view import dashboard
from funcscope.view.page import Section, Table, render
from funcscope.view.report import write_report

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
    made = dashboard.app(study_folder(tmp_path_factory.mktemp("study")))
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
    """The page at step 50 of the run, drawn."""
    clear(browser)
    browser.get(f"{address}?group={RUN}&step=50")
    until(lambda: marked(browser, "hessian_trace") == marked(browser, "landscape_flatness") == 50)
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
        "const graph = document.querySelector(`#card-${arguments[0]} .js-plotly-plot`);"
        f"return graph && graph.layout ? {expression} : null",
        name,
    )


def title(browser, name):
    return plot(browser, name, "(graph.layout.title || {}).text") or ""


def marked(browser, name):
    """The step of the vertical line, drawn on a square-root scale; None without one."""
    x = plot(browser, name, "(graph.layout.shapes || []).filter((s) => s.name == 'current step').map((s) => s.x0)[0]")
    return None if x is None else round(x**2)


def text(browser, selector):
    """What a reader sees of an element; nothing while it is not there."""
    return " ".join(found.text for found in browser.find_elements(By.CSS_SELECTOR, selector))


def choose(browser, within, label):
    """Pick an entry of a menu by its text, or the second."""
    browser.find_element(By.CSS_SELECTOR, f"{within} .dash-dropdown").click()
    entries = until(lambda: browser.find_elements(By.CSS_SELECTOR, ".dash-dropdown-content .dash-dropdown-option"))
    (entries[1] if label is None else next(entry for entry in entries if entry.text == label)).click()


def clear(browser):
    browser.get_log("browser")


def bodies(browser):
    """Names of the cards that have drawn something."""
    return browser.execute_script(
        "return [...document.querySelectorAll('#cards > section:has(.plots)')].map((s) => s.id)"
    )


def test_the_page_loads_without_a_console_error_and_fills_every_card(page):
    until(lambda: set(bodies(page)) == {f"card-{name}" for name in (*NAMES, "sized")})
    assert text(page, "#now") == "Step 50 · 3 of 4"
    assert "Step 0, the nearest to 50 that has one." in text(page, "#card-loss_landscape_2d .elsewhere")
    size = "return getComputedStyle(document.querySelector('.elsewhere p')).fontSize"
    assert float(page.execute_script(size).removesuffix("px")) >= 16


def test_nothing_is_loaded_from_elsewhere(page, address):
    loaded = page.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert any("plotly" in name for name in loaded)
    assert [name for name in loaded if not name.startswith((address, "data:", "blob:"))] == []


def test_the_slider_moves_every_card_by_keyboard(page):
    handle = page.find_element(By.CSS_SELECTOR, "#bar [role=slider]")
    assert handle.get_attribute("aria-valuetext") == "Step 50"
    handle.send_keys(Keys.ARROW_RIGHT)
    until(lambda: text(page, "#now").startswith("Step 100"))
    until(lambda: marked(page, "hessian_trace") == marked(page, "landscape_flatness") == 100)
    until(lambda: not page.find_elements(By.CSS_SELECTOR, "#card-loss_landscape_2d .elsewhere"))
    assert page.current_url.endswith(f"?group={RUN}&step=100")
    handle.send_keys(Keys.HOME)
    until(lambda: "ArithmeticError: <b>too small</b>" in text(page, "#card-sized .failed"))


def test_the_quantity_that_is_followed_can_be_chosen_and_stays(page):
    first = title(page, "landscape_flatness")
    choose(page, "#card-landscape_flatness", None)
    until(lambda: title(page, "landscape_flatness") not in ("", first))
    page.find_element(By.CSS_SELECTOR, "#bar [role=slider]").send_keys(Keys.ARROW_RIGHT)
    until(lambda: marked(page, "landscape_flatness") == 100)
    assert title(page, "landscape_flatness") != first


def test_a_click_on_a_point_or_a_button_goes_to_its_step(page):
    x, y = page.execute_script("""
        const graph = document.querySelector("#card-hessian_trace .js-plotly-plot"), full = graph._fullLayout;
        graph.scrollIntoView({block: "center"});
        const trace = graph._fullData.at(-1), at = Array.from(trace.customdata).indexOf(10);
        const box = graph.querySelector(".nsewdrag").getBoundingClientRect();
        return [box.left + full.xaxis.l2p(trace.x[at]), box.top + full.yaxis.l2p(trace.y[at])];
    """)
    point = ActionBuilder(page)
    point.pointer_action.move_to_location(round(x), round(y)).pause(0.3).click()  # the point is found on hovering
    point.perform()
    until(lambda: text(page, "#now").startswith("Step 10 ") and marked(page, "hessian_trace") == 10)
    until(lambda: "nearest to 10 " in text(page, "#card-loss_landscape_2d .elsewhere"))
    button = page.find_element(By.XPATH, "//*[@id='card-loss_landscape_2d']//button[text()='100']")
    page.execute_script("arguments[0].click()", button)
    until(lambda: text(page, "#now").startswith("Step 100"))


def test_a_model_is_chosen_and_kept_in_the_address(page):
    choose(page, "header", "a")
    until(lambda: page.current_url.endswith("?group=a"))
    assert not page.find_element(By.ID, "bar").is_displayed()
    page.refresh()
    until(lambda: "card-landscape_flatness" in bodies(page))


def test_exports_are_downloaded_with_names_that_say_what_they_are(page, downloads):
    for kind in ("PNG", "SVG", "HTML"):
        button = page.find_element(By.XPATH, f"//*[@id='card-hessian_trace']//button[text()='{kind}']")
        page.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()  # by hand: a browser takes several files from a person only
        file = downloads / f"{RUN}-hessian_trace-step-00050-1.{kind.lower()}"
        until(lambda file=file: file.is_file() and file.stat().st_size)
    png, svg, html = (next(downloads.glob(f"*.{kind}")).read_bytes() for kind in ("png", "svg", "html"))
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert b"<svg" in svg[:200]
    assert b"<script src=" not in html
    assert b"Plotly.newPlot" in html


def test_a_group_outside_the_study_is_refused_in_sight(browser, address):
    clear(browser)
    browser.get(f"{address}?group=..%2F..%2Fetc&step=100")
    until(lambda: "There is no “../../etc” in this study" in text(browser, "#message"))
    assert not browser.find_elements(By.CSS_SELECTOR, ".js-plotly-plot")
    assert not browser.find_element(By.ID, "bar").is_displayed()
    choose(browser, "header", RUN)  # and from there the study is reached
    until(lambda: text(browser, "#now").startswith("Step 100"))
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.parametrize("width", [420, 1400])
def test_nothing_scrolls_sideways(page, width, tmp_path):
    size = {"width": width, "height": 1600, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    widest = "return Math.max(...[...document.querySelectorAll('html, .table, table')].map((e) => e.scrollWidth))"
    try:
        columns = "return new Set([...document.querySelectorAll('#cards > section')].map((s) => s.offsetLeft)).size"
        until(lambda: page.execute_script(columns) == (1 if width < 500 else 2))
        until(lambda: page.execute_script(widest) <= width)
        compared = Outcome("directional_comparison", "a to b", None, "data", "ok", made.example("Comparison"))
        page.get(write_report(Results((compared,)), tmp_path / "a.html").path.as_uri())
        assert page.find_elements(By.TAG_NAME, "table")
        assert page.execute_script(widest) <= width
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_table_wider_than_the_page_begins_in_it_and_scrolls(browser, tmp_path):
    cell = "(\u22121.234 ± 0.045) × 10".replace(" ", "\u00a0")
    rows = [[f"layer {i}", *[cell] * 11] for i in range(3)]
    path = tmp_path / "a.html"
    path.write_text(render("a", sections=[Section("b", [Table(["block", *map(str, range(11))], rows)])]), "utf-8")
    for width in (420, 900, 1100, 1400):
        browser.set_window_size(width, 1000)
        browser.get(path.as_uri())
        left, box, page = browser.execute_script(
            "const box = document.querySelector('.table'), table = box.querySelector('table').getBoundingClientRect();"
            "return [table.left, box.getBoundingClientRect().right, document.documentElement.scrollWidth - innerWidth]"
        )
        assert left >= 0
        assert box <= width
        assert page <= 0
    browser.set_window_size(1400, 1800)
