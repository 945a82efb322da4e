"""The page of a model's curvature: numbers as stored, figures that carry them, nothing loaded, text escaped."""

import html
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_view import check_loads_nothing
from test_view_directional import HOSTILE, changed, charts, traces, visible

import funcscope as fs
from funcscope.core.store import load, save
from funcscope.linalg import block_traces, spectrum_summary
from funcscope.study.spectrum import of_density, of_ends, of_trace
from funcscope.view import curvature, curvature_figures, curvature_sections, page
from funcscope.view.curvature_result import Curvature
from funcscope.view.numbers import with_error

P = 60
SIZES = (40, 20)
UNIT = "nats per unit of distance²"


def made(folder, spectrum=None, *, matrix="hessian", blocks=True, gradient=True, name="base", stem="run", by="layer"):
    """A diagonal matrix of known spectrum in the form of `study.curvature.run`, its numbers from the algorithms."""
    diagonal = (
        torch.cat([torch.linspace(8.0, 1.0, 40), -torch.linspace(0.5, 2.0, 20)]) if spectrum is None else spectrum
    )
    diagonal, key = diagonal.double(), fs.key(42)
    summary = spectrum_summary(
        lambda v: diagonal * v, diagonal, key=key, num=3, num_probes=4, steps=10, trace_matvecs=12
    )
    arrays, stages = {}, {}
    for stage, part in (
        ("ends", of_ends(summary.ends)),
        ("trace", of_trace(summary.trace)),
        ("density", of_density(summary.density)),
    ):
        arrays |= part[0]
        stages[stage] = part[1]
    if blocks:
        cut = {"<b>h.0</b>": [slice(0, 40)], "h.1": [slice(40, 60)]}
        coupled = diagonal.diag() + 0.05
        found = block_traces(lambda v: coupled @ v, diagonal, cut, key=key, num=6)
        stages["block_traces"] = {"names": list(cut), "num_matvecs": 6}
        stages["block_eigenvalues"] = {"num_matvecs": 9}
        arrays |= {
            "block_trace_samples": torch.stack(list(found.samples.values())).numpy(),
            "hutchinson_samples": found.total.samples.numpy(), "block_sizes": np.array(SIZES),
            "block_eigenvalues": np.array([8.0, -0.5]), "block_residuals": np.array([1e-5, 1e-4]),
            "block_converged": np.array([True, True]),
        }  # fmt: skip
    sam = {
        "epsilon": 0.01, "displacement": 0.01, "absolute": 0.0312, "stderr": 0.0021, "relative": 0.0156,
        "relative_stderr": 0.0011, "first_order": 0.0301, "second_order": 0.00107, "remainder": 3e-5, "curvature": 5.5,
        "rounding": 1e-7, "num": 16,
    }  # fmt: skip
    average = {"epsilon": 1.5, "num": 20, "num_nonfinite": 0, "rounding": 1e-7, "absolute": 0.0042, "stderr": 0.0003}
    critical = {
        "value": 5.21, "stderr": 0.3, "status": "found", "learning_rate": 0.384, "slope": 9.0, "rounding": 1e-6,
        "num_forwards": 4, "low": 5.1, "high": 5.3, "learning_rate_low": 0.377, "learning_rate_high": 0.392,
    }  # fmt: skip
    none = {"undefined": "the gradient's norm is 0, below the threshold"}
    stages["sharpness"] = {
        "gradient_norm": 3.01 if gradient else 0.0,
        "sam": sam if gradient else none,
        "asam": sam | {"epsilon": 0.5, "absolute": 0.0777} if gradient else none,
        "average": average | {"second_order": 0.00433 if matrix == "hessian" else None},
        "critical": critical if gradient else critical | {"value": None, "status": "flat direction"},
    }
    model = {
        "name": name, "class": "GPT2LMHeadModel", "folder": "/models/base", "num_parameters": P, "dtype": "torch.float32",
        "compute_dtype": "torch.float32", "attention": "eager", "max_seq_length": 64, "values": {"baseline_loss": 2.0},
    }  # fmt: skip
    data = {"path": "<b>texts</b>.txt", "task": "causal", "num_samples": 16, "num_tokens": 999, "num_scored": 983}
    settings = {
        "matrix": matrix,
        "by": by,
        "epsilon": 0.01,
        "block_products": 6,
        "keep": True,
        "memory": 8.0,
        "seed": 42,
    }
    meta = {
        "kind": "curvature", "settings": settings, "key": {"bits": f"{key.bits:032x}", "seed": 42}, "models": [model],
        "stages": stages, "data": data | {"num_too_short": 1, "num_truncated": 4, "num_batches": 2},
        "cost": {
            "forward_seconds": 0.5, "param_norm": 30.0,
            "stages": {"ends": {"seconds": 90.0, "products": 30}, "sharpness": {"seconds": 7.5, "products": 0}},
        },
        "seconds": 98.0, "versions": {"torch": "2.13"},
    }  # fmt: skip
    path = folder / f"{stem}.npz"
    save(path, arrays, meta)
    return path, SimpleNamespace(summary=summary, diagonal=diagonal)


