"""The notebooks run from top to bottom, and what they claim is asserted in their own cells."""

import ast
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "bench" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SUBJECTS = {"ablation", "derivatives", "first_look", "grokking", "merging"}


def code_of(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A notebook is executed in an empty folder by this Python, whatever kernels the machine knows by that name."""
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    spec = tmp_path / "kernels" / "this-python"
    spec.mkdir(parents=True)
    start = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": start, "display_name": "this", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "TMPDIR"):
        folder = tmp_path / name.lower()
        folder.mkdir()
        monkeypatch.setenv(name, str(folder))

    def execute(notebook):
        where = {"metadata": {"path": str(tmp_path)}}
        return client.NotebookClient(notebook, timeout=600, kernel_name="this-python", resources=where).execute()

    return execute


def test_all_subjects_are_there():
    assert {path.stem for path in NOTEBOOKS} == SUBJECTS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_without_outputs_and_asserts_what_it_says(path):
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert len({cell["id"] for cell in stored["cells"]}) == len(stored["cells"])
    for cell in stored["cells"]:
        assert "".join(cell["source"]).strip(), cell["id"]
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None), cell["id"]
    claims = [node for cell in code_of(path) for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.Assert)]
    assert len(claims) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_top_to_bottom(path, run):
    nbformat = pytest.importorskip("nbformat")
    done = run(nbformat.read(path, as_version=4))
    cells = [cell for cell in done.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    shown = [data for cell in cells for output in cell.outputs for data in output.get("data", {})]
    assert "text/html" in shown  # results show themselves as tables


@pytest.mark.slow
def test_a_claim_that_is_not_so_fails(run):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    cells = [nbformat.v4.new_code_cell("import sys"), nbformat.v4.new_code_cell("assert sys.executable == 'another'")]
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="AssertionError"):
        run(nbformat.v4.new_notebook(cells=cells))
    cells[1].source = f"assert sys.executable == {sys.executable!r}"
    run(nbformat.v4.new_notebook(cells=cells))
