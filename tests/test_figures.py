"""Laws of the figures of quantities: over every result of the package, and over what studies make of the catalogue."""

import copy
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import seeded
from results import EXAMPLES, example

import funcscope as fs
from funcscope.core.estimate import Estimate
from funcscope.core.result import Result, quantity
from funcscope.study import cache
from funcscope.study.catalogue import CATALOGUE
from funcscope.view import curves, section
from funcscope.view.instruments import CUSTOM
from funcscope.view.names import apart, labels, plain
from funcscope.view.quantities import drawable, figures, limits_of
from funcscope.view.samples import distribution, thinned

HOSTILE = "<b>m</b> & $y$"
every = pytest.mark.parametrize("name", EXAMPLES)
NAN = float("nan")


def outcome(result, subject="model", step=None, **more):
    return cache.Outcome("metric", subject, step, "train", "ok", result, unit="nats", **more)


class Plain(Result):
    """Of every kind of axes."""

    single: Estimate = quantity("single", unit="loss")
    sample: torch.Tensor = quantity("sample", unit="loss", per="direction")
    along: torch.Tensor = quantity("along", unit="loss", per="step", stderr="errors")
    errors: torch.Tensor = quantity("its standard error", unit="loss", per="step", shown=False)
    named: torch.Tensor = quantity("named", unit="loss", per="block")
    matrix: torch.Tensor = quantity("matrix", unit="loss", per=("layer", "head"))
    lines: torch.Tensor = quantity("lines", unit="loss", per=("block", "t"))
    grid: torch.Tensor = quantity("grid", unit="loss", per=("x", "y"))
    blocks: list[str]

    @property
    def coords(self):
        return {"block": self.blocks, "step": [0, 10, 20], "t": [0.0, 0.5], "x": [-1.0, 0.0, 1.0], "y": [-1.0, 1.0]}


def made(scale=1.0, blocks=("a", "b")):
    x = torch.arange(6.0).reshape(3, 2) + 1
    column = scale * x[:, 0]
    return Plain(
        Estimate(torch.tensor(float(scale)), torch.tensor(0.1), 5), column, column, 0.1 * column, scale * x[0],
        scale * x, scale * x[:2], scale * x, list(blocks),
    )  # fmt: skip


def drawn_of(result, **more):
    return list(figures([outcome(result, **more)]))


def axes(fig):
    return [axis for axis in (*fig.select_xaxes(), *fig.select_yaxes()) if axis.visible is not False]


def texts(fig):
    """What is shown: every text of the figure, hovers and names included, without its own line breaks and small print."""
    seen = json.dumps(fig.to_plotly_json(), default=lambda x: np.asarray(x).tolist(), ensure_ascii=False)
    return re.sub(r"<br>|</?extra>|<span style[^>]*>|</span>", " ", seen)


@every
def test_every_shown_quantity_is_in_a_figure_or_a_table_and_its_axes_say_the_unit(name):
    result = example(name)
    table = result.table()
    for entry in result.entries():
        if entry.quantity.per == ("bound",) or entry.name in result.unresolved:
            continue  # an interval, which its value has as its error, or what is counted and not drawn
        if entry.quantity.shown and entry.quantity.per and CUSTOM.get((name, entry.name), 0) is not None:
            assert entry.name in table or list(figures([outcome(result)], [entry.name])), entry.name
    for each in drawn_of(result):
        assert each.figure.layout.title.text
        assert each.caption
        assert each.figure.layout.height
        assert not axes(each.figure) or any(axis.title.text for axis in axes(each.figure))  # a text has none


@pytest.mark.slow
@every
def test_figures_are_the_same_twice_and_leave_the_result_as_it_was(name):
    result = example(name)
    before = copy.deepcopy(result.asdict())
    first, second = ([each.figure.to_json() for each in drawn_of(result)] for _ in range(2))
    assert first == second
    for key, value in result.asdict().items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(before[key]))


@pytest.mark.slow
@every
def test_names_of_models_stay_text_in_every_figure(name):
    result = example(name)
    for outcomes in ([outcome(result, HOSTILE)], [outcome(result, HOSTILE), outcome(result, HOSTILE + "2")]):
        for each in figures(outcomes):
            assert not re.search(r"<b>|\$y\$", texts(each.figure)), each.caption


def test_names_along_axes_stay_text():
    for each in drawn_of(made(blocks=(HOSTILE, HOSTILE + "2"))):
        assert not re.search(r"<b>|\$y\$", texts(each.figure)), each.caption


