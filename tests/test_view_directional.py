"""The page of a model of one's own, and of two: numbers as stored, every finite sample drawn, text escaped."""

import html
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import loss_of
from scipy import stats
from test_view import check_loads_nothing

import funcscope as fs
from funcscope.core.store import load, save
from funcscope.landscape.compare import compare_directional
from funcscope.landscape.directional_result import DirectionalLosses, Plan
from funcscope.landscape.precision import Realised
from funcscope.view import comparison_sections, directional, directional_sections, page, samples, show, theme
from funcscope.view.numbers import number
from funcscope.view.pairing import Comparison
from funcscope.view.result import is_resolved, mark, read

NAN = math.nan
HOSTILE = "<script>alert(1)</script>"
REALISED = Realised(displacement=3.4, error=0.31, asymmetry=0.22, unmoved=0.41, loss_error=2e-3)


def made(num=12, seed=0, *, level=2.0, rise=0.1, scale=1.0, two_sided=True, slopes=True, bent=True, **changes):
    """A result with made-up samples: a quadratic loss with some noise, its statistics computed by the class itself."""
    rng, h = np.random.default_rng(seed), changes.get("actual_span", 0.1)
    slope, curved = scale * rng.normal(0, 0.3, num), scale * rng.normal(rise, 0.3 * abs(rise), num) * 2 / h**2
    cubic = scale * 0.01 * rng.normal(size=num)
    pos, neg = (torch.tensor(level + s * h * slope + h**2 / 2 * curved + s * cubic) for s in (1, -1))
    fields = {
        "baseline_loss": level, "losses": pos, "losses_negative": neg if two_sided else None,
        "slopes": torch.tensor(slope) if slopes else None, "exact_curvatures": None,
        "direction_norms": torch.full((num,), 30.0, dtype=torch.float64), "param_norm": 30.0, "span": h, "actual_span": h,
        "normalize": "filter", "distribution": "normal", "relative_span": False, "global_renorm": False,
        "compute_curvature": bent, "unit_roundoff": 2.0**-24, "homogeneous_dtype": True, "realised": None,
        "key": fs.key(42), "plan": Plan(False, 8, 1), "num_forwards": 2 + 2 * num, "num_gradients": 1, "num_jvps": 0,
        "num_second_jvps": 0,
    }  # fmt: skip
    return DirectionalLosses(**(fields | changes))


def stored(folder, *results, names=("base", "longer"), stem="run", task="causal"):
    """The results in the form of `study.directional.run`."""
    prefixes = ("",) if len(results) == 1 else ("first_", "second_")
    models, arrays = [], {}
    for result, name, prefix in zip(results, names, prefixes, strict=False):
        values = result.asdict()
        found = {key: x for key, x in values.items() if isinstance(x, np.ndarray)}
        arrays |= {f"{prefix}{key}": x for key, x in found.items()}
        half = "torch.bfloat16" if result.realised else "torch.float32"
        models.append({
            "name": name, "class": "Qwen2ForCausalLM", "num_parameters": 1234567, "dtype": half, "compute_dtype": half,
            "attention": "eager", "values": {key: x for key, x in values.items() if key not in found},
        })  # fmt: skip
    data = {"path": "<b>texts</b>.txt", "task": task, "num_samples": 32, "num_tokens": 3053, "num_scored": 3021}
    data |= {"num_too_short": 3, "num_truncated": 15, "num_batches": 4}
    settings = {"data": "<b>texts</b>.txt", "span": 0.1, "max_seq_length": 128, "packing": False, "task": None}
    meta = {
        "kind": "directional" if len(results) == 1 else "comparison", "settings": settings, "models": models,
        "data": data, "seconds": 12.3, "versions": {"torch": "2.13"},
    }  # fmt: skip
    if len(results) == 2:
        meta["comparison"] = compare_directional(*results, names=names).asdict()
    path = folder / f"{stem}.npz"
    save(path, arrays, meta)
    return path


def paired(folder, *results, **options):
    found = load(stored(folder, *results, **options))
    return Comparison(*read(found), found.meta["comparison"])


def written(path):
    """The text that a reader sees on the page of these numbers."""
    return visible(directional.write_page(path).read_text(encoding="utf-8"))


