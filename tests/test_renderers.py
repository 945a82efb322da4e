"""Renderers: the numbers given stand where they belong, holes stay holes, axes have units, files are whole."""

import copy
import math
import re
import shutil
from importlib.util import find_spec

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

import funcscope as fs
from funcscope.linalg.quadrature import spectral_density
from funcscope.view import export as export_module
from funcscope.view import theme
from funcscope.view.curves import training
from funcscope.view.drawing import band, spreads
from funcscope.view.export import export
from funcscope.view.plane_figures import Plane, contour, shades
from funcscope.view.renderers import (
    FLATNESS_METRICS,
    render_barrier,
    render_flatness_trajectory,
    render_perturbation_distribution,
    render_surface,
)
from funcscope.view.spectrum_figures import spectrum

NAN, INF = math.nan, math.inf
STEPS = np.array([0, 100, 400, 900])
HOSTILE = "<b>x</b> & $y$"


def summary():
    mean = np.array([0.01, NAN, 1.0, 3.0])
    return {
        "step": STEPS, "baseline_loss": np.array([5.0, NAN, 0.01, 1e-4]), "mean_delta_loss": mean,
        "mean_delta_loss_stderr": 0.1 * mean, "p10_delta_loss": 0.5 * mean, "p90_delta_loss": 2 * mean,
        "flatness_ratio": np.array([1.0, NAN, 0.5, 0.0]),
    }  # fmt: skip


def sample():
    return {
        "baseline_loss": 1.0, "delta_losses": np.array([0.1, 0.2, 0.4, NAN, INF]),
        "delta_losses_negative": np.array([0.1, -0.2, 0.3, 0.2, NAN]), "mean_delta_loss": 0.233,
        "mean_delta_loss_stderr": 0.05, "expected_delta_loss": 0.22, "epsilon": 0.1,
    }  # fmt: skip


def plane():
    """Rises tenfold per step of the first direction and doubles per step of the second: no symmetry."""
    losses = 10.0 ** np.arange(4)[:, None] * 2.0 ** np.arange(3)
    losses[3, 0], losses[0, 2] = NAN, INF
    return {
        "grid_losses": losses, "axis_values": np.array([-0.2, -0.1, 0.0, 0.1]), "axis_values_2": np.array([-1.0, 0.0, 1.0]),
        "axis_names": ("steep", "gentle"), "relative_displacement": np.array([0.25, 0.5]), "baseline_loss": 200.0,
    }  # fmt: skip


def path():
    losses = np.array([1.0, 4.0, NAN, 2.0])
    t = np.linspace(0, 1, 4)
    chord = (1 - t) * 1.0 + t * 2.0
    return {
        "coefficients": t, "losses": losses, "stderr": np.full(4, 0.1), "excess": losses - chord,
        "excess_stderr": np.array([0.0, 0.25, NAN, 0.0]), "barrier_max": 2.0, "barrier_max_stderr": 0.3, "kind": "line",
    }  # fmt: skip


WALK = np.array([[-0.2, -1.0], [-0.1, 0.5], [0.0, 0.0]]), np.array([0, 10, 20])


def contoured(walk=None, current=None, **more):
    data = plane() | more
    losses, x, y = (np.asarray(data[name]) for name in ("grid_losses", "axis_values", "axis_values_2"))
    return contour(Plane(losses, x, y, ("steep", "gentle"), 200.0), shades(losses, "nats"), walk, current)


def curves():
    down, share = np.array([4.0, 1.0, NAN, 0.001]), np.array([0.1, 0.5, 1.0, 1.0])
    sides = {"train_accuracy": share, "test_accuracy": share}
    return {"step": STEPS, "train_loss": down, "test_loss": 2 * down, **sides}


def density(num=4):
    diagonal = torch.cat([torch.logspace(-3, 1, 40), -torch.logspace(-3, -1, 10)]).double()
    return spectral_density(lambda v: diagonal * v, diagonal, key=fs.key(0), num_probes=num, steps=12)


