"""Ablation grids, seeds, and comparisons of models with their q values."""

import numpy as np
import pytest
import results as made
import torch
from scipy import stats

import funcscope as fs
from funcscope.core.statistics import q_values
from funcscope.study.sweep import SEED

FEW = {"directional_losses": {"n_samples": 3}, "landscape_flatness": {"n_directions": 3}}


def model(name, scale):
    return fs.InMemory(
        {task: made.loss() for task in ("data", "fisher", "landscape")}, name, scale * made.theta(), content="1"
    )


def config(tmp_path, *names, **more):
    settings = {name: FEW[name] for name in names if name in FEW}
    return fs.UnifiedConfig(metrics=names, settings=settings, output_dir=str(tmp_path), verbose=False, **more)


@pytest.mark.slow
def test_a_grid_is_a_study_at_every_point_and_seeds_have_their_mean_and_error(tmp_path):
    grid = {
        "directional_losses.normalize": ["filter", "global"],
        SEED: [1, 2, 3],
        "directional_losses.span": [0.05, 0.1],
    }
    swept = fs.sweep([model("m", 1.0)], config(tmp_path, "mean_loss", "directional_losses"), grid)
    assert len(swept.results) == 12
    frame = swept.to_frame()
    assert set(grid) <= set(frame.columns)
    for point, result in zip(swept.points, swept.results, strict=True):
        direct = fs.directional_losses(
            made.loss(), made.loss().layout.unravel(made.theta()), key=fs.key(point[SEED]), n_samples=3, two_sided=True,
            compute_gradient=True, compute_curvature=True,
            span=point["directional_losses.span"], normalize=point["directional_losses.normalize"],
        )  # fmt: skip
        assert result.models["m"].metrics["directional_losses"].result == direct
    over = swept.over_seeds()
    row = over[
        (over["quantity"] == "delta_mean") & (over["directional_losses.span"] == 0.1)
        & (over["directional_losses.normalize"] == "global")
    ]  # fmt: skip
    values = [
        result.models["m"].metrics["directional_losses"]["delta_mean"]
        for point, result in zip(swept.points, swept.results, strict=True)
        if point["directional_losses.span"] == 0.1 and point["directional_losses.normalize"] == "global"
    ]
    assert row["value"].item() == pytest.approx(np.mean(values))
    assert row["stderr"].item() == pytest.approx(stats.sem(values))
    assert row["num"].item() == 3
    again = fs.sweep([model("m", 1.0)], config(tmp_path, "mean_loss", "directional_losses"), grid)
    assert all(outcome.reused for result in again.results for outcome in result.outcomes)
    with pytest.raises(ValueError, match="must have a name with values"):
        fs.sweep([model("m", 1.0)], config(tmp_path, "mean_loss"), {"seed": []})
    with pytest.raises(ValueError, match="no setting 'spam': did you mean 'span'"):
        fs.sweep([model("m", 1.0)], config(tmp_path, "directional_losses"), {"directional_losses.spam": [1]})


@pytest.mark.slow
def test_two_losses_on_the_same_sequences_are_paired_and_every_p_has_its_q(tmp_path):
    models = [model(name, scale) for name, scale in (("a", 1.0), ("b", 1.05), ("c", 3.0))]
    results = fs.analyze_models(
        models, config(tmp_path, "loss_comparison", "directional_comparison", "directional_losses")
    )
    assert not results.failed, results
    loss = made.loss()
    (sums_a, weights), (sums_b, _) = (loss.terms(scale * made.theta()) for scale in (1.0, 1.05))
    compared = results.models["a to b"].metrics["loss_comparison"].result
    gaps, n = (sums_b - sums_a).double(), len(weights)
    mean = gaps.sum() / weights.sum()
    sd = ((gaps - mean * weights).square().sum() * n / (n - 1)).sqrt() / weights.sum()
    assert float(compared.difference.value) == pytest.approx(float(mean), rel=1e-6)
    assert float(compared.difference.stderr) == pytest.approx(float(sd), rel=1e-6)
    assert compared.p_value == pytest.approx(2 * stats.t.sf(abs(float(mean / sd)), n - 1), rel=1e-6)
    alone = results.models["b"].metrics["mean_loss"].result.loss
    assert float(compared.difference.stderr) < float(alone.stderr)  # what sequences share cancels
    tests = results.tests()
    assert set(tests["models"]) == {"a to b", "a to c"}
    assert tests["q"].tolist() == pytest.approx(q_values(tests["p"].tolist()), nan_ok=True)
    known = tests.dropna()
    assert (known["q"] >= known["p"]).all()
    assert len(known) >= 8


