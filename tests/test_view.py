"""Pages of any study: every number is in its table, every name is escaped, what failed says why, nothing is loaded."""

import html
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser

import numpy as np
import plotly.graph_objects as go
import pytest
import results as made
import torch

import funcscope as fs
from funcscope.core.estimate import Estimate
from funcscope.core.result import Result, derived, quantity
from funcscope.core.store import to_json
from funcscope.study import analyze, listing
from funcscope.study.cache import Outcome
from funcscope.study.catalogue import CATALOGUE
from funcscope.study.config import UnifiedConfig
from funcscope.study.results import Results
from funcscope.study.trajectories import TrainingCurves
from funcscope.view import demo, page, report, section, show, story
from funcscope.view.numbers import number, typeset
from funcscope.view.page import Chart, Quote, Section, Table

HOSTILE = "<b>x</b>|`y`*z*&amp;</script><img src=http://a.b>"
FILES = sorted(made.EXAMPLES)


def outcome(result=None, metric="mean_loss", subject="model", step=None, group="", **more):
    status = {"status": "failed", "error": "no luck", "error_type": "builtins.ValueError"} if result is None else {}
    more = {"task": "data", "unit": "nats", "status": "ok", "group": group or subject, **status, **more}
    return Outcome(metric, subject, step, result=result, **more)


class Reader(HTMLParser):
    """Texts, and what a browser would load."""

    def __init__(self, text):
        super().__init__()
        self.texts, self.loads, self.tags, self.inside, self.is_word = [], [], [], None, False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.is_word = tag == "wbr"
        self.inside = tag if tag in ("script", "style") else None
        self.loads += [value for name, value in attrs if name in ("src", "href", "data", "poster", "action", "srcset")]

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside is None:  # a name in pieces is one name
            self.texts += [self.texts.pop() + data] if self.is_word else [data]
            self.is_word = False

    @property
    def visible(self):
        return " ".join(" ".join(self.texts).replace("\u00a0", " ").split())


def written(results, path, **options):
    return report.write_report(Results(tuple(results)), path, **options).path.read_text(encoding="utf-8")


def cells(outcomes):
    """All cells of the tables of a section, with the captions of what could not be shown."""
    blocks = section.section(outcomes).blocks
    assert not [b for b in blocks if isinstance(b, Quote) and "could not be shown" in b.source]
    tables = [block for block in blocks if isinstance(block, Table)]
    assert all(len(row) == len(table.headers) for table in tables for row in table.rows)
    return [cell for table in tables for row in table.rows for cell in row]


@pytest.fixture(autouse=True)
def _short_script(request, monkeypatch):
    """plotly.js is five megabytes: one test has it."""
    if "forbids_it" not in request.node.name:
        monkeypatch.setattr(page, "get_plotlyjs", lambda: "")


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_every_number_that_tables_show_is_in_a_table_of_its_section(name):
    result = made.example(name)
    one = outcome(result)
    there = cells([one])
    for entry in result.entries():
        per = entry.quantity.per
        if entry.quantity.shown and per in ((), ("bound",)):
            assert section.label(entry) in there
            whole = section.said(one)[entry.name]
            assert whole in there or whole.partition(":")[0].partition(";")[0] in there
        elif entry.quantity.shown and len(per) == 1 and 0 < len(result.coords.get(per[0], ())) <= 40:
            ends = [end for cell in there for end in cell.split(" to ")]  # low and high are one interval
            assert set(section.cells(entry)) <= {*there, *ends}
            assert set(map(str, result.coords[per[0]])) <= set(there)
    for text in result.texts.values():  # none is lost: what has no room in a cell is a note
        notes = [block.text for block in section.section([one]).blocks if isinstance(block, Quote)]
        assert any(typeset(text) in each for each in [*there, *notes]) or name in ("SpectralDensity", "SpectrumSummary")


@pytest.mark.parametrize("name", FILES)
def test_every_result_has_a_page_and_its_notes_are_on_it(name, tmp_path):
    result = made.example(name)
    shown = Reader(written([outcome(result)], tmp_path / "a.html")).visible
    for note in result.notes:
        text, page_text = (re.sub(r"[`\s]", "", each) for each in (typeset(note), shown))
        assert text in page_text
    assert not re.search(r"\bnan\b", shown.replace("infinite or nan", ""))
    assert name not in shown or name in "Estimate Difference Pairs Comparison Truncation Audit Crossed".split()