ALL = {
    "flatness": (summary, lambda data: render_flatness_trajectory(data, 400)),
    "distribution": (sample, lambda data: render_perturbation_distribution(data, 400)),
    "surface": (plane, render_surface),
    "barrier": (path, render_barrier),
}
NEEDED = {
    "flatness": ("step", "baseline_loss", "mean_delta_loss"), "distribution": ("baseline_loss", "delta_losses"),
    "surface": ("grid_losses", "axis_values", "axis_values_2"),
    "barrier": ("coefficients", "losses"),
}  # fmt: skip


class Told:
    """A result: only its dictionary is used."""

    def __init__(self, values):
        self.values = values

    def asdict(self):
        return self.values


def trace(fig, name):
    return next(found for found in fig.data if found.name == name)


def titles(fig):
    axes = [
        axis for kind in ("xaxis", "yaxis") for axis in (fig.select_xaxes() if kind[0] == "x" else fig.select_yaxes())
    ]
    return [axis.title.text for axis in axes if axis.title.text]


def lost(values):
    """The data with nan for every finite number, but for positions and settings."""
    kept = ("step", "coefficients", "axis_values", "axis_values_2", "relative_displacement", "epsilon")
    return {
        name: value if name in kept or not isinstance(value, float | np.ndarray) else np.full_like(value, NAN)
        for name, value in values.items()
    }


def heading(fig):
    """The title in one line, without markup."""
    return re.sub(r"(<[^>]*>|\s)+", " ", fig.layout.title.text)


def finite_points(values):
    return sorted(np.asarray(values, dtype=float)[np.isfinite(np.asarray(values, dtype=float))].tolist())


# what holds for every renderer


@pytest.mark.parametrize("name", ALL)
def test_a_mapping_and_a_result_give_the_same_figure_and_stay_as_they_were(name):
    make, render = ALL[name]
    data, before = make(), copy.deepcopy(make())
    fig = render(data)
    assert isinstance(fig, go.Figure)
    assert render(Told(data)).to_json() == fig.to_json()
    assert data.keys() == before.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(data[key], value)


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in NEEDED.items() for key in keys])
def test_a_missing_key_is_named(name, key):
    make, render = ALL[name]
    with pytest.raises(ValueError, match=f"must have the key '{key}'"):
        render({other: value for other, value in make().items() if other != key})


@pytest.mark.parametrize("name", ALL)
def test_without_a_finite_number_there_is_a_figure_without_a_point(name):
    make, render = ALL[name]
    fig = render(lost(make()))
    assert fig.to_json()
    told = [
        found for found in fig.data
        if found.name not in (None, "centre", "not finite", "training", "step 10", "chord")
        and found.type in ("scatter", "bar", "violin") and found.y is not None and found.x is not None
    ]  # fmt: skip
    for found in told:
        both = np.isfinite(np.asarray(found.x, dtype=float)) & np.isfinite(np.asarray(found.y, dtype=float))
        assert not both.any() or (found.type == "bar" and not np.any(found.y)), found.name


@pytest.mark.parametrize("name", ALL)
def test_titles_and_axes_say_what_and_in_which_unit(name):
    make, render = ALL[name]
    fig = render(make())
    assert fig.layout.title.text
    told = " ".join(titles(fig)) + " ".join(
        str(part) for part in (fig.layout.scene.zaxis.title.text, fig.layout.coloraxis.colorbar.title.text)
    )
    told += " ".join(
        str(found.colorbar.title.text) for found in fig.data if found.type in ("contour", "heatmap", "surface")
    )
    assert "nats" in told or (name == "dimensionality" and "dimensions" in told)


# flatness