def test_the_registry_is_the_catalogue():
    class Sum(fs.Result):
        total: float = fs.quantity("sum")

    registry = fs.MetricRegistry()
    try:
        registry.register(
            "sum_of_weights", "custom", lambda theta, *, power: Sum(float((theta**power).sum())), ["theta"], power=1
        )
        assert "sum_of_weights" in registry.names()
        config = fs.UnifiedConfig(metrics=("sum_of_weights",), save_results=False, use_cache=False, verbose=False)
        values = fs.analyze_models([model("m", 1.0)], config).models["m"].metrics["sum_of_weights"]
        assert values["total"] == pytest.approx(float(made.theta().sum()))
    finally:
        from funcscope.study.catalogue import CATALOGUE

        CATALOGUE.pop("sum_of_weights", None)
    with pytest.raises(ValueError, match="did you mean 'hessian_trace'"):
        registry.get("hessian_trase")


@pytest.mark.slow
def test_the_pipeline_of_the_sharpness_document_checks_the_relation_that_holds():
    from problems import problem

    net, batches, _ = problem("gpt2")
    asked = {"metrics": ["sharpness"], "sharpness_methods": ["hessian", "sam"], "use_sam_as_sanity_check": True}
    values = fs.UnifiedModelAnalysis().analyze_model(net, batches, {**asked, "epsilon": 1e-3})
    check = values["sharpness_check"]
    assert check["agree"]
    assert check["min_eigenvalue"] < check["curvature_along_gradient"] < check["max_eigenvalue"]
    sam = values["sam_sharpness"]
    assert sam["absolute"] == pytest.approx(
        1e-3 * sam["gradient_norm"] + 1e-6 / 2 * check["curvature_along_gradient"], rel=1e-3
    )
    alone = fs.UnifiedModelAnalysis().analyze_model(net, batches, {"sharpness_methods": ["sam"]})
    assert set(alone) == {"sam_sharpness"}
    with pytest.raises(ValueError, match="sharpness_methods"):
        fs.UnifiedModelAnalysis().analyze_model(net, batches, {"sharpness_methods": ["keskar"]})
    assert torch.is_grad_enabled()


@pytest.mark.slow
def test_a_figure_of_a_grid_has_every_mean_with_its_interval(tmp_path):
    from funcscope.view.ablation import sweep_figure

    grid = {
        "landscape_flatness.epsilon": [0.01, 0.1],
        "landscape_flatness.normalize": ["filter", "global"],
        SEED: [1, 2],
    }
    swept = fs.sweep([model("<b>", 1.0)], config(tmp_path, "landscape_flatness"), grid)
    over = swept.over_seeds()
    over = over[over["quantity"] == "mean_delta_loss"]
    drawn = sweep_figure(swept, "landscape_flatness", "mean_delta_loss", along="landscape_flatness.epsilon")
    marked = [trace for trace in drawn.figure.data if trace.name in ("filter", "global") and len(trace.x) == 2]
    assert {trace.name for trace in marked} == {"filter", "global"}
    shown = sorted(float(y) for trace in marked for y in trace.y)
    assert shown == pytest.approx(sorted(over["value"]))
    rows = sweep_figure(swept, "landscape_flatness", "mean_delta_loss", along="landscape_flatness.normalize").figure
    assert sorted(rows.data[-1].x) == pytest.approx(sorted(over["value"]))
    assert max(rows.data[-1].error_x.array) == pytest.approx(float(stats.t.ppf(0.975, 1) * over["stderr"].max()))
    with pytest.raises(ValueError, match="no setting 'epsilon'"):
        sweep_figure(swept, "landscape_flatness", "mean_delta_loss", along="epsilon")
    with pytest.raises(ValueError, match="did you mean 'mean_delta_loss'"):
        sweep_figure(swept, "landscape_flatness", "mean_delta_los", along="landscape_flatness.epsilon")