class Open(Result):
    """Numbers with holes."""

    size: Estimate = quantity("size", unit="loss")
    hole: float = quantity("hole")
    parts: torch.Tensor = quantity("part", per="block")

    @property
    def coords(self):
        return {"block": [HOSTILE, "b"]}

    @property
    def unresolved(self):
        return ["size"] if float(self.size.stderr) > float(self.size.value) else []

    @property
    def notes(self):
        return [f"{HOSTILE}: the size is not told from 0."]


def opened(value=1.0, stderr=0.1):
    size = Estimate(torch.tensor(value), torch.tensor(stderr), 4)
    return Open(size, float("nan"), torch.tensor([1.0, float("nan")]))


def test_holes_stay_holes_and_what_is_not_resolved_has_no_number(tmp_path):
    there = cells([outcome(opened())])
    assert there[there.index("hole") + 1] == "undefined"
    assert there[there.index(HOSTILE) + 1 :: 2][:2] == [number(1.0, 4), "undefined"]
    assert "1.00 ± 0.10" in there
    there = cells([outcome(opened(0.123, 3.0))])
    assert there[there.index("size") + 1] == "not resolved"
    text = Reader(written([outcome(opened(0.123, 3.0), "mine")], tmp_path / "a.html")).visible
    assert "0.123" not in text
    assert "What is not resolved mine size model" in text.replace("metric number of reason ", "")


@pytest.mark.parametrize("ending", ["html", "md"])
def test_names_texts_and_errors_are_escaped(ending, tmp_path):
    many = [outcome(opened(), HOSTILE, f"{HOSTILE}/{i}", settings={"a": HOSTILE}, task=HOSTILE) for i in range(3)]
    many.append(outcome(None, HOSTILE, HOSTILE, error=f"{HOSTILE}\nand"))
    text = written(many, tmp_path / f"a.{ending}", title=HOSTILE)
    if ending == "html":
        tags = Reader(text).tags
        assert not {"b", "img", "i"} & set(tags)
        assert tags.count("script") <= 1 + 3 * tags.count("figure")
        assert "<b>x</b>|y*z*&amp;</script><img src=http://a.b>" in Reader(text).visible.replace(" y ", "y")
        return
    text = re.sub(r"^    .*\n?", "", text, flags=re.MULTILINE)  # code is shown as it is
    assert not re.search(r"<(b|img|/)", text)
    assert not re.search(r"(?<!\\)\*z", text)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert tables
    for table in tables:  # a bar in a name is no border
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_a_page_loads_nothing_and_forbids_it(tmp_path):
    every = [outcome(made.example(name), name.lower()) for name in FILES[::4]]
    text = written(every, tmp_path / "a.html")
    assert [link for link in Reader(text).loads if not link.startswith("#section-")] == []
    assert "default-src 'none'" in text
    assert text.count("plotly.js v") == 1
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert not re.search(r"url\(|@import", style)
    titles = re.findall(r'<section id="(section-\d+)">', text)
    assert [f"#{title}" for title in titles] == Reader(text).loads


def test_what_failed_says_why_and_a_study_of_failures_has_a_page(tmp_path):
    ok, bad = outcome(opened(), "mine", "a"), outcome(None, "mine", "b", error="the <net> is gone")
    shown = Reader(written([ok, bad], tmp_path / "a.html")).visible
    assert "ValueError: the <net> is gone" in shown
    assert "1 of 2 have no result" in shown
    assert "ValueError: no luck" in Reader(written([outcome(None)], tmp_path / "b.html")).visible
    with pytest.raises(ValueError, match="nothing to report"):
        written([], tmp_path / "c.html")


def test_a_part_that_cannot_be_made_is_shown_as_what_it_is(tmp_path):
    class Broken(Result):
        size: float = quantity("size")

        @derived("wrong")
        def wrong(self) -> float:
            raise ZeroDivisionError("no <wrong>")

    text = Reader(written([outcome(Broken(1.0), "mine", settings={"num": 3})], tmp_path / "a.html")).visible
    assert "ZeroDivisionError: no <wrong>" in text
    assert "num 3" in text