def test_the_flatness_is_the_one_given_with_gaps_and_steps_to_click():
    fig = render_flatness_trajectory(summary(), 400)
    line = trace(fig, "mean loss change")
    np.testing.assert_array_equal(line.y, summary()["mean_delta_loss"])
    np.testing.assert_array_equal(line.x, np.sqrt(STEPS))
    np.testing.assert_array_equal(line.customdata, STEPS)
    assert not line.connectgaps
    assert "markers" in line.mode
    assert line.line.color == theme.BLUE
    assert line.text[2] == "1.00 ± 0.10"
    assert "lower is flatter" in fig.layout.yaxis.title.text
    assert fig.layout.yaxis.type == "log"


def test_bars_are_196_standard_errors_and_the_band_holds_the_middle_80_percent():
    fig = render_flatness_trajectory(summary(), 400)
    np.testing.assert_allclose(trace(fig, "mean loss change").error_y.array, 0.196 * summary()["mean_delta_loss"])
    shape = trace(fig, "10th to 90th percentile")
    assert finite_points(shape.y) == pytest.approx(sorted([0.005, 0.02, 0.5, 2.0, 1.5, 6.0]))
    assert np.isnan(shape.y).sum() == 2  # the step without a number parts it into two pieces


@pytest.mark.parametrize("step", [0, 400, 900, 1600])
def test_the_current_epoch_is_marked(step):
    fig = render_flatness_trajectory(summary(), step)
    (line,) = [shape for shape in fig.layout.shapes if shape.name == "current step"]
    assert line.x0 == line.x1 == math.sqrt(step)
    assert fig.layout.xaxis.range[0] <= line.x0 <= fig.layout.xaxis.range[1]
    assert f"step {step:,}" in [note.text for note in fig.layout.annotations]


def test_a_share_is_flatter_where_it_is_higher_and_never_on_a_log_axis():
    data = summary() | {"flatness_ratio": np.array([1.0, 1e-3, 0.5, 0.5])}
    fig = render_flatness_trajectory(data, 0, "flatness_ratio")
    assert "higher is flatter" in fig.layout.yaxis.title.text
    assert "nats" not in fig.layout.yaxis.title.text
    assert fig.layout.yaxis.type is None
    assert "10th to 90th percentile" not in [found.name for found in fig.data]


def test_metrics_have_labels_and_an_unknown_one_is_refused():
    data = summary() | dict.fromkeys(FLATNESS_METRICS, np.ones(4))
    for metric, label in FLATNESS_METRICS.items():
        assert trace(render_flatness_trajectory(data, 0, metric), label).y.tolist() == [1.0] * 4
    with pytest.raises(ValueError, match="`metric` must be one of mean_delta_loss"):
        render_flatness_trajectory(data, 0, "sharpness")


def test_arrays_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="equally long, got step 4, baseline_loss 3"):
        render_flatness_trajectory(summary() | {"baseline_loss": np.ones(3)}, 0)
    with pytest.raises(ValueError, match="steps must be 0 or more, got -1"):
        render_flatness_trajectory(summary(), -1)


@pytest.mark.parametrize("num", [0, 1])
def test_few_steps_are_enough(num):
    data = {name: value[:num] for name, value in summary().items()}
    assert len(trace(render_flatness_trajectory(data, 0), "mean loss change").y) == num


def test_a_log_scale_is_for_two_decades_of_positive_values():
    assert spreads(np.array([0.01, 1.0, NAN]))
    assert not spreads(np.array([0.011, 1.0]))
    assert not spreads(np.array([0.01, 1.0, -1.0]))
    assert not spreads(np.array([NAN]))
    rare = np.append(np.logspace(-3, 0, 19), -1e-4)
    assert spreads(rare)
    assert not spreads(np.append(rare, -5.0))


def test_what_a_log_axis_cannot_hold_is_a_triangle_at_its_edge():
    value = np.append(np.logspace(-3, 0, 19), -1e-4)
    data = {"step": np.arange(20) * 10, "baseline_loss": value, "max_delta_loss": value}
    fig = render_flatness_trajectory(data, 0, "max_delta_loss")
    mark = [found for found in fig.data if found.name == "zero or below" and found.yaxis != "y2"]
    assert [found.customdata.tolist() for found in mark] == [[190]]
    assert math.log10(mark[0].y[0]) == pytest.approx(fig.layout.yaxis.range[0])
    assert math.isnan(trace(fig, FLATNESS_METRICS["max_delta_loss"]).y[-1])


