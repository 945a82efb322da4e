"""Proofs and docstrings cite each other, and proofs/README.md says what the proofs say."""

import ast
import importlib
import importlib.util
import re
import shutil
from operator import attrgetter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("ledger", ROOT / "proofs" / "ledger.py")
ledger = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(ledger)
PROOFS = ledger.proofs()
CITED = re.compile(r"proofs/\w+\.py")


def resolve(function):
    """(module, name inside it) of a fully qualified name; raises AttributeError where there is no such thing."""
    parts = function.split(".")
    module = max((".".join(parts[:i]) for i in range(1, len(parts)) if _is_module(".".join(parts[:i]))), key=len)
    name = function.removeprefix(f"{module}.")
    attrgetter(name)(importlib.import_module(module))
    return module, name


def _is_module(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def citations(source, name):
    """The proofs cited by the module's docstring and by that of one name in it; a constant has its docstring below."""
    tree = ast.parse(source)
    docs = [ast.get_docstring(tree) or ""]
    for node, after in zip(tree.body, [*tree.body[1:], ast.Pass()], strict=True):
        if getattr(node, "name", None) == name.split(".")[0]:
            docs += [
                ast.get_docstring(inner) or ""
                for inner in ast.walk(node)
                if getattr(inner, "name", None) == name.split(".")[-1]
            ]
        elif isinstance(node, ast.Assign) and any(getattr(target, "id", None) == name for target in node.targets):
            docs += [after.value.value] if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else []
    return set(CITED.findall(" ".join(docs)))


def unanswered(texts, proofs):
    """(module, proof) wherever the text of a module cites a proof that does not name a function of that module."""
    named = {(resolve(function)[0], f"proofs/{proof.file}") for proof in proofs for function in proof.functions}
    return {(module, cited) for module, text in texts.items() for cited in CITED.findall(text)} - named


def modules():
    paths = sorted((ROOT / "funcscope").rglob("*.py"))
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths)
    return {name: path.read_text(encoding="utf-8") for name, path in zip(names, paths, strict=True)}


@pytest.mark.parametrize(("file", "function"), [(proof.file, name) for proof in PROOFS for name in proof.functions])
def test_every_named_function_exists_and_cites_its_proof(file, function):
    module, name = resolve(function)
    assert f"proofs/{file}" in citations(modules()[module], name)


def test_every_cited_proof_exists_and_names_a_function_of_the_citing_module():
    assert unanswered(modules(), PROOFS) == set()


def test_the_checks_of_citations_can_fail():  # negative control
    assert citations("def f():\n    'proofs/a.py'\n\ndef g():\n    'proofs/b.py'", "g") == {"proofs/b.py"}
    assert citations("x = 1\n'''proofs/a.py'''\ny = 2\n'''none'''", "y") == set()
    elsewhere = {"funcscope.core.keys": "proofs/causal_shift.py and proofs/missing.py"}
    assert {cited for _, cited in unanswered(elsewhere, PROOFS)} == {"proofs/causal_shift.py", "proofs/missing.py"}
    with pytest.raises(AttributeError):
        resolve("funcscope.core.keys.missing")


def test_readme_is_up_to_date():
    assert ledger.main(["--check"]) == 0, "proofs/README.md is stale: run `python proofs/ledger.py`"


def test_a_changed_claim_makes_the_readme_stale_until_it_is_written(tmp_path):  # negative control
    folder = shutil.copytree(ROOT / "proofs", tmp_path / "proofs", ignore=shutil.ignore_patterns("__pycache__"))
    proof = folder / PROOFS[0].file
    proof.write_text(proof.read_text(encoding="utf-8").replace("Claim: ", "Claim: not ", 1), encoding="utf-8")
    assert ledger.main(["--check"], folder) == 1
    assert ledger.main([], folder) == 0
    assert ledger.main(["--check"], folder) == 0


@pytest.mark.parametrize(("old", "new"), [("general and", "certain and"), ("Size: ", "Scale: "), ("Claim: ", "")])
def test_a_docstring_without_grade_or_field_is_refused(tmp_path, old, new):
    proof = tmp_path / "central_difference.py"
    proof.write_text(
        (ROOT / "proofs" / "central_difference.py").read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8"
    )
    with pytest.raises(ValueError, match=r"central_difference\.py: the docstring must"):
        ledger.read(proof)
