"""The page and its figures: they carry the numbers given, leave holes open, escape text and load nothing."""

import re

import numpy as np
import plotly.graph_objects as go
import pytest

from funcscope.core.store import save
from funcscope.view import demo, figures, page, sections, theme
from funcscope.view.story import Story, curvature_ratio, ratio
from funcscope.view.theme import Timeline, place

STEP = np.array([0, 10, 20, 30])
LINE = Timeline(30, ((10, "memorised"),))
NAN = np.nan


def trace(fig, name):
    return next(found for found in fig.data if found.name == name)


def stored(folder, *, generalises=True, lost=False):
    """A small result in the form of `study.demo.run`, with numbers drawn from a generator of its own."""
    rng = np.random.default_rng(0)
    config = {
        "p": 5, "train_fraction": 0.4, "d_model": 4, "num_heads": 1, "d_mlp": 8, "steps": 30,
        "learning_rate": 0.01, "weight_decay": 1.0, "betas": [0.9, 0.98], "seed": 3,
    }  # fmt: skip
    base = np.array([1.6, 0.4, 0.01, 0.001])
    curvatures = base[:, None] * rng.uniform(10, 30, (4, 6))
    losses = base[:, None] + 0.005 * curvatures
    if lost:
        losses[1, :2], losses[2], curvatures[1, :2], curvatures[2] = NAN, np.inf, NAN, NAN
    accuracy = np.array([0.1, 1.0, 1.0, 1.0]), np.array([0.1, 0.2, 0.4, 1.0 if generalises else 0.5])
    rows = [row(int(STEP[i]), base[i], losses[i], curvatures[i], accuracy[0][i], accuracy[1][i]) for i in range(4)]
    arrays = {
        "step": STEP, "losses": losses, "losses_negative": losses, "curvatures": curvatures,
        "curve_step": STEP.astype(float), "curve_train_loss": base, "curve_test_loss": 2 * base,
        "curve_train_accuracy": accuracy[0], "curve_test_accuracy": accuracy[1],
        "profile_alpha": np.linspace(-0.5, 0.5, 5, dtype=np.float32), "profile_step": np.array([0, 10, 30]),
        "profile_loss": rng.uniform(0, 1, (3, 2, 5)),
    }  # fmt: skip
    settings = {"config": config, "num_checkpoints": 4, "n_samples": 6, "span": 0.1, "seed": 42}
    path = folder / "<run> & co.npz"
    save(path, arrays, {"settings": settings, "table": rows, "versions": {"torch": "<b>2</b>"}})
    return path


def row(step, base, losses, curvatures, train, test):
    good, bent = losses[np.isfinite(losses)], curvatures[np.isfinite(curvatures)]
    of = {"loss_mean": good, "loss_std": good, "delta_mean": good, "landscape_roughness": good}
    of |= {"curvature_mean": bent, "curvature_p10": bent, "curvature_p90": bent, "dir_grad_delta_corr": good}
    values = {name: float(x.mean()) if x.size else NAN for name, x in of.items()}
    return {
        "step": step, "train_loss": base, "test_loss": 2 * base, "train_accuracy": train, "test_accuracy": test,
        "baseline_loss": base, **values, **{f"{name}_stderr": value / 20 for name, value in values.items()},
        "curvature_noise_floor": 1e-6, "n_nonfinite_pos": len(losses) - len(good), "n_nonfinite_neg": 0,
        "n_samples_for_corr": len(good), "actual_span": 0.1, "relative_step": 0.1, "normalize": "filter",
        "distribution": "normal", "seed": 42, "key": "00ff", "num_forwards": 13, "num_gradients": 1,
        "note": None if good.size else "undefined <because> & so on",
        "hessian_max_eigenvalue": 3 * base, "hessian_max_eigenvalue_residual": 0.01 * base, "hessian_trace": 50 * base,
        "hessian_trace_stderr": 2 * base, "hessian_products": 24, "sam_absolute": 0.02 * base, "sam_stderr": 0.001 * base,
        "sam_relative": 0.02 + step / 1000, "sam_relative_stderr": 0.001, "sam_first_order": 0.019 * base,
        "sam_rounding": 1e-9,
    }  # fmt: skip


