"""What a command prints and what its page shows are the same numbers, errors included; unknown errors are said once."""

import math
import re

import pytest
from folders import TEXTS, folder, texts
from test_view_directional import visible

from funcscope import cli
from funcscope.core.store import load, save
from funcscope.study import curvature_rows, curvature_table, directional_rows, listing, sharpness_rows
from funcscope.study.numbers import number
from funcscope.view import curvature
from funcscope.view.curvature_result import Curvature
from funcscope.view.numbers import typeset

CURVATURE = ["--num-samples", "6", "--num", "2", "--probes", "3", "--steps", "8", "--trace-products", "12"]
COMMANDS = {
    "curvature": [*CURVATURE, "--block-products", "4"],
    "directional": ["--samples", "4"],
    "compare": ["--samples", "4"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    return folder(base / "gpt2"), folder(base / "scaled", scale=1.1)


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """A text file of lines without blank ones: one paragraph."""
    path = tmp_path_factory.mktemp("texts") / "lines.txt"
    path.write_text("\n".join(TEXTS))
    return path


def called(name, models, data, out, *words):
    """A command that writes a page."""
    first, second = models
    more = ["--compare", second] if name == "compare" else []
    command = "curvature" if name == "curvature" else "directional"
    arguments = [command, first, "--data", data, "--out", out, "--quiet", *more, *COMMANDS[name], *words]
    assert cli.main([str(word) for word in arguments]) == 0


@pytest.fixture(scope="module")
def made(models, tmp_path_factory):
    """Output and page of every command, a width of the terminal at a time."""
    data, cache = texts(tmp_path_factory.mktemp("texts") / "texts.jsonl"), {}

    def both(name, capsys):
        if name not in cache:
            out = tmp_path_factory.mktemp(name)
            called(name, models, data, out)
            cache[name] = capsys.readouterr().out, next(out.glob("*.html"))
        return cache[name]

    return both


def rows(printed):
    """Rows of the printed tables, cells joined by single spaces, in the characters of print."""
    inside, seen = False, []
    for line in printed.splitlines():
        if set(line) == {"-", " "} or set(line) == {"-"}:
            inside = True
        elif not line or (inside and "  " not in line):
            inside = False
        elif inside:
            seen.append(typeset(" ".join(line.split())))
    return seen


def missing(printed, page):
    """Rows of the terminal that the page does not have."""
    return [row for row in rows(printed) if row not in page]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_row_of_the_terminal_is_on_the_page_with_the_same_text(name, made, capsys):
    printed, page = made(name, capsys)
    shown = visible(page.read_text(encoding="utf-8"))
    assert len(rows(printed)) > 15
    assert missing(printed, shown) == []
    tokens = [token.strip("(),.;:|") for token in typeset(_cut(printed)).split()]
    for token in tokens:
        assert not re.search(r"\d", token) or "=" in token or token in shown, token
    assert "nan" not in printed
    another = re.sub(
        r"(\d)(?=\s)", lambda digit: str((int(digit[1]) + 1) % 10), shown
    )  # other last digits: a page of others
    assert len(missing(printed, another)) > 15


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_eigenvalue_and_its_learning_rate_have_the_error_over_texts_everywhere(
    sign, made, capsys, tmp_path
):
    _, page = made("curvature", capsys)
    stored = load(page.with_suffix(".npz"))
    ends = stored.arrays["end_values"]
    arrays = {
        **stored.arrays,
        "end_data_bias": 0 * ends,
        "end_data_low": sign * 0.5 * ends,
        "end_data_high": 1.4 * ends,
    }
    save(tmp_path / "run.npz", arrays, stored.meta)
    shown = visible(curvature.write_page(tmp_path / "run.npz").read_text(encoding="utf-8"))
    stored = load(tmp_path / "run.npz")
    printed = curvature_table.text(Curvature(stored).summary, stored)
    value, stderr, low, high = (
        float(arrays[f"end_{name}"][0]) for name in ("values", "data_stderr", "data_low", "data_high")
    )
    cells = (number(value, 4), number(stderr, 2), f"{number(low)} to {number(high)}")
    fastest = f"{number(2 / high)} to {number(2 / low)}" if low > 0 else f"above {number(2 / high)}"
    assert stderr > 1e-3 * value
    for name in ("largest eigenvalue", "largest eigenvalue of the Hessian"):
        (row,) = [row for row in rows(printed) if row.startswith(f"{name} {typeset(cells[0])}")]
        assert row in shown
        assert row.startswith(typeset(" ".join((name, *cells))))
    assert f"{number(2 / value)} {fastest}" in row
    headline = f"{cells[0]} ± {cells[1]} over texts ({cells[2]})"
    assert typeset(headline) in shown
    assert typeset(f"learning rate of {number(2 / value)} ({fastest})") in shown


def test_beyond_first_order_there_is_no_interval_anywhere(made, capsys):
    _, page = made("curvature", capsys)
    stored = load(page.with_suffix(".npz"))
    stored.arrays["end_data_bias"] = 9 * stored.arrays["end_data_stderr"]
    stored.arrays["end_data_low"] = stored.arrays["end_data_high"] = math.nan * stored.arrays["end_data_low"]
    found = Curvature(stored)
    assert found.rows["largest eigenvalue"].interval == ""
    assert found.rows["largest eigenvalue"].said.endswith("over texts (beyond first order)")
    assert sharpness_rows.rate_interval(stored) == ""
    table = curvature_rows.eigenvalues(found.summary, stored)
    assert "95 % interval" not in table.headers
    assert all("beyond first order" in row[-1] for row in table.rows)
    assert "beyond first order" in found.rows["smallest eigenvalue"].note


@pytest.mark.parametrize("name", COMMANDS)
def test_one_sequence_has_no_errors_over_texts_and_is_told_how_to_be_more(name, models, lines, tmp_path, capsys):
    more = ["--no-blocks"] if name == "curvature" else ["--samples", "1"]
    called(name, models, lines, tmp_path / "one", *more)
    printed = capsys.readouterr().out
    shown = visible(next((tmp_path / "one").glob("*.html")).read_text(encoding="utf-8"))
    for said in (printed, shown):
        assert not re.search(r"\bnan\b", said)
        assert "over texts  " not in said
        assert len(re.findall("--unit line", said)) == 1
    if name == "directional":
        called(name, models, lines, tmp_path / "many", "--unit", "line")
        printed = capsys.readouterr().out
        assert "--unit line" not in printed
        assert "over texts  " in printed


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["--unit", "line", "--num-samples", "1"], "--num-samples"),
        (["--packing", "--num-samples", "9"], "--max-seq-length"),
    ],
)
def test_the_remedy_for_one_sequence_is_one_that_helps(words, remedy, models, tmp_path, capsys):
    path = tmp_path / "few.txt"
    path.write_text("\n".join(TEXTS[:5]))
    called("directional", models, path, tmp_path / "out", *words)
    printed = " ".join(capsys.readouterr().out.split())
    assert remedy in printed.split("gpt2:")[0]
    assert "--unit line" not in printed


