"""The engine: cells, outcomes, statuses, resuming; whatever happens, the numbers are those of the pure calls."""

import dataclasses
import json
import pickle
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import results as made
import torch

import funcscope as fs
from funcscope.core.estimate import Estimate
from funcscope.core.result import Result, quantity
from funcscope.study.cache import Cache
from funcscope.study.catalogue import CATALOGUE, metric
from funcscope.study.engine import run
from funcscope.study.measures import mean_loss
from funcscope.study.meter import Options, memory_gb
from funcscope.study.metric import Metric, register
from funcscope.study.results import Results
from funcscope.study.sources import InMemory
from funcscope.view.quantities import figures

FEW = {
    "directional_losses": {"n_samples": 4},
    "landscape_flatness": {"n_directions": 4},
    "loss_landscape_2d": {"n_points": 3},
    "hessian_eigenvalues": {"num": 1, "num_probes": 2, "steps": 5, "trace_matvecs": 4},
    "fisher_information": {"num": 1, "num_probes": 2, "steps": 5, "trace_matvecs": 4},
    "hessian_trace": {"num": 2},
    "average_sharpness": {"num": 2},
    "jacobian_lens": {"num": 1},
    "mutual_information": {"dims": 1},
    "usable_information": {"num_classes": 2, "pca": None},
    "pid_analysis": {"num_classes": 2, "pca": None},
    "output_calibration": {"num": 20},
    "dimension_by_scale": {"neighbours": [2]},
    "layer_similarity": {"num": 19},
    "perturbation_gains": {"num": 1},
    "ricci_curvature": {"k": 2, "num": 4},
    "gradient_trajectory": {"steps": 2},
    "learning_coefficient": {"num_chains": 2, "num_steps": 12, "burn_in": 4},
    "learning_coefficient_sweep": {"num_chains": 2, "num_steps": 12, "burn_in": 4, "step_sizes": [1e-5, 3e-5, 1e-4]},
    "modularity_score": {"num": 4},
    "pruning_robustness": {"sparsities": [0.0, 0.5], "num_random": 2, "num_draws": 2},
    "structured_pruning": {"sparsities": [0.0, 0.5], "num_random": 2, "num_draws": 2, "scores": ["magnitude"]},
    "plasticity": {"num": 2, "steps": 2, "batch_size": 2},
    "winning_tickets": {"rounds": 1, "num": 2, "steps": 2, "batch_size": 2},
}


class Size(Result):
    """The size of the weights."""

    size: float = quantity("norm of the weights")
    squares: torch.Tensor = quantity("square", per="parameter")


def size(theta, *, power=2.0):
    """The norm of the weights."""
    return Size(float(theta.norm(p=power)), theta.square())


SIZE = Metric("size", size, ("theta",), {"power": 2.0})


def source(name="model", content="1", scale=1.0, at=None):
    return InMemory({"data": made.loss()}, name, theta=made.theta() * scale, content=content, at=at)


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def spoken():
    """A language model."""
    return InMemory({"data": made.language()}, "model", content="1")


def one(metric, cache=None, subject=None, **options):
    (outcome,) = run([metric], [subject or source()], cache=cache, options=Options(**options))
    return outcome


OF_TEXT = ("mechanistic", "information", "representation")
"""Categories of metrics that take a language model."""
SPOKEN = ("structured_pruning",)
"""Others that do."""
OF_ONE = sorted(name for name, each in CATALOGUE.items() if each.on == "model" and "loss" in each.needs)
"""Metrics of one model on its data."""


@pytest.mark.parametrize("name", OF_ONE)
def test_every_metric_gives_what_its_function_gives_and_comes_back_from_the_cache(name, cache):
    chosen = metric(name).configured(**FEW.get(name, {}))
    before = made.theta().clone()
    subject = spoken() if chosen.category in OF_TEXT or name in SPOKEN else source()
    first, again = one(chosen, cache, subject), one(chosen, cache, subject)
    assert first.ok, first.traceback
    assert (first.reused, again.reused) == (False, True)
    assert again.result == first.result
    assert torch.equal(made.theta(), before)
    assert first.result == made.timed_as(first.result, one(chosen, subject=subject).result)  # without a cache
    assert str(first.result)
    assert first.result._repr_html_()
    frame = first.result.frame()
    assert not frame.empty
    assert "rank" not in frame or frame["rank"].dropna().min() == 1
    for word in chosen.sentence.replace("}", "{").split("{")[1::2]:
        assert word in first.result.asdict(), word