def test_a_histogram_counts_every_finite_direction_once():
    fig = render_perturbation_distribution(sample(), 400)
    plus, minus = trace(fig, "+d"), trace(fig, "−d")
    np.testing.assert_array_equal(plus.x, [0.1, 0.2, 0.4])
    np.testing.assert_array_equal(minus.x, [0.1, -0.2, 0.3, 0.2])
    assert plus.xbins == minus.xbins
    assert plus.xbins.start <= -0.2
    assert plus.xbins.end >= 0.4
    assert fig.layout.xaxis.title.text == "loss change (nats)"


def test_lines_stand_at_mean_median_and_expectation():
    fig = render_perturbation_distribution(sample(), 400)
    found = {name.split()[0]: (next(t for t in fig.data if t.name == name)) for name in (t.name for t in fig.data)}
    assert found["mean"].x == (0.233, 0.233)
    assert found["mean"].name == "mean 0.233 ± 0.050"
    assert found["median"].x == (0.2, 0.2)
    assert found["ε²"].x == (0.22, 0.22)
    assert (found["mean"].line.color, found["median"].line.color) == (theme.VERMILION, theme.GREEN)


@pytest.mark.parametrize("values", [[0.3], [0.3] * 7, [0.0], [0.0, 0.0], [1e-9, 5.0], list(range(1000))])
def test_any_number_of_directions_has_at_most_30_bins(values):
    bars = trace(render_perturbation_distribution({"baseline_loss": 1.0, "delta_losses": values}, 0), "+d")
    assert len(bars.x) == len(values)
    assert bars.xbins.size > 0
    assert round((bars.xbins.end - bars.xbins.start) / bars.xbins.size, 9) <= 30
    assert bars.xbins.start <= min(values) <= max(values) <= bars.xbins.end


# planes


@pytest.mark.parametrize("render", [lambda data: contoured(**data), render_surface])
def test_a_loss_stands_at_its_coefficients(render):
    data = plane()
    found = trace(render(data), "loss")
    for i, x in enumerate(data["axis_values"]):
        for j, y in enumerate(data["axis_values_2"]):
            column, row = list(found.x).index(x), list(found.y).index(y)
            np.testing.assert_equal(found.customdata[row][column], data["grid_losses"][i, j])
            if np.isfinite(data["grid_losses"][i, j]):
                assert found.z[row][column] == pytest.approx(math.log10(data["grid_losses"][i, j]))
            else:
                assert math.isnan(found.z[row][column])


def test_holes_are_marked_counted_and_not_closed():
    fig = contoured()
    holes = trace(fig, "not finite")
    assert sorted(zip(holes.x, holes.y, strict=True)) == [(-0.2, 1.0), (0.1, -1.0)]
    assert "2 of 12 points not finite" in heading(render_surface(plane()))
    assert not trace(fig, "loss").connectgaps


def test_colours_have_ticks_in_nats_on_a_log_scale_and_on_a_linear_one():
    bar = trace(contoured(), "loss").colorbar
    assert (bar.tickprefix, bar.dtick, bar.title.text) == ("10<sup>", 1, "nats")
    flat = trace(contoured(grid_losses=np.arange(12.0).reshape(4, 3)), "loss")
    np.testing.assert_array_equal(flat.z, np.arange(12.0).reshape(4, 3).T)
    assert (flat.colorbar.tickprefix, flat.zmin, flat.zmax) == (None, 0.0, 11.0)