def visible(text):
    text = re.sub(r"<(script|style).*?</\1>", "", text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", text)))


def changed(path, change):
    """The same file after `change(meta, arrays)`."""
    found = load(path)
    arrays, meta = {name: np.array(x) for name, x in found.arrays.items()}, found.meta
    change(meta, arrays)
    save(path, arrays, meta)
    return path


def charts(section):
    return [block.figure for block in section.blocks if isinstance(block, page.Chart)]


def traces(fig, name):
    return [trace for trace in fig.data if trace.name is not None and trace.name.startswith(name)]


def lossy(result, *at):
    """The result with losses at + that are nan, and one that is infinite."""
    losses = result.losses.clone()
    losses[list(at)] = NAN
    losses[at[0]] = math.inf
    return replace(result, losses=losses)


# Figures hold the data


def test_every_finite_sample_is_a_dot_and_the_mean_has_its_interval():
    values = {"+": np.array([1.0, NAN, 3.0, 5.0]), "-": np.array([0.5, 0.25, np.inf, -0.5])}
    fig = samples.strips(
        values, {"+": mark(3.0, 0.5, 3), "-": samples.Mark(0.1, -0.2, 0.4)}, name="change", unit="nats"
    )
    dots = traces(fig, "a direction")
    assert [sorted(trace.x) for trace in dots] == [[1.0, 3.0, 5.0], [-0.5, 0.25, 0.5]]
    assert [list(trace.customdata) for trace in dots] == [[0, 2, 3], [0, 1, 3]]
    ends = [
        (trace.x[0] - trace.error_x.arrayminus[0], trace.x[0] + trace.error_x.array[0]) for trace in traces(fig, "mean")
    ]
    np.testing.assert_allclose(ends, [stats.t.interval(0.95, 2, 3.0, 0.5), (-0.2, 0.4)])
    assert [tuple(trace.x) for trace in traces(fig, "middle half")] == [(2.0, 4.0), (-0.125, 0.375)]
    assert fig.layout.xaxis.range[0] < -0.5 < 5.0 < fig.layout.xaxis.range[1]
    assert fig.layout.xaxis.title.text == "change (nats)"


def test_an_interval_is_that_of_student_and_tends_to_196_standard_errors():
    np.testing.assert_allclose(mark(2.0, 0.5, 3)[1:], stats.t.interval(0.95, 2, 2.0, 0.5))
    np.testing.assert_allclose(mark(2.0, 0.5, 10**6)[1:], (2 - 0.98, 2 + 0.98), rtol=1e-4)
    assert math.isnan(mark(2.0, NAN, 1).low)
    assert is_resolved(mark(2.0, 0.5, 50))
    assert not is_resolved(mark(2.0, 0.5, 3))  # four errors from zero, with two degrees of freedom
    assert not is_resolved(mark(2.0, NAN, 1))


def test_zero_is_on_the_axis_where_it_is_near_and_the_rounding_band_is_drawn():
    shown = {"": np.array([1.0, 2.0])}
    means = {"": samples.Mark(1.5, 1.2, 1.8)}
    fig = samples.strips(shown, means, name="c", unit="", band=1.1)
    band, zero = fig.layout.shapes
    assert (band.x0, band.x1) == (fig.layout.xaxis.range[0], 1.1)
    assert zero.x0 == zero.x1 == 0
    wide = samples.strips({"": np.array([-3.0, 2.0])}, {"": samples.Mark(0.0, -1.0, 1.0)}, name="c", unit="", band=1.1)
    assert (wide.layout.shapes[0].x0, wide.layout.shapes[0].x1) == (-1.1, 1.1)
    far = {"": shown[""] + 10}
    assert not samples.shows_zero(far, {"": samples.Mark(11.5, 11.2, 11.8)})
    assert samples.extent(far, {"": samples.Mark(NAN, NAN, NAN)}) == (11.0, 12.0)
    assert not samples.strips(far, {"": samples.Mark(11.5, 11.2, 11.8)}, name="c", unit="").layout.shapes


def test_dots_of_equal_value_are_apart_and_in_the_row_of_their_name():
    values = {"+": np.ones(5), "-": np.ones(400)}
    means = dict.fromkeys(values, samples.Mark(1.0, NAN, NAN))
    for row, trace in enumerate(traces(samples.strips(values, means, name="c", unit=""), "a direction")):
        assert len(set(trace.y)) == len(trace.x)
        assert np.abs(np.array(trace.y) + row).max() <= 0.3


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.floats(1e-3, 1e6))
def test_a_swarm_stays_in_its_row_and_stacks_no_dot_on_another(values, width):
    x = np.array(values)
    y = samples.swarm(x, float(x.min()), float(x.min()) + width)
    assert np.abs(y).max() <= 0.3
    assert len({*zip(x, y, strict=True)}) == len(x)