def test_check_says_that_one_sequence_compares_no_other(models, lines, capsys):
    assert cli.main(["check", str(models[0]), "--data", str(lines), "--directions", "2"]) == 0
    printed = capsys.readouterr().out
    assert "--unit line" in printed
    assert not re.search(r"\bnan\b", printed)
    (alone,) = [line for line in printed.splitlines() if line.startswith("a sequence alone")]
    assert alone.split()[-5:] == ["undecided", "there", "is", "one", "sequence"]


@pytest.mark.parametrize("name", ["curvature", "compare"])
def test_a_narrow_terminal_wraps_tables_and_notes(name, made, capsys):
    printed, page = made(name, capsys)
    stored = load(page.with_suffix(".npz"))
    if name == "curvature":
        narrow = curvature_table.text(Curvature(stored).summary, stored, width=60)
    else:
        narrow = directional_rows.text(stored.meta, width=60)
    assert max(map(len, narrow.splitlines())) <= 60
    assert max(map(len, printed.splitlines())) > 100  # the output of the tests goes to no terminal
    assert sorted(set(re.findall(r"\d[\d.e-]+", narrow))) == sorted(set(re.findall(r"\d[\d.e-]+", _cut(printed))))
    assert "\x1b" not in printed
    printed.encode("latin-1")  # a terminal without UTF-8 shows ± and ², and no more


def _cut(printed):
    """Without what is scored, the seconds and the files."""
    return re.sub(r"\n\d+ s$", "", printed.split("\n\n", 1)[1].split("\npage ")[0])


def test_the_width_of_the_terminal_is_that_of_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "47")
    assert listing.terminal_width() == 47
