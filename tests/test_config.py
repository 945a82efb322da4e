"""The documented entry point: every documented field and code block, on local models."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields

import pytest
from folders import folder, texts

import funcscope as fs
from funcscope.study.analyze import analyze_models
from funcscope.study.catalogue import CATALOGUE
from funcscope.study.config import UnifiedConfig
from funcscope.study.fields import check_kind
from funcscope.study.flags import FLAGS
from funcscope.study.results import Results
from funcscope.view.report import write_report

DOCUMENTED = {
    "model_name": None, "base_model": None, "device": "auto", "dtype": "auto", "dataset_name": "openwebtext",
    "dataset_split": "train", "num_samples": 1000, "max_seq_length": 512, "batch_size": 32, "max_batch_size": 256,
    "min_batch_size": 4, "adaptive_batch_sizing": True, "compute_all": False, "fisher_n_samples": 1000,
    "fisher_method": "empirical", "fisher_batch_size": 128, "compute_fisher_eigenvalues": True, "fisher_top_k": 20,
    "enable_qkov_interference": True, "enable_cross_task_conflicts": True, "loss_landscape_n_points": 25,
    "loss_landscape_span": 0.1, "loss_landscape_normalization": "layer", "loss_landscape_batches": 10,
    "gradient_trajectory_steps": 100, "compute_gradient_flow": True, "compute_gradient_pathology": True,
    "aggressive_cleanup": True, "enable_memory_tracking": False, "max_memory_gb": 70.0, "seed": 42, "deterministic": True,
    "output_dir": "./analysis_results", "save_results": True, "save_plots": False, "verbose": True, "use_cache": True,
    "force_recompute": False, "skip_on_error": True, "timeout_seconds": None,
}  # fmt: skip


@pytest.fixture
def made(tmp_path):
    """Three checkpoints of one model, and texts."""
    paths = [folder(tmp_path / f"checkpoint-{step}", scale=1 + step / 1000) for step in (100, 200, 300)]
    return [str(path) for path in paths], texts(tmp_path / "texts.txt"), tmp_path / "out"


def config(data, out, **changes):
    few = {"num_samples": 4, "max_seq_length": 8, "metrics": ("mean_loss",), "verbose": False}
    return UnifiedConfig(**{"dataset_name": data, "output_dir": str(out), **few, **changes})


def test_every_documented_field_is_there_with_its_documented_value():
    values = asdict(UnifiedConfig())
    assert {name: values[name] for name in DOCUMENTED} == DOCUMENTED
    assert all(values[flag] is False for flag in FLAGS)
    assert len(FLAGS) == 9


@pytest.mark.slow
def test_checkpoints_are_analysed_compared_and_stored(made):
    paths, data, out = made
    chosen = config(data, out, compute_loss_landscape=True, loss_landscape_n_points=3)
    results = analyze_models(paths, chosen)
    for path in paths:
        values = results.models[path].metrics["loss_landscape_2d"]
        assert values["grid_losses"].shape == (3, 3)
        assert values["roughness"] > 0
        assert "error" not in values
    assert results.trajectory("mean_loss", "loss")["step"].tolist() == [100, 200, 300]
    again = analyze_models(paths, chosen)
    assert all(outcome.reused for outcome in again.outcomes)
    assert str(Results.open(out)) == str(again)
    assert json.loads((out / "study.json").read_text())["config"]["loss_landscape_n_points"] == 3
    forced = analyze_models(paths, config(data, out, force_recompute=True))
    assert not any(outcome.reused for outcome in forced.outcomes)
    assert not any(outcome.reused for outcome in analyze_models(paths, config(data, out, use_cache=False)).outcomes)


def test_the_size_of_batches_changes_no_number_and_no_identity(made):
    paths, data, out = made
    first = analyze_models(paths[:1], config(data, out, batch_size=4))
    assert analyze_models(paths[:1], config(data, out, batch_size=1)).outcomes[0].reused
    one = analyze_models(paths[:1], config(data, out, batch_size=1, use_cache=False))
    value, other = (each.outcomes[0].result.loss.value for each in (first, one))
    assert float(value) == pytest.approx(float(other), rel=1e-6)


def test_weights_that_change_in_their_folder_are_measured_anew(made, tmp_path):
    paths, data, out = made
    first = analyze_models(paths[:1], config(data, out)).outcomes[0]
    folder(tmp_path / "checkpoint-100", scale=3.0)
    second = analyze_models(paths[:1], config(data, out)).outcomes[0]
    assert not second.reused
    assert second.result != first.result
    (tmp_path / "texts.txt").write_text("other words\n\nare here\n")
    assert not analyze_models(paths[:1], config(data, out)).outcomes[0].reused


def test_what_does_not_fit_is_one_line_that_says_what_to_do(made, tmp_path):
    _, data, out = made
    with pytest.raises(ValueError, match="at least one model"):
        analyze_models([], config(data, out))
    with pytest.raises(ValueError, match="no metric is asked for"):
        UnifiedConfig().selected()
    with pytest.raises(ValueError, match=r"task_vectors.* look at several data sets"):
        UnifiedConfig(compute_bombshell=True).selected()
    gradients = UnifiedConfig(
        compute_gradients=True, gradient_trajectory_steps=7, compute_gradient_flow=False
    ).selected()
    assert [(one.name, one.settings.get("steps")) for one in gradients] == [
        ("gradient_pathology", None), ("gradient_trajectory", 7),
    ]  # fmt: skip
    names = {"a": "a.jsonl", "b": "b.jsonl"}
    both = UnifiedConfig(compute_fisher=True, dataset_name=names, compute_qkov=False, compute_fisher_eigenvalues=False)
    one_task = ["fisher_information", "fisher_importance"]
    assert [one.name for one in UnifiedConfig(compute_fisher=True).selected()] == [*one_task, "fisher_methods"]
    assert [one.name for one in both.selected()] == [*one_task, "fisher_overlap", "cross_task_conflicts"]
    with pytest.raises(ValueError, match=r"field 'loss_landscape_spam'.*did you mean 'loss_landscape_span'"):
        UnifiedConfig.of({"loss_landscape_spam": 0.2})
    for name, bad in (("num_samples", "many"), ("compute_all", 1), ("seed", 1.5), ("loss_landscape_span", "x")):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            check_kind(name, bad, getattr(UnifiedConfig, name))
    with pytest.raises(ValueError, match="`num_samples` must be"):
        UnifiedConfig(num_samples=0)
    failed = analyze_models([str(tmp_path / "nowhere")], config(data, out, skip_on_error=True))
    assert "error" in failed.models[str(tmp_path / "nowhere")].metrics["mean_loss"]


def test_a_configuration_comes_from_a_file(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(asdict(UnifiedConfig(seed=7, metrics=("mean_loss",)))))
    (tmp_path / "a.toml").write_text('seed = 7\nmetrics = ["mean_loss"]\n')
    for ending in ("json", "toml"):
        assert UnifiedConfig.load(tmp_path / f"a.{ending}") == UnifiedConfig(seed=7, metrics=("mean_loss",))


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ('executor = "ray"', "`executor` must be 'dask' or 'dask:ADDRESS'"),
        ('executor = "dask:tcp://127.0.0.1:1"\nworkers = 2', "`workers` is of this machine"),
        ("workers = 0", "`workers` must be an integer of at least 1"),
    ],
)
def test_who_measures_is_refused_before_any_work(tmp_path, written, said):
    (tmp_path / "study.toml").write_text(written)
    with pytest.raises(ValueError, match=said):
        UnifiedConfig.load(tmp_path / "study.toml")


def test_a_configuration_names_who_measures(made, tmp_path, monkeypatch):
    """The workers that it names are opened for the study, and those that are passed count before them."""
    paths, data, out = made
    opened = []

    def threads(name, *, num):
        opened.append((name, num))
        return ThreadPoolExecutor(num)

    monkeypatch.setattr("funcscope.study.analyze.cluster", threads)
    (tmp_path / "study.json").write_text(json.dumps({"executor": "dask", "workers": 2}))
    chosen = UnifiedConfig.load(tmp_path / "study.json", **named(config(data, out)))
    assert not analyze_models(paths, chosen).failed
    assert opened == [("dask", 2)]
    with ThreadPoolExecutor(1) as own:
        assert all(outcome.reused for outcome in analyze_models(paths, chosen, executor=own).outcomes)
    assert len(opened) == 1


def named(chosen):
    """The fields in which a configuration differs."""
    usual = asdict(UnifiedConfig())
    return {name: value for name, value in asdict(chosen).items() if value != usual[name]}


@pytest.mark.slow
def test_processes_of_a_configuration_give_the_cells_of_one(made):
    paths, data, out = made
    alone = analyze_models(paths, config(data, out / "alone"))
    apart = analyze_models(paths, config(data, out / "apart", workers=2))
    assert [one.result for one in apart.outcomes] == [one.result for one in alone.outcomes]


def test_compute_all_is_everything_that_is_there():
    names = [one.name for one in UnifiedConfig(compute_all=True).selected()]
    assert len(names) == len(set(names)) >= 12
    assert {each.name for each in fields(UnifiedConfig)} >= {"metrics", "settings"}


BLOCKS = [
    {"compute_fisher": True, "compute_qkov": True, "fisher_batch_size": 128, "fisher_n_samples": 1000,
     "compute_fisher_eigenvalues": True, "enable_qkov_interference": True, "enable_cross_task_conflicts": True},
    {"batch_size": 16, "fisher_batch_size": 64, "max_batch_size": 64, "aggressive_cleanup": True,
     "compute_loss_landscape": True, "loss_landscape_n_points": 19},
    {"compute_loss_landscape": True, "loss_landscape_span": 0.1, "loss_landscape_normalization": "layer",
     "loss_landscape_batches": 10},
    {"compute_gradients": True, "gradient_trajectory_steps": 100, "compute_gradient_flow": True,
     "compute_gradient_pathology": True},
    *({flag: True, "batch_size": 32} for flag in ("compute_modularity", "compute_lottery")),
    {"compute_bombshell": True, "batch_size": 32, "dataset_name": {"a": "a.jsonl", "b": "b.jsonl"}},
    {"compute_information_theory": True, "batch_size": 32}, {"compute_representations": True, "batch_size": 32},
    {"batch_size": 32, "min_batch_size": 4, "adaptive_batch_sizing": True},
    {"enable_memory_tracking": True, "verbose": True}, {"max_memory_gb": 70.0, "skip_on_error": True},
    {"compute_all": True, "skip_on_error": True, "timeout_seconds": 300, "verbose": True},
    {"num_samples": 500, "fisher_n_samples": 500}, {"use_cache": True, "force_recompute": False},
    {"save_results": True, "save_plots": True, "output_dir": "./icml_submission"},
    {"device": "cuda", "dtype": "bfloat16", "compute_fisher": True, "fisher_top_k": 20, "seed": 42, "deterministic": True},
]  # fmt: skip
"""The documented configurations."""


@pytest.mark.parametrize("fields", BLOCKS, ids=lambda fields: next(iter(fields)))
def test_every_documented_configuration_is_accepted_and_selects_what_is_there(fields):
    chosen = UnifiedConfig(**fields)
    assert UnifiedConfig.of(json.loads(json.dumps(asdict(chosen)))) == chosen
    flags = {name for name in (*FLAGS, "compute_all") if fields.get(name)}
    if flags:
        assert {each for flag in flags - {"compute_all"} for each in chosen.asked_by(flag)} <= {
            one.name for one in chosen.selected()
        }
    if "compute_qkov" in fields:
        assert not UnifiedConfig(compute_qkov=False).enable_qkov_interference


@pytest.mark.slow
def test_the_model_of_the_configuration_and_its_base(made):
    paths, data, out = made
    alone = analyze_models(config=config(data, out, model_name=paths[0]))
    assert list(alone.models) == [paths[0]]
    based = analyze_models(paths[1:], config(data, out, base_model=paths[0], metrics=("linear_path",)))
    assert [o.subject for o in based.outcomes if o.metric == "linear_path"] == [
        f"{paths[0]} to {path}" for path in paths[1:]
    ]
    side = analyze_models(paths[:1], config({"a": data, "b": data}, out))
    first, second = (side.models[f"{paths[0]} on {name}"].metrics["mean_loss"].result for name in "ab")
    assert first == second == alone.models[paths[0]].metrics["mean_loss"].result


@pytest.mark.slow
def test_the_documented_classes_work_by_hand(made):
    paths, data, out = made
    chosen = config(data, out, compute_loss_landscape=True, loss_landscape_n_points=3)
    analyzer = fs.UnifiedModelAnalyzer(config=chosen)
    model, tokenizer = analyzer.load_model(paths[0])
    by_hand = analyzer.compute_loss_landscape(model, tokenizer)
    stored = analyzer.analyze_model(paths[0])
    assert by_hand["loss_landscape_2d"].result == stored["loss_landscape_2d"].result
    assert list(stored) == ["mean_loss", "loss_landscape_2d"]
    cache = fs.ResultCache(cache_dir=out / "cache")
    assert cache.get_stats()["num_entries"] == 2
    assert cache.get_stats()["total_size_mb"] > 0
    cache.clear_model_cache(paths[0])
    assert cache.get_stats()["num_entries"] == 0
    gradients = analyzer.compute_gradient_analysis(model, tokenizer)
    assert {"gradient_flow", "gradient_pathology"} <= gradients.keys()
    fs.cleanup_memory(verbose=False, reason="after")


@pytest.mark.slow
def test_the_documented_patterns_run(made):
    paths, data, out = made
    few = {
        "num_samples": 4,
        "fisher_n_samples": 4,
        "fisher_top_k": 1,
        "loss_landscape_n_points": 3,
        "loss_landscape_batches": 1,
    }
    few |= {"settings": {"fisher_information": {"num_probes": 2, "steps": 4, "trace_matvecs": 4}}, "dataset_name": data}
    chosen = fs.UnifiedConfig(
        model_name=paths[0],
        batch_size=32,
        max_batch_size=256,
        compute_fisher=True,
        compute_loss_landscape=True,
        seed=42,
        output_dir=str(out),
        save_results=True,
        verbose=False,
        **few,
    )
    results = fs.analyze_models(model_paths=paths[:2], config=chosen)
    for checkpoint in paths[:2]:  # comparing checkpoints
        fisher = results.models[checkpoint].metrics["fisher_information"]
        assert fisher["trace"] > 0
        assert fisher["effective_rank"] > 0
        assert f"{fisher['trace']:.2e}"
    for value in results.models[paths[0]].metrics.values():  # error handling
        assert not (isinstance(value, dict) and "error" in value)
    chosen.force_recompute = True
    again = fs.analyze_models(paths[:1], chosen)
    assert again.models[paths[0]].metrics["fisher_information"]["trace"] == fisher_of(results, paths[0])["trace"]
    assert json.dumps(asdict(chosen))  # saved beside the results


def fisher_of(results, path):
    return results.models[path].metrics["fisher_information"]


def test_metrics_of_a_user_get_everything_in_a_few_lines(made, tmp_path):
    class Sparsity(fs.Result):
        """How many weights are near zero."""

        share: float = fs.quantity("weights below the threshold", unit="share")

    def sparsity(theta, *, threshold=1e-2):
        """The share of weights below a threshold."""
        return Sparsity(float((theta.abs() < threshold).double().mean()))

    fs.register(fs.Metric("sparsity_of_mine", sparsity, needs=("theta",), settings={"threshold": 1e-2}))
    try:
        paths, data, out = made
        chosen = config(data, out, metrics=("sparsity_of_mine",), settings={"sparsity_of_mine": {"threshold": 0.1}})
        results = analyze_models(paths, chosen)
        line = results.trajectory("sparsity_of_mine", "share")
        assert line["step"].tolist() == [100, 200, 300]
        assert analyze_models(paths, chosen).outcomes[0].reused
        page = write_report(results, tmp_path / "page.html")
        assert "The share of weights below a threshold." in page.path.read_text()
    finally:
        del CATALOGUE["sparsity_of_mine"]


@pytest.mark.parametrize(("name", "value"), [("attention", "block"), ("remat", "layers"), ("split", "other")])
def test_a_choice_that_there_is_not_is_refused_before_any_work(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be one of .*, got '{value}'"):
        UnifiedConfig(**{name: value})