def test_what_it_takes_to_make_it_again_is_on_the_page(tmp_path):
    about = {"settings": {"num": 2}, "plan": {"chunk": 7}, "cost": {"forwards": 1234.0, "seconds": 3.0}}
    content = {"seed": 5, "packages": {"torch": "9.9"}, "weights": ""}
    one = outcome(made.example("TraceEstimate"), "hessian_trace", content=content, **about)
    config = asdict(UnifiedConfig(metrics=("hessian_trace",), dataset_name="<my>.jsonl"))
    typed = {"config": config, "models": ["a/b"], "command": "funcscope analyze a/b --data '<my>.jsonl'"}
    python = {**typed, "command": ""}
    for known, parts in (
        ({}, ["Options(seed=5)", "metric('hessian_trace').configured(num=2),"]),
        (typed, [typed["command"], "Data"]),
        (
            python,
            ["analyze_models( ['a/b'], UnifiedConfig( dataset_name='<my>.jsonl', metrics=['hessian_trace'], ), )"],
        ),
    ):
        Results((one,), known).save(tmp_path)
        assert Results.open(tmp_path).about == to_json(known)
        for ending in ("html", "md"):
            page_of = report.write_report(Results((one,), known), tmp_path / f"a.{ending}")
            text = html.unescape(
                Reader(page_of.path.read_text()).visible if ending == "html" else page_of.path.read_text()
            )
            for part in (*parts, "num 2", "chunk 7", "1,234 forward passes of a batch", "3 s", "torch 9.9"):
                assert part in " ".join(text.replace("\u200b", "").split())


@pytest.mark.parametrize(
    ("cost", "said"),
    [
        ({"forwards": 1.0, "products": 1.0}, "1 forward pass of a batch, 1 product of a matrix and a vector, 1 s"),
        ({"forwards": 0.0}, "0 forward passes of a batch, 1 s"),
        ({"forwards": 0.0, "products": 7.0}, "7 products of a matrix and a vector, 1 s"),
    ],
)
def test_what_a_metric_cost_is_said_in_words(cost, said):
    terms = dict(section.methods([outcome(made.example("TraceEstimate"), cost=cost)]).items)
    assert terms["Cost"] == [said]


def test_a_command_is_known_where_it_is_ours(monkeypatch):
    for program, line in (
        ("/bin/funcscope", "funcscope x 'a b'"),
        ("/x/funcscope/__main__.py", "funcscope x 'a b'"),
        ("my.py", ""),
    ):
        monkeypatch.setattr("sys.argv", [program, "x", "a b"])
        assert analyze._command() == line


def test_metrics_are_chosen_by_name_and_another_ending_is_refused(tmp_path):
    two = [outcome(opened(), "one"), outcome(made.example("MeanLoss"), "two")]
    assert "<h2>One</h2>" not in written(two, tmp_path / "a.html", metrics=["two"])
    with pytest.raises(ValueError, match="no metric 'three': it has one, two"):
        written(two, tmp_path / "a.html", metrics=["three"])
    with pytest.raises(ValueError, match=r"a.pdf"):
        written(two, tmp_path / "a.pdf")


def test_every_figure_of_a_report_is_a_file_where_it_is_asked_for(tmp_path):
    many = [outcome(made.example("Flatness"), "landscape_flatness", f"m{i}") for i in range(2)]
    written(many, tmp_path / "a.md")
    assert [path.name for path in tmp_path.iterdir()] == ["a.md"]
    paths = report.save_plots(Results(tuple(many)), tmp_path / "plots")
    assert [path.name for path in paths] == [f"{chart.name}.html" for chart in section.panel(many)]
    assert len(set(paths)) == len(paths) > 0
    text = (tmp_path / "a.md").read_text()
    assert all(f"Figure {path.stem}:" in text for path in paths)
    with pytest.raises(ValueError, match="gif"):
        report.save_plots(Results(tuple(many)), tmp_path, ending="gif")


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["/tmp/a/m", "/tmp/b/m"], ["a/m", "b/m"]),
        (["/tmp/a/m"], ["m"]),
        (["runs/x/one", "runs/x/two"], ["one", "two"]),
        (["/tmp/a/m", "m"], ["/tmp/a/m", "m"]),
        (["/a", "/b", "gpt2"], ["/a", "/b", "gpt2"]),
        (["/x/a", "y/b"], ["/x/a", "y/b"]),
        (["p-0123abcd@1", "q-0123abcd@1"], ["p@1", "q@1"]),
        (["p-0123abcd@1", "p-4567abcd@1"], ["p-0123abcd@1", "p-4567abcd@1"]),
    ],
)
def test_paths_are_shortened_to_what_differs(names, short):
    split = [name.partition("@") for name in names]
    many = [outcome(opened(), "mean_loss", f"{g}{at}{s}", int(s) if s else None, g) for g, at, s in split]
    pair = outcome(made.example("LossPath"), "linear_path", " to ".join(names), group=names[0])
    got = report.with_short_names(Results((*many, pair))).outcomes
    assert [one.subject for one in got] == [*short, " to ".join(short)]
    assert got[-1].group == short[0]


