"""The house keeps its layers: nobody imports upward, and each outside library has its room."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import funcscope

ROOT = Path(funcscope.__file__).parent
FLOORS = [
    {"core"},
    {"linalg"},
    {"curvature"},
    {"landscape", "fisher", "gradients", "information", "representation", "mechanistic", "weights", "families"},
    {"study", "documented"},
    {"view"},
    {"cli", "__main__"},
]
ROOMS = {
    "transformers": (
        "core/architectures.py",
        "core/model.py",
        "core/masks.py",
        "core/skeleton.py",
        "families",
        "study",
    ),
    "plotly": ("view",),
    "dash": ("view",),
}


def floor(room: str) -> int:
    return next(level for level, rooms in enumerate(FLOORS) if room in rooms)


def imported(source: str, module: str) -> set[str]:
    """Absolute names of everything that a module's source imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def complaints(path: str, source: str) -> list[str]:
    module = "funcscope." + path.removesuffix(".py").replace("/", ".")
    room = module.split(".")[1]
    found = []
    for name in imported(source, module):
        parts = name.split(".")
        if parts[0] == "funcscope" and len(parts) > 1 and parts[1] != "__version__":
            if parts[1] != room and floor(parts[1]) >= floor(room):
                found.append(f"{path} imports {name}")
        elif parts[0] in ROOMS and not path.startswith(ROOMS[parts[0]]):
            found.append(f"{path} imports {parts[0]}")
    return found


@pytest.mark.parametrize("path", sorted(str(p.relative_to(ROOT)) for p in ROOT.rglob("*.py") if p.parent != ROOT))
def test_no_room_imports_its_floor_or_above(path):
    assert complaints(path, (ROOT / path).read_text()) == []


def test_the_check_can_fail():
    assert complaints("core/x.py", "from ..landscape import directional_losses")
    assert complaints("landscape/x.py", "from ..families.modular import make")
    assert complaints("landscape/x.py", "import plotly.express")
    assert not complaints("landscape/x.py", "from ..core.keys import key")


@pytest.mark.slow
def test_transformers_is_imported_with_the_first_model_of_it():
    """Its import takes longer than torch's, and most calls need none of it."""
    code = "import sys, funcscope.cli, funcscope.view.report; print([m for m in sys.modules if m.startswith('transformers')])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