def test_curves_carry_the_numbers_and_circle_the_checkpoints():
    train, test = np.array([3.0, 1.0, 0.1, 0.01]), np.array([3.0, 4.0, NAN, 1.0])
    share = np.array([0.0, 0.5, 1.0, 1.0])
    fig = figures.curves(STEP, {"train": train, "test": test}, {"train": share}, np.array([0, 30]), LINE)
    np.testing.assert_array_equal(trace(fig, "test").y, test)
    assert not trace(fig, "test").connectgaps
    np.testing.assert_array_equal(trace(fig, "checkpoint").y, train[[0, 3]])
    np.testing.assert_array_equal(trace(fig, "train").x, place(STEP))
    assert [note.text for note in fig.layout.annotations] == ["memorised"]


def test_holes_stay_holes_and_intervals_are_196_standard_errors():
    value, stderr = np.array([1.0, NAN, 3.0, 4.0]), np.array([0.1, 0.1, NAN, 0.2])
    fig = figures.trajectory_with_error(STEP, value, stderr, LINE, name="mean", y_title="unit")
    np.testing.assert_array_equal(trace(fig, "mean and 95 % interval").y, value)
    ends = trace(fig, "95 % interval").y
    np.testing.assert_allclose(ends, [1 - 0.196, 1 + 0.196, NAN, 4 - 0.392, 4 + 0.392, NAN])


def test_a_curvature_below_zero_is_marked_and_not_put_on_a_log_axis():
    mean, stderr = np.array([2.0, -1.0, 0.5, 0.1]), np.full(4, 0.01)
    fig = figures.curvature_trajectory(STEP, mean, stderr, mean - 1, mean + 0.1, LINE)
    assert fig.layout.yaxis.type == "log"
    np.testing.assert_array_equal(trace(fig, "mean and 95 % interval").y, [2.0, NAN, 0.5, 0.1])
    np.testing.assert_array_equal(trace(fig, "zero or below").customdata[:, :2], [[10, -1.0]])
    band = trace(fig, "10th to 90th percentile of directions")
    assert np.nanmin(band.y) == pytest.approx(10 ** fig.layout.yaxis.range[0])  # an interval through 0 ends there
    assert place(np.array([10]))[0] not in band.x


def test_hessian_and_sharpness_carry_the_numbers_and_their_bars():
    top, trace_, sam = np.array([2.0, -1.0, 0.5, 0.1]), np.array([9.0, 5.0, NAN, 0.4]), np.array([0.1, 0.2, 0.3, 0.4])
    errors = tuple(0.1 * np.abs(x) for x in (top, trace_, sam))
    fig = figures.hessian_and_sharpness(STEP, (top, trace_, sam), errors, LINE)
    np.testing.assert_array_equal(trace(fig, "largest eigenvalue").y, [2.0, NAN, 0.5, 0.1])
    np.testing.assert_array_equal(trace(fig, "trace").y, trace_)
    np.testing.assert_array_equal(trace(fig, "relative sharpness").y, sam)
    np.testing.assert_array_equal(trace(fig, "zero or below").customdata[:, :2], [[10, -1.0]])
    np.testing.assert_allclose(trace(fig, "trace, bar").y, [8.1, 9.9, NAN, 4.5, 5.5, NAN, 0.36, 0.44, NAN])
    assert trace(fig, "relative sharpness").yaxis == "y2"
    assert fig.layout.yaxis.type == fig.layout.yaxis2.type == "log"
    np.testing.assert_array_equal(trace(fig, "trace").x, place(STEP))  # the axis of the training curves
    curves = figures.curves(STEP, {"train": sam}, {"train": sam}, STEP, LINE)
    for axis in ("xaxis", "xaxis2"):
        assert fig.layout[axis].range == curves.layout[axis].range
        assert fig.layout[axis].tickvals == curves.layout[axis].tickvals


def test_an_axis_without_a_positive_value_stays_linear():
    fig = go.Figure()
    assert theme.set_log(fig.layout.yaxis, np.array([-1.0, NAN])) == -np.inf
    assert fig.layout.yaxis.type is None


