"""The ledger of proofs: `python proofs/ledger.py` writes README.md from the docstrings; `--check` exits 1 if stale.

A proof's docstring begins with `grade: short claim`; then come its fields, `Claim: ...` and so on, each to the next.
"""

import ast
import re
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
GRADES = {
    "identity": "an identity of symbols, at the sizes named",
    "exhaustive": "the whole sample space, in exact rationals, at the sizes named",
    "general": "every size",
}
FIELDS = ("Claim", "Function", "Size", "Assumptions", "Not covered")
HEAD = """# Proofs

Written by `python proofs/ledger.py` from the docstrings of the files; run by `pytest proofs`. Every file proves a
theorem, shows by negative controls that its checks can fail, and evaluates the functions that are shipped (oracle:
exact rationals or float64).
"""


class Proof(NamedTuple):
    """One row of the ledger."""

    file: str
    grades: tuple[str, ...]
    title: str
    fields: dict[str, str]

    @property
    def functions(self) -> list[str]:
        """The functions of funcscope that the proof is about, fully qualified."""
        return re.split(r",\s*", self.fields["Function"])


def read(path: Path) -> Proof:
    """A proof from its docstring; raises ValueError where a grade is unknown or a field is missing."""
    first, _, rest = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")
    grade, _, title = first.partition(": ")
    grades = tuple(re.split(r", | and ", grade))
    parts = re.split(rf"^({'|'.join(FIELDS)}): ", rest.strip(), flags=re.MULTILINE)
    fields = {name: " ".join(text.split()) for name, text in zip(parts[1::2], parts[2::2], strict=True)}
    if not title or not set(grades) <= GRADES.keys():
        raise ValueError(
            f"{path.name}: the docstring must begin with `grade: claim`, grades {', '.join(GRADES)}; got {first!r}."
        )
    if parts[0] or tuple(fields) != FIELDS:
        raise ValueError(
            f"{path.name}: the docstring must have the fields {', '.join(FIELDS)}, in this order; got {list(fields)}."
        )
    return Proof(path.name, grades, title, fields)


def proofs(folder: Path = HERE) -> list[Proof]:
    """All proofs of a folder, by name."""
    return [read(path) for path in sorted(folder.glob("*.py")) if path.name != Path(__file__).name]


def ledger(rows: list[Proof]) -> str:
    """The text of README.md."""
    lines = [HEAD, *(f"- *{grade}*: {meaning}" for grade, meaning in GRADES.items()), ""]
    columns = ("proof", "claim", "function", "grade", "size", "assumptions", "not covered")
    lines += [_row(columns), _row(["---"] * len(columns))]
    for proof in rows:
        claim, _, size, assumptions, missing = (cell.replace("|", "\\|") for cell in proof.fields.values())
        names = ", ".join(f"`{name}`" for name in proof.functions)
        link, grade = f"[{proof.title}]({proof.file})", " and ".join(proof.grades)
        lines.append(_row((link, claim, names, grade, size, assumptions, missing)))
    return "\n".join(lines) + "\n"


def main(arguments: list[str], folder: Path = HERE) -> int:
    """Write README.md; with `--check` only say, by 1, that it is stale."""
    text, readme = ledger(proofs(folder)), folder / "README.md"
    if arguments == ["--check"]:
        return int(not readme.exists() or readme.read_text(encoding="utf-8") != text)
    readme.write_text(text, encoding="utf-8")
    return 0


def _row(cells) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