def written(path):
    return visible(curvature.write_page(path).read_text(encoding="utf-8"))


@pytest.fixture
def found(tmp_path):
    path, _ = made(tmp_path)
    return Curvature(load(path))


# What is read


def test_the_stored_summary_is_the_summary(tmp_path):
    path, source = made(tmp_path)
    again = Curvature(load(path)).summary
    assert str(again) == str(source.summary)
    assert again.asdict().keys() == source.summary.asdict().keys()
    for name, value in source.summary.asdict().items():
        np.testing.assert_array_equal(again.asdict()[name], value)


def test_shares_are_ratios_over_the_same_products(found):
    samples, whole = (found.stored.arrays[name] for name in ("block_trace_samples", "hutchinson_samples"))
    for block, row in zip(found.blocks, samples, strict=True):
        left_out = np.array([np.delete(row, i).sum() / np.delete(whole, i).sum() for i in range(6)])
        assert block.share == pytest.approx(row.mean() / whole.mean())
        assert block.share_stderr == pytest.approx(math.sqrt(5 / 6 * ((left_out - left_out.mean()) ** 2).sum()))
        assert block.trace_stderr == pytest.approx(row.std(ddof=1) / math.sqrt(6))
    assert sum(block.share for block in found.blocks) == pytest.approx(1)


def test_a_share_of_nothing_is_undefined(tmp_path):
    path, _ = made(tmp_path)
    noise = np.array([1.0, -1.0, 2.0, -2.0, 3.0, -3.0])
    changed(path, lambda _, arrays: arrays.update(hutchinson_samples=noise))
    assert all(math.isnan(block.share) for block in Curvature(load(path)).blocks)
    assert "The trace cannot be told from zero, so that no block has a share of it" in written(path)


# Figures


def test_the_scale_has_a_zero_and_decades():
    x = np.array([-1e5, -1e4, 0.0, 1e4, 1e5])
    np.testing.assert_allclose(np.diff(curvature_figures.place(x, 1.0)), [1.0, 4.0, 4.0, 1.0], atol=1e-7)


def test_the_density_figure_holds_the_density_its_band_and_the_eigenvalues(found):
    (fig,) = charts(curvature_sections.spectrum(found))
    (line,), (band,), (ticks,) = (traces(fig, name) for name in ("density", "95 %", "eigenvalue"))
    tie = found.rounding
    ends = found.summary.ends
    place = curvature_figures.place
    np.testing.assert_allclose(ticks.x, place(ends.values.numpy(), tie))
    np.testing.assert_allclose(ticks.customdata, np.column_stack([ends.values, ends.residuals]))
    np.testing.assert_allclose(ticks.x + ticks.error_x.array, place((ends.values + ends.residuals).numpy(), tie))
    np.testing.assert_allclose(ticks.x - ticks.error_x.arrayminus, place((ends.values - ends.residuals).numpy(), tie))
    nodes, weights = place(found.summary.density.nodes.numpy(), tie), found.summary.density.weights.numpy()
    width, x = curvature_sections.WIDTH, line.x
    bumps = np.exp(-((x[:, None, None] - nodes) ** 2) / (2 * width**2)) / (width * math.sqrt(2 * math.pi))
    rows = (bumps * weights).sum(-1)
    seen = np.isfinite(line.y)
    np.testing.assert_allclose(line.y[seen], rows.mean(1)[seen], rtol=1e-9)
    assert np.trapezoid(rows.mean(1), x) == pytest.approx(1, abs=1e-3)  # shares per decade of the axis
    half = 1.96 * rows.std(1, ddof=1) / 2
    np.testing.assert_allclose(band.y[: len(x)][seen], (rows.mean(1) + half)[seen], rtol=1e-9)
    floor = 10 ** fig.layout.yaxis.range[0]
    np.testing.assert_allclose(band.y[len(x) :][::-1], np.maximum(rows.mean(1) - half, floor), rtol=1e-9)
    assert fig.layout.yaxis.type == "log"
    assert "0" in fig.layout.xaxis2.ticktext
    assert any(text.startswith("−") for text in fig.layout.xaxis2.ticktext)


def test_one_probe_has_a_density_without_a_band(tmp_path):
    path, _ = made(tmp_path)
    changed(path, lambda _, arrays: arrays.update(nodes=arrays["nodes"][:1], weights=arrays["weights"][:1]))
    (fig,) = charts(curvature_sections.spectrum(Curvature(load(path))))
    assert np.isfinite(traces(fig, "95 %")[0].y).all()
    rows = curvature_sections.spectrum(Curvature(load(path))).blocks[1].rows
    assert {row[0]: row[2] for row in rows}["negative eigenvalues"] == ""  # over one start there is no error