def test_steps_of_a_run_are_called_by_their_steps_and_columns_by_models():
    run = [outcome(opened(), subject=f"p@{step}", step=step, group="p") for step in range(9)]
    assert [one.subject for one in report.with_short_names(Results(tuple(run))).outcomes] == [
        f"step {i}" for i in range(9)
    ]
    assert next(iter(section.tables(run))).headers == ["", "step 0", "step 8", "unit"]
    models = [outcome(opened(), subject=f"m{i}") for i in range(8)]
    first, second, _ = section.tables(models)
    assert [*first.headers[1:-1], *second.headers[1:-1]] == [one.subject for one in models]
    two_runs = [replace(one, group=group, subject=f"{group}@{one.step}") for group in "ab" for one in run]
    assert next(iter(section.tables(two_runs))).headers[1:-1] == ["a@0", "a@8", "b@0", "b@8"]


def test_the_table_of_a_study_has_the_main_number_of_every_metric():
    few = [outcome(made.example("MeanLoss"), subject=name) for name in "ab"] + [outcome(None, subject="c")]
    got = section.table(Results(tuple(few)))
    loss = made.example("MeanLoss").loss
    text = section.said(few[0], units=True)["loss"]
    assert got.rows[0][2:] == [text.removesuffix(" nats"), text.removesuffix(" nats"), "failed"]
    assert f"{float(loss.value):.3f}" in text
    assert [*section.table(Results(tuple(few)), rows=True).rows[2]] == ["c", "failed"]


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_sentences_name_quantities_or_settings(name):
    one = CATALOGUE[name]
    assert not re.search(r"(?i)\bsee\b", one.summary)  # a page has no such place
    for word in re.findall(r"{(\w+)}", one.sentence):
        assert word in one.settings or re.fullmatch(r"[a-z]\w*", word)
    assert one.summary


def test_what_a_notebook_shows_needs_no_file():
    one = outcome(opened(), subject="<i>")
    for shown in (
        section.methods([one]),
        *section.tables([one]),
        section.section([one]),
        report.table(Results((one,))),
    ):
        text = shown._repr_html_()
        assert "<i>" not in text
        assert text.strip()
    fig = go.Figure(go.Scatter(y=[1.0], name="</script><script>alert(1)"))
    text = page.render("", "", [], [], [Section("<u>", [Chart(fig, "<s>")])])
    assert not re.search(r"<[us]>|</script><script>alert", text)


def test_a_study_and_a_file_are_shown_and_what_is_not_there_is_refused(tmp_path):
    made.example("MeanLoss").save(tmp_path / "a.npz")
    assert section.said(outcome(made.example("MeanLoss")), units=True)["loss"].removesuffix(" nats") in show(
        tmp_path / "a.npz"
    ).path.read_text().replace("\u00a0", " ")
    Results((outcome(None, subject="<i>"),)).save(tmp_path, {})
    for path in (tmp_path, tmp_path / "study.json"):
        assert "&lt;i&gt;" in show(path).path.read_text()
    with pytest.raises(FileNotFoundError, match="study"):
        show(tmp_path.parent)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        show("nowhere.npz")


def run_of(accuracy=(0.1, 1.0, 1.0), test=(0.1, 0.2, 1.0), values=((3.0, 0.1), (1.0, 0.1), (0.5, 0.1)), curves=True):
    """A training run of three checkpoints, its curves and a loss at every step."""

    class Loss(Result):
        loss: Estimate = quantity("loss", unit="loss")

    steps = [0, 500, 1000]
    sizes = [None if v is None else Loss(Estimate(torch.tensor(v[0]), torch.tensor(v[1]), 9)) for v in values]
    each = [outcome(x, "mean_loss", f"p@{s}", s, "p") for s, x in zip(steps, sizes, strict=True)]
    columns = [torch.tensor(c, dtype=torch.float64) for c in ((2.0, 1.0, 0.1), (2.0, 3.0, 0.2), accuracy, test)]
    series = outcome(TrainingCurves(*columns, steps=steps), "training_curves", "p", group="p")
    return Results((*each, *([series] if curves else [])))