@given(st.floats(-1e12, 1e12), st.floats(1e-12, 1e12))
def test_ticks_are_few_inside_and_labelled_with_their_value(low, width):
    axis = go.layout.XAxis()
    theme.set_linear(axis, "x", "nats", low, low + width)
    ticks = axis.tickvals
    assert 2 <= len(ticks) <= 6
    assert all(
        axis.range[0] <= tick * (1 + 1e-9) + 1e-15 and tick <= axis.range[1] + abs(tick) * 1e-9 for tick in ticks
    )
    power = re.search(r"10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)", axis.title.text)
    unit = 10.0 ** int(power[1].translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))) if power else 1.0
    said = [float(label.replace("−", "-")) * unit for label in axis.ticktext]
    np.testing.assert_allclose(said, ticks, rtol=1e-6, atol=1e-9 * max(map(abs, ticks)))


def test_the_line_is_step_times_slope_and_rings_are_what_the_curvature_adds(tmp_path):
    (result,) = read(load(stored(tmp_path, lossy(made(20), 3, 7))))
    (fig,) = charts(directional_sections.slopes(result))
    (line,), (dots,), (rings,) = (traces(fig, name) for name in ("slope alone", "measured", "slope and"))
    np.testing.assert_allclose(line.y, 0.1 * np.array(line.x))
    kept = np.delete(np.arange(20), [3, 7])
    np.testing.assert_array_equal(dots.customdata, kept)
    np.testing.assert_array_equal(dots.x, result.arrays["slopes"][kept])
    np.testing.assert_allclose(dots.y, result.arrays["losses"][kept] - 2.0)
    quadratic = 0.1 * result.arrays["slopes"] + 0.1**2 / 2 * result.arrays["curvatures"]
    np.testing.assert_allclose(rings.y, quadratic[kept])


def test_pairs_lie_on_equal_axes_with_the_diagonal():
    x, y = np.array([1.0, 2.0, NAN, 4.0]), np.array([2.0, 1.0, 3.0, 7.0])
    fig = samples.pairs(x, y, ("<b>a</b> $x$", "b"), name="change", unit="nats")
    line, dots = fig.data
    assert list(line.x) == list(line.y) == list(fig.layout.xaxis.range)
    assert fig.layout.xaxis.range == fig.layout.yaxis.range
    assert (list(dots.x), list(dots.y), list(dots.customdata)) == ([1, 2, 4], [2, 1, 7], [0, 1, 3])
    assert fig.layout.xaxis.title.text.startswith("&lt;b&gt;a&lt;/b&gt; &#36;x&#36;<br>change")


# One model


def test_the_distributions_hold_changes_curvatures_and_the_stored_means(tmp_path):
    source = lossy(made(30), 2)
    (result,) = read(load(stored(tmp_path, source)))
    (fig,) = charts(directional_sections.loss_changes(result))
    positive, negative = traces(fig, "a direction")
    np.testing.assert_allclose(positive.x, np.delete(source.losses.numpy(), 2) - 2.0)
    np.testing.assert_allclose(negative.x, source.losses_negative.numpy() - 2.0)
    means = [(trace.x[0], trace.error_x.array[0]) for trace in traces(fig, "mean")]
    stderr = [float(source.estimates[name].stderr) for name in ("delta_mean", "loss_mean_negative")]
    half = [stats.t.ppf(0.975, num - 1) * error for num, error in zip((29, 30), stderr, strict=True)]
    np.testing.assert_allclose(means, [*zip((float(positive.x.mean()), float(negative.x.mean())), half, strict=True)])
    (fig,) = charts(directional_sections.curvature(result))
    (dots,) = traces(fig, "a direction")
    np.testing.assert_allclose(dots.x, np.delete(source.curvatures.numpy(), 2))


def _cells(path):
    """Names and first cells of both tables of statistics."""
    (result,) = read(load(path))
    tables = [*directional_sections.statistics(result), directional_sections.plain((result,), ("value",))]
    return result, dict(row[:2] for table in tables if isinstance(table, page.Table) for row in table.rows)


def test_the_tables_have_every_stored_statistic(tmp_path):
    path = stored(tmp_path, made(12))
    result, rows = _cells(path)
    endings = ("_stderr", "_stderr_data", "_stderr_total", "_dof")
    numbers = {name for name, x in result.values.items() if isinstance(x, float) and not name.endswith(endings)}
    assert numbers <= rows.keys()
    for name in numbers:
        changed(path, lambda meta, _, name=name: meta["models"][0]["values"].update({name: 765.4321}))
        cell = _cells(path)[1][name]
        assert cell != rows[name]
        assert cell.startswith("765")