def test_the_trajectory_is_drawn_where_it_went_and_the_current_epoch_is_large():
    fig = contoured(WALK, 10)
    line = trace(fig, "training")
    np.testing.assert_array_equal(np.stack([line.x, line.y], 1), WALK[0])
    np.testing.assert_array_equal(line.customdata, WALK[1])
    here = trace(fig, "step 10")
    assert (here.x.tolist(), here.y.tolist(), here.marker.color) == ([-0.1], [0.5], theme.VERMILION)
    assert "step 11" not in [found.name for found in contoured(WALK, 11).data]
    assert (trace(fig, "centre").x, trace(fig, "centre").y) == ((0,), (0,))


def test_a_trajectory_that_leaves_the_plane_is_still_seen():
    fig = contoured((np.array([[0.5, -3.0]]), np.array([0])))
    assert fig.layout.xaxis.range[1] > 0.5
    assert fig.layout.yaxis.range[0] < -3.0
    assert contoured().layout.xaxis.range == (-0.2, 0.1)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"`grid_losses` must have the shape \(4, 3\) of its axes, got \(3, 4\)"):
        render_surface(plane() | {"grid_losses": plane()["grid_losses"].T})


@pytest.mark.parametrize(
    "losses", [np.full((4, 3), 2.0), np.zeros((4, 3)), np.full((4, 3), 1e-300), np.full((4, 3), 1e300)]
)
def test_a_flat_plane_has_a_scale(losses):
    shown = trace(contoured(grid_losses=losses), "loss")
    assert shown.zmin < shown.zmax


def test_a_plane_of_one_point_is_a_figure():
    one = {"grid_losses": [[1.0]], "axis_values": [0.0], "axis_values_2": [0.0]}
    assert contoured(**one).layout.xaxis.range == (-0.5, 0.5)
    assert trace(render_surface(one), "loss").z.tolist() == [[1.0]]


# lines and paths


def test_a_barrier_is_marked_where_the_excess_is_largest():
    fig = render_barrier(path())
    lines = [found for found in fig.data if found.name == "line" and found.fill is None]
    np.testing.assert_array_equal(lines[0].y, path()["losses"])
    np.testing.assert_allclose(trace(fig, "chord").y, np.linspace(1, 2, 4))
    mark = trace(fig, "barrier")
    assert mark.x == pytest.approx((1 / 3, 1 / 3))
    assert mark.y == pytest.approx((4 / 3, 4.0))
    text = heading(fig)
    assert "line: barrier 2.67 ± 0.25 nats above the chord, 2.00 ± 0.30 above the higher" in text
    assert "1 of 4 points not finite" in text


def test_the_largest_excess_is_not_the_largest_loss():
    mark = trace(render_barrier({"coefficients": np.linspace(0, 1, 4), "losses": [1.0, 3.0, 3.5, 4.0]}), "barrier")
    assert mark.x == pytest.approx((1 / 3, 1 / 3))
    assert mark.y == pytest.approx((2.0, 3.0))


def test_paths_with_the_same_ends_share_a_chord():
    bezier = path() | {"losses": np.array([1.0, 1.2, 1.3, 2.0]), "kind": "bezier"}
    bezier.pop("excess")
    fig = render_barrier(path(), bezier)
    assert [found.name for found in fig.data].count("chord") == 1
    other = bezier | {"losses": np.array([3.0, 1.2, 1.3, 2.0])}
    assert [found.name for found in render_barrier(path(), other).data].count("chord") == 2
    with pytest.raises(ValueError, match="one name per path, got 1 for 2"):
        render_barrier(path(), bezier, names=["a"])


def test_a_band_keeps_its_holes_and_stays_above_the_floor():
    x, low = np.arange(5.0), np.array([1.0, 0.01, NAN, 1.0, 1.0])
    shape = band(x, low, 2 * low + 1, "band", theme.BLUE, floor=0.1)
    assert np.isnan(shape.x).sum() == 2
    assert np.nanmin(shape.y) == 0.1
    assert shape.fillcolor == "rgba(0,114,178,0.2)"


# distributions and spectra