def test_lines_and_distributions_carry_the_numbers():
    rng = np.random.default_rng(1)
    alpha, losses = np.linspace(-1, 1, 5), rng.uniform(size=(2, 3, 5))
    fig = figures.line_profiles(alpha, losses, ["a", "b"], span=0.1, level=(0.5, "ln p"))
    np.testing.assert_array_equal([found.y for found in fig.data], losses.reshape(6, 5))
    values = rng.uniform(1, 2, size=(4, 9))
    values[1, 3], values[2] = np.inf, NAN
    fig = figures.delta_distribution(STEP, {"+0.1": values}, LINE, y_title="nats")
    medians = next(found.y for found in fig.data if found.mode == "markers")
    np.testing.assert_array_equal(
        medians, [np.median(values[0]), np.median(np.delete(values[1], 3)), NAN, np.median(values[3])]
    )


def check_loads_nothing(text):
    """A page has its scripts inside, once, and asks for nothing from outside."""
    scripts = re.compile(r"<script[^>]*>.*?</script>", re.DOTALL)
    assert re.findall(r"<script[^>]*\s(?:src|href)", text) == []
    assert re.findall(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//|<link|@import|url\(""", scripts.sub("", text)) == []
    assert "default-src 'none'" in text
    assert text.count("plotly.js v") == 1


def test_the_page_loads_nothing_and_forbids_it(tmp_path):
    check_loads_nothing(demo.write_page(stored(tmp_path)).read_text(encoding="utf-8"))


def test_text_is_escaped(tmp_path):
    text = demo.write_page(stored(tmp_path, lost=True)).read_text(encoding="utf-8")
    assert "<b>2</b>" not in text
    assert "torch &lt;b&gt;2&lt;/b&gt;" in text
    assert "&lt;run&gt; &amp; co.npz</a>" in text
    fig = go.Figure(go.Scatter(y=[1.0], name="</script><script>alert(1)"))
    shown = page.render(
        "<i>", "", ['"&"'], [], [page.Section("<u>", [page.Chart(fig, "<s>"), page.Quote("<q>", "<r>")])]
    )
    assert re.findall(r"<[iusqr]>|alert\(1\)(?=[^\"]*</script><script>)|</script><script>alert", shown) == []


def test_bars_of_sharpness_over_training_are_its_errors(tmp_path):
    path = stored(tmp_path)
    found = demo.load(path)
    (chart,) = (block for block in sections.sharpness(Story(found)).blocks if isinstance(block, page.Chart))
    ends = trace(chart.figure, "trace, bar").y.reshape(-1, 3)
    errors = [2 * 1.96 * r["hessian_trace_stderr"] for r in found.meta["table"]]
    np.testing.assert_allclose(ends[:, 1] - ends[:, 0], errors)
    for row in found.meta["table"]:
        row["sam_relative"] = row["sam_relative_stderr"] = None  # no gradient
    save(path, found.arrays, found.meta)
    assert "undefined share" in demo.write_page(path).read_text(encoding="utf-8")


def test_nothing_of_what_is_lost_is_printed(tmp_path):
    text = demo.write_page(stored(tmp_path, generalises=False, lost=True)).read_text(encoding="utf-8")
    assert not re.search(r">[^<]*\b(?:nan|None)\b[^<]*<", re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL))


def test_the_error_of_a_ratio_of_paired_curvatures_is_that_of_the_jackknife(tmp_path):
    story = Story(demo.load(stored(tmp_path)))
    x, y = story.array("curvatures")[[1, -1]]
    left_out = np.array([np.delete(x, i).mean() / np.delete(y, i).mean() for i in range(6)])
    jackknife = np.sqrt(5 / 6 * ((left_out - left_out.mean()) ** 2).sum())
    value, stderr = curvature_ratio(story)
    assert value == pytest.approx(x.mean() / y.mean())
    assert stderr == pytest.approx(jackknife, rel=0.1)  # equal to first order in 1 / n


def test_a_ratio_to_zero_is_undefined():
    np.testing.assert_array_equal(ratio(np.array([1.0, 1.0]), np.array([0.0, 2.0])), [NAN, 0.5])