@pytest.mark.parametrize("per", ["sample", "along", "named", "matrix", "lines", "grid"])
def test_the_values_stand_in_the_figure_and_holes_are_holes_that_are_counted(per):
    whole, holed = made(), made()
    value = getattr(holed, per)
    value.view(-1)[1] = NAN
    (one,), (other,) = (list(figures([outcome(result)], [per])) for result in (whole, holed))
    assert "1 of" not in one.caption
    assert f"1 of {value.numel()}" in other.caption
    there, gone = (np.concatenate([_values(t) for t in each.figure.data]) for each in (one, other))
    assert set(np.ravel(getattr(whole, per)).tolist()) <= set(there.tolist())
    assert 2.0 not in gone[np.isfinite(gone)] or per == "sample"
    assert not any(trace.connectgaps for trace in other.figure.data if "connectgaps" in trace)


def _values(trace):
    raw = (
        [trace.customdata, trace.z]
        if trace.type in ("contour", "heatmap")
        else [trace.y if trace.type == "scatter" else trace.x, trace.x]
    )
    return np.concatenate(
        [np.ravel(np.asarray(each, dtype=float)) for each in raw if each is not None] or [np.empty(0)]
    )


def test_units_stand_on_the_axes_of_every_kind_of_figure():
    outcomes = [outcome(made(1.0 + step), step=step) for step in range(3)]
    for each in [*drawn_of(made()), *figures(outcomes)]:
        told = " ".join(str(axis.title.text) for axis in axes(each.figure))
        told += " ".join(str(t.colorbar.title.text) for t in each.figure.data if t.type in ("heatmap", "contour"))
        assert "nats" in told, each.caption


def test_a_number_over_steps_is_a_trajectory_with_its_interval_per_run():
    runs = [outcome(made(1.0 + step), f"{run}@{step}", step, group=run) for run in ("a", "b") for step in (0, 10, 40)]
    (each,) = figures(runs, ["single"], current=10)
    lines = [t for t in each.figure.data if t.mode == "lines+markers"]
    assert [t.name for t in lines] == ["a", "b"]
    assert [t.customdata.tolist() for t in lines] == [[0, 10, 40]] * 2
    np.testing.assert_array_equal(lines[0].y, [1.0, 11.0, 41.0])
    assert [shape.x0 for shape in each.figure.layout.shapes if shape.name == "current step"] == [10**0.5]
    (points,) = figures([replace(one, step=None) for one in runs[:3]], ["single"])
    np.testing.assert_array_equal(points.figure.data[0].x, [1.0, 11.0, 41.0])


def test_what_has_names_is_a_line_each_over_many_steps():
    runs = [outcome(made(1.0 + step), step=step) for step in range(6)]
    (each,) = figures(runs, ["named"])
    assert [t.name for t in each.figure.data] == ["a", "b"]
    np.testing.assert_array_equal(each.figure.data[1].y, 2.0 * (1.0 + np.arange(6)))


def test_a_unit_is_equally_long_on_both_axes_of_a_plane_and_colours_stay_over_steps():
    outcomes = [outcome(made(10.0**k), step=k) for k in range(3)]
    limits = limits_of(outcomes, "grid")
    assert limits == (1.0, 600.0)
    scales = set()
    for one in outcomes:
        (each,) = figures([one], ["grid"], limits={"grid": limits})
        found = each.figure.data[0]
        np.testing.assert_array_equal(found.customdata, one.result.grid.numpy().T)
        scales.add((found.zmin, found.zmax, each.figure.layout.yaxis.scaleanchor))
    assert scales == {(0.0, np.log10(600.0), "x")}


def test_two_models_along_the_same_directions_are_drawn_against_each_other():
    result = example("DirectionalLosses")
    pair = [outcome(result, "a"), outcome(result, "b")]
    assert [len(list(figures(pair, [name]))) for name in ("curvatures", "delta_losses")] == [2, 2]
    other = fs.DirectionalLosses(**{f: getattr(result, f) for f in result.__dataclass_fields__} | {"key": fs.key(9)})
    assert len(list(figures([pair[0], outcome(other, "b")], ["curvatures"]))) == 1


def test_slopes_have_both_sides_on_the_line_that_they_predict():
    result = example("DirectionalLosses")
    (each,) = figures([outcome(result)], ["slopes"])
    line, plus, minus = each.figure.data
    assert (plus.name, minus.name) == ("+d", "−d")
    np.testing.assert_allclose(plus.x, -np.asarray(minus.x))
    np.testing.assert_allclose(minus.y, result.losses_negative - result.baseline_loss)
    assert line.y[1] / line.x[1] == pytest.approx(result.actual_span)