def test_a_density_is_that_of_the_quadrature_and_names_its_unit():
    found = density()
    fig = spectrum(found)
    line = trace(fig, "density")
    share = np.trapezoid(np.nan_to_num(line.y), line.x)
    assert share == pytest.approx(1, abs=0.02)  # what lies below half an eigenvalue is not drawn
    ends = trace(fig, "outermost node").customdata[:, 0]
    np.testing.assert_allclose(ends, found.range)
    assert fig.layout.xaxis2.title.text == "eigenvalue"
    assert trace(fig, "95 % interval").fill == "toself"


def test_a_density_takes_eigenvalues_and_one_probe():
    diagonal = torch.logspace(-3, 1, 40).double()
    pairs = fs.eigenpairs(lambda v: diagonal * v, diagonal, key=fs.key(0), num=3)
    marks = trace(spectrum(density(), pairs.values.numpy(), pairs.residuals.numpy()), "eigenvalue, with its residual")
    np.testing.assert_allclose(marks.customdata[:, 0], pairs.values)
    assert spectrum(density(1)).to_json()


# over training


def test_curves_are_those_given_and_carry_the_step_through_both_panels():
    fig = training(curves(), 400)
    losses = [found.y for found in fig.data if found.yaxis in (None, "y") and found.mode == "lines"]
    np.testing.assert_array_equal(losses, [curves()["train_loss"], curves()["test_loss"]])
    assert [shape.x0 for shape in fig.layout.shapes if shape.name == "current step"] == [20.0, 20.0]
    assert not training(curves(), None).layout.shapes


def test_text_is_shown_as_it_is():
    fig = render_flatness_trajectory(summary(), 0, title=HOSTILE)
    assert "&lt;b&gt;x&lt;/b&gt; &amp; &#36;y&#36;" in fig.layout.title.text
    assert "<b>" not in render_surface(plane() | {"axis_names": (HOSTILE, "b")}).layout.scene.xaxis.title.text


# files


def _browser():
    found = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    return find_spec("kaleido") is not None and found is not None


BROWSER = pytest.mark.skipif(not _browser(), reason="kaleido or a Chromium is not installed")


def test_html_is_whole_loads_nothing_and_is_the_same_twice(tmp_path):
    fig = contoured()
    before = fig.to_json()
    text = export(fig, tmp_path / "new" / "a.html").read_text(encoding="utf-8")
    assert "Plotly.newPlot" in text
    assert len(text) > 1_000_000  # plotly.js is inside
    assert not re.findall(r"<(?:script|link)[^>]+(?:src|href)=", text)
    assert export(fig, tmp_path / "b.HTML").read_text(encoding="utf-8") == text
    assert fig.to_json() == before
    assert '"paper_bgcolor":"white"' in text  # ink on a dark viewer's ground could not be read
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.html"]


@pytest.mark.slow
@BROWSER
@pytest.mark.parametrize(("ending", "head"), [("svg", b"<svg"), ("png", b"\x89PNG\r\n")])
def test_images_are_images_of_the_size_asked_for(tmp_path, ending, head):
    fig = render_perturbation_distribution(sample(), 0)
    data = export(fig, str(tmp_path / f"a.{ending}"), width=500, scale=1).read_bytes()
    assert data.startswith(head)
    if ending == "png":
        assert (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == (500, 350)
    else:
        assert b'width="500"' in data
        assert b"loss change (nats)" in data


def test_another_ending_lists_the_endings(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.html, \.svg, \.png or \.pdf, got 'a\.jpg'"):
        export(go.Figure(), tmp_path / "a.jpg")
    assert not list(tmp_path.iterdir())


def test_without_kaleido_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs kaleido.*pip install 'funcscope\[image\]'.*write \.html"):
        export(go.Figure(), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(find_spec("kaleido") is None, reason="kaleido is not installed")
def test_without_a_browser_the_error_says_what_to_install_and_leaves_the_old_file(tmp_path, monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "none"))
    (tmp_path / "a.svg").write_text("old")
    with pytest.raises(ValueError, match=r"needs a browser.*funcscope\[image\].*Chromium"):
        export(go.Figure(), tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text() == "old"