def test_the_sample_is_that_of_the_direct_call(cache):
    outcome = one(metric("directional_losses").configured(n_samples=4), cache)
    settings = {"two_sided": True, "compute_gradient": True, "compute_curvature": True}
    direct = fs.directional_losses(
        made.loss(), made.loss().layout.unravel(made.theta()), key=fs.key(42), n_samples=4, span=0.1, **settings
    )
    assert outcome.result == direct


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({}, True),
        ({"content": "2"}, False),
        ({"scale": 2.0}, False),
        ({"name": "other"}, False),
        ({"settings": {"power": 1.0}}, False),
        ({"version": 2}, False),
        ({"plan": {"chunk": 4}}, True),
    ],
)
def test_what_decides_whether_an_outcome_is_used_again(change, again, cache):
    changed = {name: value for name, value in change.items() if name in ("settings", "version", "plan")}
    where = {name: value for name, value in change.items() if name not in changed}
    chunked = dataclasses.replace(
        SIZE, call=lambda theta, *, power=2.0, chunk=8: size(theta, power=power), plan={"chunk": 8}
    )
    assert not one(chunked, cache).reused
    assert one(dataclasses.replace(chunked, **changed), cache, source(**where)).reused == again


def test_the_seed_decides_for_metrics_with_draws_only(cache):
    drawn = metric("hessian_trace").configured(num=2)
    assert not one(drawn, cache).reused
    assert not one(drawn, cache, seed=1).reused
    assert not one(SIZE, cache).reused
    assert one(SIZE, cache, seed=1).reused


def test_what_has_no_known_content_is_never_used_again(cache):
    unknown = source(content=None)
    assert [one(SIZE, cache, unknown).reused for _ in range(2)] == [False, False]


@pytest.mark.parametrize("harm", [lambda data: data[:100], lambda data: data[:-3] + b"xyz", lambda _: b""])
def test_a_damaged_entry_is_set_aside_and_made_again(harm, cache):
    first = one(SIZE, cache)
    (path,) = cache.entries()
    path.write_bytes(harm(path.read_bytes()))
    with pytest.warns(UserWarning, match=r"could not be read and is now .* it is made again"):
        again = one(SIZE, cache)
    assert not again.reused
    assert again.result == first.result
    assert len(list(path.parent.glob("*.unreadable"))) == 1
    assert one(SIZE, cache).reused


def test_an_entry_of_other_contents_is_not_believed(cache):
    one(SIZE, cache)
    (path,) = cache.entries()
    other = source(scale=2.0)
    one(SIZE, cache, other)
    (second,) = set(cache.entries()) - {path}
    second.write_bytes(path.read_bytes())  # as if two contents had one name
    with pytest.warns(UserWarning, match="belongs to other contents"):
        assert not one(SIZE, cache, other).reused


def failing(theta):
    raise ArithmeticError("no such luck")


def test_a_failure_is_an_outcome_and_the_others_go_on(cache):
    bad = Metric("bad", failing, ("theta",))
    first, second = run([bad, SIZE], [source()], cache=cache)
    assert (first.status, first.error, first.error_type) == ("failed", "no such luck", "ArithmeticError")
    assert "failing" in first.traceback
    assert second.ok
    assert one(bad, cache).reused
    assert not one(bad, cache, retry_failed=True).reused
    with pytest.raises(ArithmeticError):
        one(bad, skip_on_error=False)
    values = Results((first, second)).models["model"].metrics
    assert values["bad"]["error"] == "no such luck"
    assert isinstance(values["bad"], dict)
    assert "error" not in values["size"]
    assert values["size"]["size"] == float(made.theta().norm())
    with pytest.raises(ValueError, match="bad of model has no result: no such luck"):
        _ = values["bad"].result


@pytest.mark.parametrize("value", [{"x": 1.0}, 3.0, None])
def test_what_is_no_result_is_refused_with_what_to_do(value):
    outcome = one(Metric("mine", lambda theta: value, ("theta",)))
    assert outcome.status == "failed"
    assert "fs.quantity" in outcome.error


def test_a_need_that_failed_is_said_and_a_need_that_is_there_is_given(cache):
    class Twice(Result):
        twice: float = quantity("twice the size")

    def twice(found):
        return Twice(2 * found.size)

    double = Metric("double", twice, ("size",))
    first, second = run([SIZE, double], [source()], cache=cache)
    assert second.result.twice == 2 * first.result.size
    before, after = run(
        [double, dataclasses.replace(SIZE, call=failing, settings={}, version=2)], [source()], cache=cache
    )
    assert (before.status, after.status) == ("failed", "skipped")  # what is needed comes first
    assert "size" in after.error


