"""The reference, a page for every area, made of the docstrings: `python bench/reference.py FOLDER` (extra `docs`).

The pages load nothing: formulas are MathML, which browsers draw themselves.
"""

from __future__ import annotations

import re
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pdoc.doc
import pdoc.render
from latex2mathml.converter import convert

from funcscope import Result

AREAS = (
    "curvature", "fisher", "gradients", "information", "landscape", "linalg", "mechanistic", "representation", "weights",
)  # fmt: skip
OTHERS = (
    "families", "families.modular", "families.text", "families.induction", "documented", "view", "view.renderers",
    "view.export",
)  # fmt: skip
MODULES = ("funcscope", *(f"funcscope.{name}" for name in (*AREAS, *OTHERS)))
PIECES = re.compile(
    r"(?P<code>```.*?```|`[^`]*`|^[ \t]*>>> .*?(?=\n[ \t]*\n|\Z))|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$]+?)\$",
    re.DOTALL | re.MULTILINE,
)
"""Of a docstring: code, in which a dollar is a dollar, and formulas."""
UNKNOWN = {"langle": "⟨", "rangle": "⟩", "arg": r"\operatorname{arg}"}
"""Commands that the converter does not know, everywhere or after `\\big`, and what says the same."""


def write(folder: Path) -> None:
    """A page for the package and for each of its areas, an index, and what the search field needs."""
    pdoc.render.configure(docformat="markdown", math=False, show_source=False)
    pdoc.render.env.filters["to_markdown"] = lambda text: PIECES.sub(_formula, text or "")
    with warnings.catch_warnings():
        # named tuples have no module to look a shape up in: it is shown as it is written
        warnings.filterwarnings("ignore", message="Error parsing type annotation")
        modules = {name: pdoc.doc.Module(import_module(name)) for name in MODULES}
        for each in modules.values():
            each.submodules = [one for name, one in modules.items() if name.rpartition(".")[0] == each.fullname]
            _describe(each)
        pages = {
            f"{name.replace('.', '/')}.html": pdoc.render.html_module(each, modules) for name, each in modules.items()
        }
        pages |= {"index.html": pdoc.render.html_index(modules), "search.js": pdoc.render.search_index(modules)}
    for name, page in pages.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(page, encoding="utf-8")


def _describe(module: pdoc.doc.Module) -> None:
    """Say of every quantity of a result what it is, in front of what the source says of it."""
    for known in module.members.values():
        if isinstance(known, pdoc.doc.Class) and issubclass(known.obj, Result) and known.obj is not Result:
            for name, what in known.obj.quantities().items():
                axes = f", per {' and '.join(what.per)}" if what.per else ""
                unit = f", in {'units of the loss' if what.unit == 'loss' else what.unit}" if what.unit else ""
                member = known.members.get(name)
                if member is not None:
                    member.docstring = f"{what.label}{unit}{axes}.\n\n{member.docstring}".strip()


def _formula(piece: re.Match[str]) -> str:
    """MathML in the place of LaTeX; what Markdown would read as emphasis or code is escaped."""
    if piece["code"]:
        return piece["code"]
    tex = " ".join((piece["block"] or piece["inline"]).split())
    for name, known in UNKNOWN.items():
        tex = re.sub(rf"\\{name}(?![a-zA-Z])", lambda _, known=known: known, tex)
    drawn = convert(tex, display="block" if piece["block"] else "inline")
    return re.sub(r"[*_`\\]", lambda sign: f"&#{ord(sign[0])};", drawn)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write(Path(sys.argv[1]))
    print(Path(sys.argv[1]) / "index.html")