def test_a_row_that_would_be_empty_has_a_scale_of_its_own_and_the_figure_says_it():
    wide, narrow = np.linspace(0, 1, 9), 0.001 * np.linspace(0, 1, 9)
    fig, notes = distribution({"a": wide, "b": narrow}, name="x", unit="nats", axis="direction")
    assert "every row has a scale of its own" in notes
    assert fig.layout.xaxis2.range[1] < 0.01
    fig, notes = distribution({"a": wide, "b": 0.5 * wide}, name="x", unit="nats", axis="direction")
    assert not notes
    assert fig.layout.xaxis.range == fig.layout.xaxis2.range


def test_a_sample_far_off_stands_at_the_edge_and_is_counted():
    fig, notes = distribution({"a": np.append(np.linspace(0, 1, 40), 1e6)}, name="x", unit="", axis="direction")
    assert notes == ["1 beyond the axis stand at its edge"]
    assert fig.layout.xaxis.range[1] < 2
    (far,) = [t for t in fig.data if t.name == "beyond the axis"]
    assert far.text == ("1e+06",)
    many, said = distribution({"a": np.arange(5000.0)}, name="x", unit="", axis="parameter")
    assert "1,500 of 5,000" in said[0]
    assert np.isfinite(thinned(np.arange(5000.0))).sum() == len(many.data[0].x) == 1500


def test_a_value_that_is_not_resolved_is_a_hole_and_counted():
    class Open(Plain):
        @property
        def unresolved(self):
            return ["single"]

    values = {f: getattr(made(), f) for f in Plain.__dataclass_fields__}
    runs = [outcome(made(), step=0), outcome(made(), step=1), outcome(Open(**values), step=2)]
    (each,) = figures(runs, ["single"])
    assert "1 of 3 values not resolved" in each.caption
    assert "not finite" not in each.caption


@pytest.mark.parametrize("name", CATALOGUE)
def test_what_a_metric_draws_are_names_of_quantities(name):
    known = {key for each in EXAMPLES for key in (e.name for e in example(each).entries())}
    known |= {key for _, key in CUSTOM}
    assert set(CATALOGUE[name].drawn) <= known


def test_full_paths_are_as_short_as_they_can_be_told_apart():
    assert apart(["/x/run/a/last", "/x/run/b/last"]) == ["a/last", "b/last"]
    assert apart(["/x/a to /x/b"]) == ["a to b"]
    assert apart(["org/name", "gpt2"]) == ["org/name", "gpt2"]
    assert labels(["model.a", "model.b"]) == ["a", "b"]
    assert plain("a<b $c$") == "a&lt;b &#36;c&#36;"
    shown = [each.figure for each in figures([outcome(made(k), f"/data/{k}/last") for k in (1, 2)], ["single"])]
    assert shown[0].layout.yaxis.ticktext == ("1/last", "2/last")


def test_errors_and_places_have_no_figures_of_their_own():
    assert list(drawable(made())) == ["single", "sample", "along", "named", "matrix", "lines", "grid"]
    names = list(drawable(example("LossPlane")))
    assert "grid_stderr" not in names
    assert "axis_values" not in names


class Layered(Result):
    """Along numbered layers, over pairs of names of which some have nothing, and by step."""

    kl: torch.Tensor = quantity("divergence", unit="nats", per="layer", stderr="errors")
    errors: torch.Tensor = quantity("its standard error", unit="nats", per="layer", shown=False)
    pairs: torch.Tensor = quantity("composition", per=("reader", "writer"))
    ranked: torch.Tensor = quantity("score", per="rank")
    names: list[str]

    @property
    def coords(self):
        return {"layer": range(len(self.kl)), "reader": ["a", "b", "c"], "writer": ["a", "b", "c"], "rank": self.names}


def layered(pairs=None, names=("x", "y")):
    pairs = torch.tensor([[NAN, NAN, NAN], [-1.0, NAN, NAN], [2.0, 0.5, NAN]]) if pairs is None else pairs
    return Layered(torch.tensor([2.0, 1.0, 0.0]), torch.full((3,), 0.1), pairs, torch.ones(2), list(names))


def test_what_is_per_numbered_layer_is_a_line_from_layer_0_on():
    (drawn,) = figures([outcome(layered())], ["kl"])
    (line,) = drawn.figure.data
    assert (line.mode, list(line.x), list(line.y)) == ("lines+markers", [0, 1, 2], [2.0, 1.0, 0.0])


def test_a_heat_map_leaves_out_what_has_nothing_and_zero_is_white_between_both_signs():
    (drawn,) = figures([outcome(layered())], ["pairs"])
    (heat,) = drawn.figure.data
    assert (list(heat.y), list(heat.x)) == (["b", "c"], ["a", "b"])
    np.testing.assert_array_equal(heat.z, [[-1.0, NAN], [2.0, 0.5]])
    assert "1 of 3 along reader and 1 of 3 along writer have none; 1 of 4 cells not finite" in drawn.caption
    assert (heat.zmin, heat.zmax, heat.colorscale[1][1]) == (-2.0, 2.0, "#ffffff")
    (drawn,) = figures([outcome(layered(torch.arange(1.0, 10.0).view(3, 3)))], ["pairs"])
    assert (drawn.figure.data[0].zmin, drawn.figure.data[0].zmax) == (1.0, 9.0)