def test_every_stored_number_that_changes_changes_the_page(tmp_path):
    path = stored(tmp_path, made(12))
    before = written(path)
    names = ("delta_mean", "curvature_mean", "dir_grad_delta_corr", "baseline_loss")
    new = dict(zip(names, (0.7654321, 0.6873213, 0.5987321, 0.4328765), strict=True))
    errors = {f"{name}_stderr": 0.00111 for name in names}
    after = written(changed(path, lambda meta, _: meta["models"][0]["values"].update(new | errors)))
    for shown in ("0.765", "0.687", "0.59", "0.43"):
        assert shown not in before, shown
        assert after.count(shown) >= 2, shown  # in the text, in the table


def test_a_stored_sample_that_changes_moves_its_dot(tmp_path):
    path = changed(stored(tmp_path, made(12)), lambda _, arrays: arrays["losses"].__setitem__(4, 2.75))
    (fig,) = charts(directional_sections.loss_changes(*read(load(path))))
    assert traces(fig, "a direction")[0].x[4] == 0.75


def test_nothing_of_what_is_not_finite_is_printed(tmp_path):
    assert not re.search(r"\b(?:nan|None|inf)\b", written(stored(tmp_path, lossy(made(10), 1, 4))))


def test_what_was_not_asked_for_has_no_section(tmp_path):
    full = ["Loss changes at", "Curvature", "Slopes and loss changes", "All statistics", "How these numbers were made"]
    text = directional.write_page(stored(tmp_path, made(12))).read_text(encoding="utf-8")
    assert [found.startswith(name) for found, name in zip(re.findall("<h2>(.*?)</h2>", text), full, strict=True)]
    bare = made(12, two_sided=False, slopes=False, bent=False)
    text = directional.write_page(stored(tmp_path, bare)).read_text(encoding="utf-8")
    assert re.findall("<h2>(.*?)</h2>", text)[1:] == full[3:]


def test_what_rounding_decides_in_half_precision_is_drawn(tmp_path):
    source = made(30, rise=0.003, scale=0.02, realised=REALISED)
    (result,) = read(load(stored(tmp_path, source)))
    section = directional_sections.curvature(result)
    (note,) = (block for block in section.blocks if isinstance(block, page.Quote))
    assert note.text[1:] == source.precision_note[1:]
    (fig,) = charts(section)
    assert fig.layout.shapes[0].x1 == min(source.curvature_noise_floor, fig.layout.xaxis.range[1])
    (result,) = read(load(stored(tmp_path, made(30))))
    (fig,) = charts(directional_sections.curvature(result))
    assert [shape.x0 for shape in fig.layout.shapes] == [0]  # too little to draw


def test_many_directions_are_all_drawn_without_rings(tmp_path):
    path = stored(tmp_path, made(2000))
    (result,) = read(load(path))
    assert len(charts(directional_sections.slopes(result))[0].data) == 2
    (fig,) = charts(directional_sections.loss_changes(result))
    assert [len(trace.x) for trace in traces(fig, "a direction")] == [2000, 2000]
    assert directional.write_page(path).stat().st_size < 6.5e6


@pytest.mark.parametrize("name", ["mlp", "qwen2"])
def test_a_real_run_makes_a_page(tmp_path, name):
    loss = loss_of(name)
    options = {"two_sided": True, "compute_gradient": True, "compute_curvature": True, "curvature": "exact"}
    result = fs.directional_losses(loss, loss.net.theta, key=fs.key(1), n_samples=4, span=0.05, **options)
    text = written(stored(tmp_path, result))
    assert "a second derivative, exact" in text
    assert f"{float(result.estimates['curvature_mean'].value):.3g}"[:4] in text


# Two models


def test_the_difference_and_its_interval_are_those_of_the_comparison(tmp_path):
    first, second = made(40), made(40, rise=0.13)
    c = paired(tmp_path, first, second)
    difference = compare_directional(first, second).differences["delta_two_sided_mean"]
    low, high = difference.interval
    assert c.gap(c.headline) == pytest.approx((float(difference.difference.value), low, high))
    assert f"({low:.4f} to {high:.4f})" in written(stored(tmp_path, first, second))