def test_bars_are_traces_with_intervals_and_eigenvalues_with_residuals(found):
    trace, top = charts(curvature_sections.blocks(found))
    np.testing.assert_allclose(trace.data[0].x, [block.trace for block in found.blocks])
    np.testing.assert_allclose(trace.data[0].error_x.array, [1.96 * block.trace_stderr for block in found.blocks])
    np.testing.assert_allclose(top.data[0].x, [8.0, -0.5])
    np.testing.assert_allclose(top.data[0].error_x.array, [1e-5, 1e-4])
    assert top.layout.shapes[-1].x0 == found.summary.max_eigenvalue
    assert trace.layout.yaxis.ticktext[0] == "&lt;b&gt;h.0&lt;/b&gt;"
    assert curvature_figures.labels(["a.b.c", "a.b.d", "b.c"]) == ["a.b.c", "a.b.d", "b.c"]  # they stay apart
    assert trace.layout.xaxis.title.text == f"trace<br>({UNIT})"


def test_many_blocks_are_all_in_the_table_and_the_largest_in_the_figure(tmp_path):
    path, _ = made(tmp_path)

    def more(meta, arrays):
        num = 90
        meta["stages"]["block_traces"]["names"] = [f"tensor {i}" for i in range(num)]
        arrays["block_trace_samples"] = np.arange(num)[:, None] + arrays["hutchinson_samples"] / num
        for name in ("sizes", "eigenvalues", "residuals", "converged"):
            arrays[f"block_{name}"] = np.ones(num)

    section = curvature_sections.blocks(Curvature(load(changed(path, more))))
    assert len(charts(section)[0].data[0].x) == curvature_sections.MOST
    (table,) = (block for block in section.blocks if isinstance(block, page.Table))
    assert len(table.rows) == 90
    assert "The 40 blocks of 90" in written(path)


# What is said


def test_the_page_has_the_numbers(tmp_path):
    path, source = made(tmp_path)
    text = written(path)
    trace, negative = source.summary.trace, source.summary.negative_fraction
    assert f"The trace is {with_error(float(trace.value), float(trace.stderr))}" in text
    assert f"{100 * float(negative.value):.1f}"[:4] in text
    for number in ("−2.00", "8.000", "0.250", "0.0312 ± 0.0021", "1.56 ± 0.11 %", "0.0301", "0.00107", "5.210 0.30 0.384",
                   "0.0777", "0.0042", "0.00433", "3.010", "3.0 s each: 6.0 forward passes"):  # fmt: skip
        assert number in text, number
    for value in source.summary.ends.values.tolist():
        assert curvature_sections.number(value, 5) in text
    assert not re.search(r"\b(?:nan|None|inf)\b", text)


def test_every_stored_number_that_changes_changes_the_page(tmp_path):
    path, _ = made(tmp_path)
    before = written(path)

    def change(meta, arrays):
        arrays["end_values"][0], arrays["end_residuals"][1], arrays["trace_samples"][:] = 7.654321, 0.0876, 943.2
        arrays["block_eigenvalues"][1], arrays["block_residuals"][1] = 76.54, 0.0591
        sharpness = meta["stages"]["sharpness"]
        sharpness["gradient_norm"], sharpness["sam"]["absolute"] = 0.8137, 0.4682
        sharpness["asam"]["remainder"] = 0.3571
        sharpness["average"]["absolute"], sharpness["critical"]["learning_rate"] = 0.2846, 0.6193

    after = written(changed(path, change))
    for shown in "7.654 0.088 943 76.5 0.059 0.4682 0.357 0.2846 0.619 0.81".split():
        assert shown not in before, shown
        assert shown in after, shown


def test_learning_rates_are_two_over_the_curvatures(found):
    tables = [block for block in curvature_sections.sharpness(found).blocks if isinstance(block, page.Table)]
    column = tables[-1].headers.index("learning rate")
    rates = {row[0]: row[column] for row in tables[-1].rows}
    assert rates["critical sharpness"] == "0.384"
    assert rates["curvature along the gradient"] == "0.364"  # 2 / 5.5
    assert rates["largest eigenvalue of the Hessian"] == "0.250"


def test_mean_curvature_of_random_directions_is_the_trace_over_p(found):
    mean, _ = found.along_random
    exact = float(found.stored.arrays["hutchinson_samples"].mean() / P)
    assert float(mean.value) == pytest.approx(exact)
    bare = Curvature(found.stored._replace(arrays={k: v for k, v in found.stored.arrays.items() if "hutch" not in k}))
    mean, drawn = bare.along_random
    first = (found.summary.density.nodes * found.summary.density.weights).sum(1)
    assert float(mean.value) == pytest.approx(float(first.mean()))
    assert float(mean.stderr) == pytest.approx(float(first.std()) / 2)
    assert drawn.startswith("normal")


@pytest.mark.parametrize(
    "options", [{"gradient": False}, {"spectrum": torch.zeros(P), "blocks": False}, {"matrix": "ggn"}]
)
def test_a_point_without_gradient_or_curvature_has_a_page(tmp_path, options):
    text = written(made(tmp_path, **options)[0])
    assert "The trace" in text
    assert not re.search(r"\b(?:nan|None|inf)\b", text)


def test_names_are_escaped_and_nothing_is_loaded(tmp_path):
    path, _ = made(tmp_path, name=HOSTILE)
    text = curvature.write_page(path).read_text(encoding="utf-8")
    check_loads_nothing(text)
    assert not re.findall(r"<script>alert|</script>alert|<b>texts|<b>h\.0", text)
    assert html.escape(HOSTILE) in text