def forever(loss, theta):
    while True:
        loss(theta)


def test_an_endless_metric_is_ended_and_tried_again(cache):
    endless = Metric("endless", forever)
    started = time.monotonic()
    outcome = one(endless, cache, timeout_seconds=0.2)
    assert time.monotonic() - started < 5
    assert outcome.status == "timeout"
    assert outcome.cost["forwards"] > 1
    assert "timeout_seconds" in outcome.error
    assert not one(endless, cache, timeout_seconds=0.1).reused


def test_a_cap_on_memory_ends_a_metric():
    outcome = one(Metric("endless", forever), max_memory_gb=1e-6)
    assert outcome.status == "out of memory"
    assert "max_memory_gb" in outcome.error


class Hungry:
    """A function that does not fit above some chunk and some batch."""

    def __init__(self, chunk, rows):
        self.chunk, self.rows, self.tried = chunk, rows, []

    def __call__(self, loss, params, *, key, chunk=None):
        self.tried.append((chunk, loss.batch_size))
        if (chunk or 99) > self.chunk or loss.batch_size > self.rows:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        settings = {"two_sided": True, "compute_gradient": False, "compute_curvature": True}
        return fs.directional_losses(loss, params, key=key, n_samples=5, span=0.1, chunk=chunk, **settings)


