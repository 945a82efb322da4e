"""The reference is made by one command, has every public name, and its formulas are drawn."""

import html
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from funcscope.landscape import Flatness

ROOT = Path(__file__).parents[1]
AREAS = [path.parent.name for path in sorted((ROOT / "funcscope").glob("*/__init__.py"))]
APART = {"cli", "core", "study"}
"""Floors that nobody imports from: what is public of them is in the package itself."""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    for name in ("pdoc", "latex2mathml"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("reference")
    (command,) = re.findall(r"^python (bench/reference\.py) FOLDER$", (ROOT / "README.md").read_text(), re.MULTILINE)
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:pdoc", command, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.html")}


@pytest.mark.slow
def test_every_public_name_of_every_area_has_its_place(pages):
    for area in ["", *sorted(set(AREAS) - APART)]:
        name = f"funcscope.{area}".rstrip(".")
        module, page = import_module(name), pages[f"{name.replace('.', '/')}.html"]
        places = set(re.findall(r'id="([^"]+)"', page))
        public = {each for each in getattr(module, "__all__", ["show"]) if each not in AREAS}
        public -= {each for each in public if type(getattr(module, each)).__name__ == "module"}
        assert public <= places, public - places
    assert "no_such_name" not in places


@pytest.mark.slow
def test_every_formula_is_drawn_and_none_is_left_as_it_was_typed(pages):
    assert sum(page.count("<math") for page in pages.values()) > 300
    for name, page in pages.items():
        left = [math for math in re.findall(r"<math.*?</math>", page) if "\\" in html.unescape(math)]
        assert not left, (name, left[:3])
        prose = re.sub(r"<(pre|code|math|script|style|svg)\b.*?</\1>", "", page, flags=re.DOTALL)
        assert "$" not in re.sub(r"<[^>]*>", "", prose), name


@pytest.mark.slow
def test_quantities_say_what_they_are(pages):
    page = html.unescape(pages["funcscope/landscape.html"])
    own = {
        name: what
        for name, what in Flatness.quantities().items()
        if name in (*vars(Flatness), *Flatness.__annotations__)
    }
    assert len(own) > 8
    for name, what in own.items():
        described = page[page.index(f'<div id="Flatness.{name}"') :].partition('<div class="docstring">')[2]
        assert what.label in described[:2000], name


@pytest.mark.slow
def test_no_page_loads_anything(pages):
    for name, page in pages.items():
        assert not re.search(r"<(script|link|img)[^>]*(src|href)=[\"']?https?:", page), name