def test_paired_figures_hold_both_models_and_their_differences(tmp_path):
    first, second = lossy(made(20), 3), made(20, rise=0.2)
    c = paired(tmp_path, first, second)
    kept = np.delete(np.arange(20), 3)
    scatter, strip = charts(comparison_sections.changes(c))
    np.testing.assert_allclose(scatter.data[1].x, first.losses.numpy()[kept] - 2.0)
    np.testing.assert_allclose(scatter.data[1].y, second.losses.numpy()[kept] - 2.0)
    both, one = traces(strip, "a direction")
    np.testing.assert_allclose(one.x, (second.losses - first.losses).numpy()[kept])
    sides = [(r.losses + r.losses_negative).numpy()[kept] / 2 for r in (first, second)]
    np.testing.assert_allclose(both.x, sides[1] - sides[0])
    means = [(t.x[0], t.x[0] - t.error_x.arrayminus[0], t.x[0] + t.error_x.array[0]) for t in traces(strip, "mean")]
    found = compare_directional(first, second).differences
    for got, name in zip(means, ("delta_two_sided_mean", "delta_mean"), strict=True):
        np.testing.assert_allclose(got, (float(found[name].difference.value), *found[name].interval))
    scatter, strip = charts(comparison_sections.curvature(c))
    np.testing.assert_allclose(scatter.data[1].y - scatter.data[1].x, traces(strip, "a direction")[0].x)
    assert "1 of 20 pairs are not finite" in written(stored(tmp_path, first, second))


def test_the_comparison_is_told_in_full(tmp_path):
    first, second = made(20), made(20, rise=0.2)
    c = paired(tmp_path, first, second)
    table = comparison_sections.table(c, load(stored(tmp_path, first, second)).meta).blocks[1]
    rows = {row[0]: row for row in table.rows}
    assert set(rows) == set(compare_directional(first, second).differences)
    assert all(len(row) == len(table.headers) for row in table.rows)
    p = c.values["curvature_mean_wilcoxon_p_value"]
    assert 1e-6 < p < 2e-6  # 2^-19: every difference of 20 has one sign
    student = stats.ttest_rel(second.curvatures, first.curvatures).pvalue
    assert c.values["curvature_mean_p_value"] == pytest.approx(student)
    assert rows["curvature_mean"][table.headers.index("p")] == number(student, 2)
    assert rows["loss_std"][table.headers.index("p")] == ""
    path = changed(
        stored(tmp_path, first, second), lambda meta, _: meta["comparison"].update(delta_mean_difference=765.4)
    )
    assert "765.4" in written(path)


# Text, files, notebooks


def test_names_are_escaped_and_nothing_is_loaded(tmp_path):
    for path in (
        stored(tmp_path, made(5), names=(HOSTILE,), stem="one"),
        stored(tmp_path, made(5), made(5, rise=0.2), names=(HOSTILE, '"><img src=x onerror=alert(1)>'), stem="two"),
    ):
        text = directional.write_page(path).read_text(encoding="utf-8")
        check_loads_nothing(text)
        assert not re.findall(r"<script>alert|<img src=x|</script>alert|<b>texts", text)
        assert html.escape(HOSTILE) in text
        assert path.with_suffix(".html").stat().st_size < 6e6


def test_long_names_are_whole_in_the_text_and_told_apart_in_figures(tmp_path):
    first, second = ("x" * 60, "x" * 59 + "y")
    c = paired(tmp_path, made(5), made(5, rise=0.2), names=(first, second))
    assert c.short_names[0] != c.short_names[1]
    assert all(len(name) <= 24 for name in c.short_names)
    same = paired(tmp_path, made(5), made(5, rise=0.2), names=("a" * 30 + "b" + "a" * 30, "a" * 30 + "c" + "a" * 30))
    assert same.short_names[0] != same.short_names[1]
    assert first in written(stored(tmp_path, made(5), made(5, rise=0.2), names=(first, second)))


class Frames(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_a_page_shows_itself_in_a_sandboxed_frame(tmp_path):
    shown = show(stored(tmp_path, made(5), names=(HOSTILE,)))
    text = shown.path.read_text(encoding="utf-8")
    frames = Frames()
    frames.feed(shown._repr_html_())
    ((tag, attributes),) = frames.found  # one element, whatever is in the page
    assert tag == "iframe"
    assert attributes["srcdoc"] == text
    assert attributes["sandbox"] == "allow-scripts"
    assert Path(shown) == shown.path
    assert str(shown) == str(shown.path)