@pytest.mark.slow
def test_out_of_memory_halves_the_chunk_then_the_batches_on_the_same_sample(cache):
    needs = ("loss", "params", "key")
    roomy = one(Metric("roomy", Hungry(99, 99), needs, plan={"chunk": 8}))
    call = Hungry(2, 3)
    tight = one(Metric("tight", call, needs, plan={"chunk": 8}), cache, min_batch_size=2)
    assert call.tried == [(8, 6), (4, 6), (2, 6), (1, 6), (1, 3)]
    assert tight.ok, tight.traceback
    assert (tight.plan["chunk"], tight.plan["batch_size"]) == (1, 3)
    torch.testing.assert_close(tight.result.losses, roomy.result.losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(tight.result.baseline_loss, roomy.result.baseline_loss, rtol=1e-12, atol=0)
    assert one(Metric("tight", call, needs, plan={"chunk": 8}), cache).reused
    hopeless = one(Metric("tight", Hungry(0, 0), needs, plan={"chunk": 8}), min_batch_size=2)
    assert hopeless.status == "out of memory"
    assert hopeless.result is None


class Interrupted:
    """A sampling that is stopped after some rows, as by Ctrl-C, when it is told to."""

    def __init__(self, sampling, stop):
        self.sampling, self.stop, self.plan, self.first = sampling, stop, None, None
        self.result = sampling.result

    def rows(self, first):
        self.first = first
        for row in self.sampling.rows(first):
            yield row
            if self.stop is not None:
                raise KeyboardInterrupt


def test_an_interrupted_metric_goes_on_from_its_rows_with_the_same_bits(cache):
    whole = metric("directional_losses").configured(n_samples=6, chunk=2)
    seen = []

    def metric_that_stops(stop):
        def call(*args, **settings):
            seen.append(Interrupted(whole.call(*args, **settings), stop))
            return seen[-1]

        return dataclasses.replace(whole, call=call)

    with pytest.raises(KeyboardInterrupt):
        one(metric_that_stops(1), cache)
    left = list(cache.root.rglob("*.rows.npz"))
    assert len(left) == 1
    resumed = one(metric_that_stops(None), cache)
    assert seen[-1].first == 2
    assert resumed.result == one(whole).result
    assert not list(cache.root.rglob("*.rows.npz"))


def test_subjects_are_opened_for_what_is_missing_only(cache):
    opened = []

    class Counted(InMemory):
        def open(self):
            opened.append(self.name)
            return super().open()

    subject = Counted({"data": made.loss()}, content="1")
    run([SIZE], [subject], cache=cache)
    run([SIZE], [subject], cache=cache)
    assert opened == ["model"]
    run([SIZE, metric("mean_loss")], [subject], cache=cache)
    assert opened == ["model"] * 2


@pytest.mark.parametrize("executor", [ThreadPoolExecutor, pytest.param(ProcessPoolExecutor, marks=pytest.mark.slow)])
def test_workers_give_what_one_gives(executor, cache):
    chosen = [metric("effective_dimensionality"), metric("mean_loss")]
    threads = executor is ThreadPoolExecutor
    sources = [source(f"model-{i}", scale=1.0 + i) for i in range(3)] if threads else files(cache)
    tasks = ("data",) if threads else ("train",)
    alone = run(chosen, sources, tasks=tasks)
    more = {} if threads else {"mp_context": get_context("spawn")}  # torch's threads do not survive a fork
    with executor(2, **more) as workers:
        shared = run(chosen, sources, tasks=tasks, cache=cache, executor=workers)
    assert [(o.subject, o.metric) for o in shared] == [(o.subject, o.metric) for o in alone]
    assert [o.result for o in shared] == [o.result for o in alone]


def files(cache):
    """Checkpoints of a small family run: they travel to other processes."""
    from funcscope.families import modular
    from funcscope.families.family import Setup
    from funcscope.study.sources import Checkpoint
    from funcscope.study.training import trained

    config = modular.Config(p=5, d_model=8, d_mlp=8, steps=2)
    variant = trained(modular.FAMILY, Setup(config, (0, 1, 2)), cache.root.parent / "run", quiet=True)
    return [Checkpoint(str(variant.path), step) for step in (0, 1, 2)]


def test_frames_trajectories_and_a_study_that_opens_without_its_models(cache, tmp_path):
    sources = [source(f"m{step}", scale=1 + step / 10, at=step) for step in (20, 0, 10)]
    results = Results(tuple(run([SIZE, metric("mean_loss")], sources, cache=cache)))
    line = results.trajectory("size", "size")
    assert line["step"].tolist() == [0, 10, 20]
    np.testing.assert_allclose(line["value"], float(made.theta().norm()) * np.array([1, 2, 3]))
    with pytest.raises(ValueError, match="several numbers at every step"):
        results.trajectory("size", "squares")
    with pytest.raises(ValueError, match="did you mean 'size'"):
        results.trajectory("sizes", "size")
    with pytest.raises(ValueError, match="did you mean 'size'"):
        results.trajectory("size", "sise")
    frame = results.to_frame()
    assert set(frame["metric"]) == {"size", "mean_loss"}
    assert set(frame["model"]) == {"m0", "m10", "m20"}
    loss = results.trajectory("mean_loss", "loss")
    assert (loss["stderr"] > 0).all()
    results.save(tmp_path, {})
    opened = Results.open(tmp_path)
    assert [o.result for o in opened.outcomes] == [o.result for o in results.outcomes]
    assert opened.to_frame().equals(frame)
    cache.clear_model_cache("m10")
    lost = [o for o in Results.open(tmp_path).outcomes if o.subject == "m10"]
    assert len(lost) == len([o for o in results.outcomes if o.subject == "m10"])
    assert all(o.status == "failed" and "run the same study again" in o.error for o in lost)
    assert (lost[0].step, lost[0].group) == (10, "m")
    with pytest.raises(FileNotFoundError, match="holds no study"):
        Results.open(tmp_path / "cache")


def test_a_cache_says_its_size_is_limited_and_cleared(tmp_path):
    cache = Cache(tmp_path / "cache", max_mb=0.01)
    sources = [source(f"m{i}", scale=1.0 + i) for i in range(4)]
    run([SIZE], sources, cache=cache)
    assert 0 < cache.get_stats()["total_size_mb"] <= 0.01
    assert 0 < cache.get_stats()["num_entries"] < 4
    assert one(SIZE, cache, sources[-1]).reused  # the last one stayed
    cache.clear_all()
    assert cache.get_stats() == {"num_entries": 0, "total_size_mb": 0.0}


def test_names(cache):
    with pytest.raises(ValueError, match="two subjects are called 'model'"):
        run([SIZE], [source(), source()], cache=cache)
    with pytest.raises(ValueError, match=r"no metric 'hessian_trase': did you mean 'hessian_trace'"):
        metric("hessian_trase")
    with pytest.raises(ValueError, match=r"hessian_trace has no setting 'nun': did you mean 'num'"):
        metric("hessian_trace").configured(nun=3)
    with pytest.raises(ValueError, match="choose another"):
        register(Metric("hessian_trace", size, ("theta",)))
    with pytest.raises(ValueError, match="small letters"):
        Metric("No", size)
    asked = one(Metric("odd", size, ("weights",)))
    assert asked.status == "failed"
    assert "does not provide 'weights'" in asked.error


def test_a_subject_with_a_hostile_name_stays_in_the_cache(cache, tmp_path):
    hostile = source("../../etc/<b>x</b>")
    assert not one(SIZE, cache, hostile).reused
    assert one(SIZE, cache, hostile).reused
    assert all(cache.root in path.parents for path in tmp_path.rglob("*.npz"))
    assert "<b>" not in Results((one(SIZE, cache, hostile),))._repr_html_()


def test_a_value_that_is_not_finite_is_kept_as_it_is(cache):
    class Odd(Result):
        odd: Estimate = quantity("odd")

    lost = Metric("lost", lambda theta: Odd(Estimate.of(theta[:1] * float("nan"))), ("theta",))
    assert np.isnan(float(one(lost, cache).result.odd.value))
    again = one(lost, cache)
    assert again.reused
    assert np.isnan(float(again.result.odd.value))
    json.loads(json.dumps(again.content, allow_nan=False))


def test_cost_is_counted_and_memory_is_logged(capsys):
    outcome = one(metric("hessian_trace").configured(num=3), log_memory=True)
    assert outcome.cost["products"] == 3
    assert outcome.cost["seconds"] > 0
    shown = capsys.readouterr().err
    assert "Before hessian_trace" in shown
    assert "After hessian_trace" in shown
    assert memory_gb() > 0.05


def test_a_study_with_a_model_that_is_not_there_opens_again(cache, tmp_path):
    class Missing(InMemory):
        def digest(self, sums):
            raise FileNotFoundError("no such folder")

    results = Results(tuple(run([SIZE], [source(), Missing({"data": made.loss()}, "gone")], cache=cache)))
    results.save(tmp_path, {})
    opened = Results.open(tmp_path)
    assert [(o.subject, o.status, o.error) for o in opened.outcomes] == [
        ("model", "ok", ""), ("gone", "failed", "no such folder")
    ]  # fmt: skip
    assert opened.outcomes[0].result == results.outcomes[0].result


def test_what_is_not_resolved_is_a_hole_in_figures_and_marked_in_trajectories(cache):
    class Perhaps(Result):
        value: Estimate = quantity("something", unit="loss")

        @property
        def unresolved(self):
            return ["value"] if float(self.value.value) < 1.5 else []

    perhaps = Metric("perhaps", lambda theta: Perhaps(Estimate.of(theta[:1] * 0 + theta.norm())), ("theta",))
    scale = 1 / float(made.theta().norm())
    outcomes = run([perhaps], [source(f"m{i}", scale=scale * i, at=i) for i in (1, 2, 3)], cache=cache)
    assert Results(tuple(outcomes)).trajectory("perhaps", "value")["resolved"].tolist() == [False, True, True]
    (drawn,) = figures(outcomes)
    (line,) = [trace for trace in drawn.figure.data if len(trace.x) == 3]
    assert np.isnan(line.y).tolist() == [True, False, False]
    assert "1 of 3" in drawn.caption


def test_a_loss_that_is_nan_or_of_one_sequence_says_so():
    loss, theta = made.loss(), made.theta()
    assert "the loss is nan" in mean_loss(loss, loss.layout.unravel(theta * float("nan"))).notes[0]
    inputs = fs.normal(fs.key(1), torch.zeros(1, 3, dtype=torch.float64))
    single = mean_loss(
        fs.objective(loss.net, [(inputs, torch.tensor([1]))], fs.classification), loss.layout.unravel(theta)
    )
    assert single.loss.stderr.isnan()
    assert "one sequence" in single.notes[0]
    assert not mean_loss(loss, loss.layout.unravel(theta)).notes


def test_a_metric_travels_with_its_version_and_where_it_looks():
    sent = dataclasses.replace(metric("loss_lines").configured(at="every", num=5), version=7)
    there = pickle.loads(pickle.dumps(sent))
    assert (there.call, there.version, there.at, there.settings) == (sent.call, 7, "every", sent.settings)


def test_a_study_that_opens_has_its_own_steps_and_runs(cache, tmp_path):
    for step, run_name in ((5, "first"), (7, "second")):  # the same model under the same name, elsewhere in training
        subject = InMemory({"data": made.loss()}, "model", theta=made.theta(), content="1", at=step, run=run_name)
        folder = tmp_path / run_name
        Results(tuple(run([SIZE], [subject], cache=Cache(tmp_path / "cache")))).save(folder, {})
        (folder / "cache").symlink_to(tmp_path / "cache")
    opened = [Results.open(tmp_path / name).outcomes[0] for name in ("first", "second")]
    assert [(o.step, o.group) for o in opened] == [(5, "first"), (7, "second")]