def test_of_several_long_runs_the_last_of_each_is_drawn_and_names_are_those_of_the_last():
    steps = [(group, step) for group in ("p", "q") for step in (0, 10, 20)]
    many = [outcome(layered(names=(f"{g}{s}", "z")), f"{g}@{s}", s, group=g) for g, s in steps]
    titles = [each.figure.layout.title.text for each in figures(many, ["pairs"])]
    assert len(titles) == 2
    assert "p@20" in titles[0]
    assert "q@20" in titles[1]
    (drawn,) = figures(many, ["ranked"])
    assert list(drawn.figure.layout.yaxis.ticktext) == ["q20", "z"]
    assert len(drawn.figure.data) == 1


def test_values_that_are_not_told_from_zero_make_no_axis_logarithmic():
    x, value, half = np.arange(3.0), np.array([0.001, 1.0, 2.0]), np.array([0.01, 0.1, 0.1])
    for each, kind in ((half, "linear"), (half / 100, "log"), (np.full(3, NAN), "log")):
        fig, _ = curves.lines([curves.Line("", x, value, each)], name="gain", unit="nats", at="x")
        assert (fig.layout.yaxis.type or "linear") == kind


def test_only_names_without_spaces_lose_their_first_word():
    assert labels(["embed -> a0.0.v", "embed -> a0.1.v"]) == ["embed -> a0.0.v", "embed -> a0.1.v"]


def test_an_axis_leaves_zero_out_where_it_would_hide_what_differs():
    far, near = np.array([3.130, 3.144]), np.array([1.0, 3.0])
    each = [[curves.Line("a", np.array([0.0, 1.0]), values, values / 1e5)] for values in (far, near)]
    low, high = (curves.lines(one, name="loss", unit="nats", at="t")[0].layout.yaxis.range for one in each)
    assert low[0] > 3.1
    assert high[0] < 0 < high[1]
    bars, dots = (curves.bars(["x", "y"], one, name="loss", unit="nats") for one in (each[1], each[0]))
    assert (bars.data[0].type, dots.data[0].type) == ("bar", "scatter")
    assert bars.layout.xaxis.range[0] <= 0  # as a bar is as long as its value
    assert dots.layout.xaxis.range[0] > 3.1
    two = curves.bars(["x", "y"], [each[0][0], each[0][0]], name="loss", unit="nats")
    assert not set(two.data[0].y) & set(two.data[1].y)  # dots of two subjects do not lie on each other


def lines_of(base, scale):
    """Losses along two directions: base + scale t^2 (1 + i)."""
    rows = torch.tensor([[1.0, 2.0**0.5], [1.0, -(2.0**0.5)]]).double()
    bowl = fs.custom(lambda out, y: scale * out**2 + base + y)
    loss = fs.objective(
        fs.functional(seeded(0, lambda: torch.nn.Linear(2, 1, bias=False)).double()),
        [(rows, torch.zeros(2, 1).double())],
        bowl,
    )
    return fs.loss_lines(loss, torch.zeros(2).double(), torch.eye(2).double(), num=21, span=1.0)


def test_lines_show_changes_of_the_loss_and_the_loss_where_it_spreads_over_decades():
    flat, steep = (
        list(figures([outcome(lines_of(base, scale))], ["losses"])) for base, scale in ((3.0, 0.01), (1e-4, 1.0))
    )
    assert [len(flat), len(steep)] == [1, 1]
    change, loss = flat[0].figure, steep[0].figure
    assert change.layout.yaxis.title.text.startswith("change of the loss")
    assert change.layout.yaxis.type != "log"
    ends = np.ptp(np.concatenate([trace.y for trace in change.data if trace.name.startswith("d")]))
    assert np.ptp(change.layout.yaxis.range) < 5 * ends  # the intervals among them
    assert loss.layout.yaxis.type == "log"
    assert {each.layout.xaxis.title.text for each in (change, loss)} == {"coefficient of the direction"}
    assert "the loss at theta is 3.000" in flat[0].caption


def test_tables_of_a_plane_have_words_and_units():
    plane = outcome(example("LossPlane"))
    rows = [row for table in section.tables([plane]) for row in table.rows]
    assert not [row[0] for row in rows if "_" in row[0]]
    units = {row[0]: row[-1] for row in rows}
    assert units["mean of the losses"] == "nats"
    assert units["roughness: mean slope along the axes"] == "nats per coefficient"