@pytest.mark.parametrize(
    ("accuracy", "test", "words"),
    [
        ((0.1, 1.0, 1.0), (0.1, 0.2, 1.0), ["Memorised first", "step 500", "step 1,000"]),
        ((0.1, 1.0, 1.0), (0.1, 0.2, 0.3), ["did not generalise", "0.300 at best"]),
        ((0.1, 0.2, 0.3), (0.1, 0.2, 0.3), ["Neither", "0.300 at best"]),
        ((0.1, 1.0, 1.0), (0.1, 1.0, 1.0), ["together", "step 500"]),
    ],
)
def test_the_story_is_that_of_the_curves(accuracy, test, words, tmp_path):
    shown = Reader(demo.write_page(run_of(accuracy, test), tmp_path / "a.html").path.read_text()).visible
    assert all(word in shown for word in words)
    tale = story.Story(run_of(accuracy, test))
    curves = section.section([o for o in tale.results.outcomes if o.metric == "training_curves"])
    demo._mark_phases(curves, tale)
    lines = {shape.name: shape.x0**2 for b in curves.blocks if isinstance(b, Chart) for shape in b.figure.layout.shapes}
    steps = {name: tale.passed(split) for name, split in demo.PHASES.items()}
    assert lines == pytest.approx({name: step for name, step in steps.items() if step is not None})
    assert shown.index("Training curves") < shown.index("Mean loss") < shown.index("All checkpoints")


@pytest.mark.parametrize(
    ("values", "verb"),
    [
        (((3.0, 0.1), (1.0, 0.1), (0.5, 0.1)), "falls from 1.00 ± 0.10 nats to 0.50 ± 0.10 nats"),
        (((3.0, 0.1), (1.0, 0.1), (1.5, 0.1)), "rises from 1.00 ± 0.10 nats to 1.50 ± 0.10 nats"),
        (((3.0, 0.1), (1.0, 0.3), (0.5, 0.3)), "the change is not resolved"),
        (((3.0, 0.1), (1.0, 0.1), (float("nan"), 0.1)), "the change is not resolved"),
        (((3.0, 0.1), None, (0.5, 0.1)), "no change is told"),
    ],
)
def test_a_change_is_told_with_both_errors_where_they_resolve_it(values, verb):
    assert verb in story.sentence(story.Story(run_of(values=values)), "mean_loss")


def test_a_story_needs_a_run_but_no_curves(tmp_path):
    results = run_of(curves=False)
    assert demo.write_page(results, tmp_path / "a.html").path.is_file()
    rows = story.checkpoints(story.Story(run_of())).rows
    assert [row[:3] for row in rows] == [
        ["step 0", "2.00", "2.00"],
        ["step 500", "1.00", "3.00"],
        ["step 1,000", "0.100", "0.200"],
    ]
    with pytest.raises(ValueError, match="no training run"):
        demo.write_page(Results((outcome(opened()),)), tmp_path / "b.html")


def test_every_number_of_the_story_has_its_error():
    directional, at = made.example("DirectionalLosses"), {"step": 500, "group": "p"}
    both = [outcome(directional, "directional_losses", f"p@{s}", **{**at, "step": s}) for s in (0, 500, 1000)]
    tale = story.Story(Results((*run_of().outcomes, *both)))
    text = story.sentence(tale, "directional_losses")
    assert ("±" in text) or "not resolved" in text
    assert np.isfinite(float(directional.curvature_mean.value))
    assert fs.landscape is not None


def test_the_width_of_the_terminal_is_that_of_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "47")
    assert listing.terminal_width() == 47


def test_settings_are_words_and_lists_have_commas():
    settings = {"methods": ["lanczos", "diagonal"], "sizes": (1, 2.5), "fold": True, "num_draws": 3, "at": None}
    terms = dict(section.methods([outcome(opened(), settings=settings)]).items)
    assert terms["Settings"] == ["methods lanczos, diagonal; sizes 1, 2.5; fold yes; num draws 3"]


def test_captions_of_conflicts_name_a_number():
    (drawn,) = section.panel([outcome(made.example("TaskConflicts"), "cross_task_conflicts", "g on a and b")])
    assert drawn.caption == "The q value of conflict per block of g on a and b."
