"""Metrics of pairs and of series: which subjects they see, and that they give what the functions give."""

from dataclasses import dataclass

import numpy as np
import pytest
import results as made
import torch
from problems import seeded

import funcscope as fs
from funcscope.core.store import load, save
from funcscope.families import modular
from funcscope.families.family import Family, Kept, Setup, register
from funcscope.study.analyze import checkpoints_of
from funcscope.study.cache import Cache, Outcome
from funcscope.study.catalogue import CATALOGUE, metric
from funcscope.study.engine import run
from funcscope.study.metric import Metric
from funcscope.study.parameter_metrics import GRADIENTS, WEIGHTS
from funcscope.study.results import Results
from funcscope.study.sources import InMemory
from funcscope.study.together import arranged, groups_of, phases_of
from funcscope.study.training import trained

SCALES = {0: 0.2, 10: 1.0, 20: 1.5, 30: 0.7, 40: 2.0}


class Seen(fs.Result):
    total: float = fs.quantity("sum")


def source(step, **more):
    options = {"name": f"run@{step}", "theta": SCALES[step] * made.theta() + step / 100, "run": "run", "content": "1"}
    return InMemory({"data": made.loss()}, at=step, **{**options, **more})


@pytest.fixture
def sources():
    return [source(step) for step in (20, 0, 10, 40, 30)]


def test_a_run_is_in_the_order_of_its_steps_and_its_phases_are_three(sources):
    ((name, members),) = groups_of(sources).items()
    assert (name, [one.step for one in members]) == ("run", [0, 10, 20, 30, 40])
    assert [one.step for one in phases_of(members)] == [0, 20, 40]
    assert [one.step for one in phases_of(members[:3])] == [0, 10, 20]


def test_which_metric_looks_at_which_subject(sources):
    alone = [InMemory({"data": made.loss()}, name) for name in "abc"]
    every, some = (Metric(name, abs, ("theta",), at=at) for name, at in (("every", "every"), ("some", "phases")))
    pair, series = (Metric(on, abs, ("thetas",), on=on) for on in ("pair", "series"))
    seen = {
        one.id: [each.name for each in about]
        for one, about in arranged([pair, every, series, some], [*sources, *alone])
    }
    assert seen == {
        **{f"run@{step}": ["every", "some"] if step % 20 == 0 else ["every"] for step in (20, 0, 10, 40, 30)},
        "a": ["every", "some"], "b": ["every", "some"], "c": ["every", "some"],
        "run@20 to run@40": ["pair"], "a to b": ["pair"], "a to c": ["pair"], "run": ["series"], "all models": ["series"],
    }  # fmt: skip


@pytest.mark.slow
def test_pairs_and_series_give_what_their_functions_give(sources, tmp_path):
    few = {"directional_losses": {"n_samples": 4}, "linear_path": {"num": 5}, "barrier_matrix": {"num": 3},
           "trajectory_plane": {"num": 3}, "bezier_connection": {"steps": 2, "num": 3}}  # fmt: skip
    names = (
        "directional_comparison",
        "directional_losses",
        "linear_path",
        "barrier_matrix",
        "trajectory_plane",
        "bezier_connection",
    )
    study = [metric(name).configured(**few.get(name, {})) for name in names]
    cache = Cache(tmp_path)
    outcomes = run(study, sources, cache=cache)
    assert [o.error for o in outcomes if not o.ok] == []
    got = {(o.subject, o.metric): o.result for o in outcomes}
    thetas = {one.step: one.theta for one in sources}
    loss, pair = made.loss(), "run@20 to run@40"
    sampled = [got[f"run@{step}", "directional_losses"] for step in (20, 40)]
    assert got[pair, "directional_comparison"] == fs.compare_directional(*sampled, names=("run@20", "run@40"))
    assert got[pair, "linear_path"] == fs.linear_path(loss, thetas[20], thetas[40], num=5)
    assert got[pair, "bezier_connection"] == fs.connect(loss, thetas[20], thetas[40], key=fs.key(42), steps=2, num=3)
    ordered = [thetas[step] for step in sorted(thetas)]
    assert got["run", "barrier_matrix"] == fs.barrier_matrix(
        loss, ordered, num=3, names=[f"run@{s}" for s in sorted(thetas)]
    )
    plane, path = got["run", "trajectory_plane"], fs.principal_directions(ordered)
    torch.testing.assert_close(plane.coordinates, path.coordinates)
    centre = loss(
        path.origin
        + path.axes.vectors.T.to(path.origin) @ torch.stack([x[1] for x in plane.surface.places]).to(path.origin)
    )
    torch.testing.assert_close(plane.grid_losses[1, 1], centre.double(), rtol=1e-6, atol=0)
    again = run(study, sources, cache=cache)
    assert all(o.reused for o in again)
    assert [o.result for o in again] == [o.result for o in outcomes]
    assert list(Results(tuple(again)).groups) == ["run"]
    moved = [source(20, theta=2 * made.theta()), *sources[1:]]
    anew = {(o.subject, o.metric) for o in run(study, moved, cache=cache) if not o.reused}
    assert anew == {("run@20", m) for m in ("mean_loss", "directional_losses")} | {
        (s, m) for s, m in got if s in (pair, "run")
    }


def test_two_models_that_read_other_data_are_not_compared():
    half = fs.objective(made.loss().net, [(torch.ones(2, 3), torch.zeros(2, dtype=torch.long))], made.loss().criterion)
    first = InMemory({"data": made.loss()}, "a")
    second = InMemory({"data": half}, "b")
    *_, outcome = run([metric("directional_comparison")], [first, second])
    assert outcome.status in ("failed", "skipped")
    assert outcome.result is None


def test_members_are_opened_one_at_a_time(sources):
    opened = []

    class Counted(InMemory):
        def open(self):
            opened.append(self.at)
            return super().open()

    counted = [Counted(each.losses, each.name, each.theta, each.at, each.content, each.run) for each in sources]

    def total(members):
        return Seen(sum(float(member.theta.sum()) for member in members))

    *_, outcome = run([Metric("total", total, ("members",), on="series")], counted)
    assert outcome.result.total == pytest.approx(sum(float(one.theta.sum()) for one in sources))
    assert opened[-5:] == [0, 10, 20, 30, 40]


def test_curves_are_those_of_the_run(sources):
    class Trained(InMemory):
        def curves(self):
            columns = {
                f"{split}_{what}": np.array([0.5, 1.0]) for split in ("train", "test") for what in ("loss", "accuracy")
            }
            return {"step": np.array([0, 40]), **columns}

    trained = [Trained(each.losses, each.name, each.theta, each.at, each.content, each.run) for each in sources]
    (outcome,) = run([metric("training_curves")], trained)
    assert (outcome.subject, outcome.group, outcome.step) == ("run", "run", None)
    assert outcome.result.coords["step"] == [0, 40]
    (missing,) = run([metric("training_curves")], sources)
    assert "does not provide 'curves'" in missing.error


def test_models_on_several_data_are_together_with_those_on_the_same():
    class On(InMemory):
        on = property(lambda self: self.name[-1])

    models = [On({"data": made.loss()}, name) for name in ("a on p", "a on q", "b on p", "b on q")]
    pair, series = (Metric(on, abs, ("thetas",), on=on) for on in ("pair", "series"))
    assert [one.id for one, _ in arranged([pair, series], models)] == [
        "a on p to b on p", "a on q to b on q", "all models on p", "all models on q",
    ]  # fmt: skip
    assert [one.id for one, _ in arranged([pair], models[2:], models[:2])] == ["a on p to b on p", "a on q to b on q"]


def test_a_series_of_the_same_weights_under_other_names_has_its_own(tmp_path):
    for names in ("ab", "cd"):
        models = [
            InMemory({"data": made.loss()}, name, s * made.theta(), content="1")
            for name, s in zip(names, (1, 2), strict=True)
        ]
        (outcome,) = run([metric("barrier_matrix").configured(num=3)], models, cache=Cache(tmp_path))
        assert outcome.result.names == tuple(names)


def test_a_plane_of_two_checkpoints_says_that_it_needs_more(sources):
    (outcome,) = run([metric("trajectory_plane").configured(num=3)], sources[:2])
    assert "three checkpoints" in outcome.error


@pytest.mark.parametrize("name", sorted(made.EXAMPLES))
@pytest.mark.parametrize("step", [None, 7])
def test_a_frame_has_every_axis_of_every_result(name, step):
    result = made.example(name)
    outcome = Outcome("some", "m", step, "data", "ok", result)
    frame, own = Results((outcome,)).to_frame(), result.frame()
    assert frame.columns.is_unique
    columns = [f"{each}_of" if f"{each}_of" in frame else each for each in own.columns]
    assert frame[columns].set_axis(own.columns, axis=1).equals(own)
    assert frame["model"].eq("m").all()
    assert len(Results((Outcome("other", "m", 3, "data", "failed"), outcome)).to_frame()) == len(own) + 1


def test_a_comparison_has_the_unit_of_the_losses_that_it_compares(sources):
    about = [
        metric("directional_losses").configured(n_samples=3),
        *map(metric, ("loss_comparison", "directional_comparison")),
    ]
    outcomes = run([metric("mean_loss"), *about], sources[:2])
    assert {o.unit for o in outcomes} == {made.loss().criterion.unit} != {"loss"}


def normalising(keep_buffers):
    """A family whose network tracks running statistics, and keeps them beside the parameters or not."""

    @dataclass(frozen=True)
    class Config:
        name: str = "normalising"

    x = fs.normal(fs.key(0), torch.empty(8, 3))

    def train(config, folder, steps):
        for step in steps:
            model = torch.nn.BatchNorm1d(3)
            with torch.no_grad():
                model.weight += step
                model(x * (1 + step))
            save(folder / "checkpoints" / f"step_{step:05d}.safetensors", dict(model.state_dict()), {})
            yield modular.Point(step, 1.0, 1.0, 0.0, 0.0)

    def checkpoint(config, folder, step):
        stored = load(folder / "checkpoints" / f"step_{step:05d}.safetensors")
        params = {name: stored.arrays[name] for name in ("weight", "bias")}
        buffers = {name: stored.arrays[name] for name in ("running_mean", "running_var")}
        return Kept(params, stored.sha256, buffers) if keep_buffers else Kept(params, stored.sha256)

    return Family(
        f"normalising {keep_buffers}", {"one": Setup(Config(), (0, 3))}, Config,
        lambda config: fs.functional(torch.nn.BatchNorm1d(3)),
        lambda config, split: [(x, torch.arange(8) % 3)], fs.classification, train, checkpoint,
    )  # fmt: skip


def test_a_checkpoint_is_looked_at_with_its_own_running_statistics(tmp_path):
    """Oracle: the plain module of each checkpoint."""
    own = register(normalising(True))
    made_run = trained(own, own.setup("one"), tmp_path, quiet=True)
    outcomes = run([metric("mean_loss"), metric("linear_path")], checkpoints_of(tmp_path), tasks=("train",))
    assert not [o.error for o in outcomes if not o.ok]
    x, y = next(iter(own.batches(None, "train")))
    expected = []
    for step in (0, 3):
        model = torch.nn.BatchNorm1d(3).eval()
        model.load_state_dict(load(made_run.path / "checkpoints" / f"step_{step:05d}.safetensors").arrays)
        expected.append(float(torch.nn.functional.cross_entropy(model(x), y).detach()))
    assert [float(o.result.loss.value) for o in outcomes[:2]] == pytest.approx(expected, rel=1e-6)
    assert outcomes[2].result.losses[[0, -1]].tolist() == pytest.approx(expected, rel=1e-6)
    assert abs(expected[0] - expected[1]) > 0.1


def test_a_checkpoint_without_its_running_statistics_is_refused(tmp_path):
    own = register(normalising(False))
    trained(own, own.setup("one"), tmp_path, quiet=True)
    for outcome in run([metric("mean_loss")], checkpoints_of(tmp_path), tasks=("train",)):
        assert outcome.result is None
        assert "running_mean" in outcome.error
        assert "Kept(params, sha256, buffers)" in outcome.error


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    own = register(normalising(True))
    made_run = trained(own, own.setup("one"), tmp_path, quiet=True)
    wrong = dict(torch.nn.BatchNorm1d(4).state_dict())
    save(made_run.path / "checkpoints" / "step_00003.safetensors", wrong, {})
    first, second = run([metric("mean_loss")], checkpoints_of(tmp_path), tasks=("train",))
    assert first.ok
    assert "checkpoint 3" in second.error


def test_a_theta_without_its_running_statistics_is_no_end_of_a_path():
    net = fs.functional(torch.nn.BatchNorm1d(3))
    loss = fs.objective(net, [(fs.normal(fs.key(0), torch.empty(8, 3)), torch.arange(8) % 3)], fs.classification)
    models = [InMemory({"data": loss}, name, scale * net.theta) for name, scale in (("a", 1.0), ("b", 2.0))]
    for outcome in run([metric("linear_path"), metric("barrier_matrix")], models):
        assert outcome.result is None
        assert "running" in outcome.error


def test_models_of_other_shapes_have_no_directions_in_common():
    x, y = fs.normal(fs.key(0), torch.empty(8, 3)), torch.arange(8) % 2
    models = []
    for name, width in (("a", 4), ("b", 5)):
        module = seeded(
            width, lambda width=width: torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Linear(width, 2))
        )
        models.append(InMemory({"data": fs.objective(fs.functional(module), [(x, y)], fs.classification)}, name))
    *_, outcome = run([metric("directional_comparison")], models)
    assert outcome.result is None
    assert "no directions in common" in outcome.error


def test_numbers_that_are_not_resolved_have_no_mean_over_seeds(tmp_path):
    class Perhaps(fs.Result):
        value: float = fs.quantity("something")
        other: float = fs.quantity("another")

        @property
        def unresolved(self):
            return ["value"] if self.value > 1 else []

    odd = Metric("perhaps_of_mine", lambda *, key: Perhaps(float(key.seed), 1.0), ("key",))
    fs.register(odd)
    try:
        config = fs.UnifiedConfig(metrics=("perhaps_of_mine",), output_dir=str(tmp_path), verbose=False)
        model = InMemory({t: made.loss() for t in ("data", "fisher", "landscape")}, "m", content="1")
        over = fs.sweep([model], config, {"seed": [0, 1, 2, 3]}).over_seeds().set_index("quantity")
        assert (over.loc["value", "value"], over.loc["value", "num"]) == (0.5, 2)
        assert over.loc["other", "num"] == 4
    finally:
        CATALOGUE.pop("perhaps_of_mine", None)


class Merged(fs.Result):
    """What a metric of experts sees."""

    losses: torch.Tensor = fs.quantity("loss", per=("task", "other task"))
    base: float = fs.quantity("norm of the base")


def merged(losses, experts, theta):
    values = [[loss(each).double() for each in experts.values()] for loss in losses.values()]
    assert [*losses] == [*experts] == ["prose", "code"]
    return Merged(torch.tensor(values, dtype=torch.float64), float(theta.norm()))


def of_two(name, scale):
    half = fs.objective(
        made.loss().net, [(torch.ones(2, 3).double(), torch.zeros(2, dtype=torch.long))], made.loss().criterion
    )
    losses = {"prose": made.loss(), "code": half}
    return InMemory(losses, name, theta=scale * made.theta(), content="1")


@pytest.mark.parametrize(
    "names", [("prose", "base", "code"), ("base", "one", "two"), ("runs/base", "runs/code", "runs/prose")]
)
def test_models_that_were_fine_tuned_are_with_their_base_and_every_data_set(names, tmp_path):
    one = Metric("merged", merged, ("task_losses", "experts", "theta"), on="experts")
    scales = dict(zip(names, (1.0, 2.0, 3.0), strict=True))
    sources = [of_two(name, scale) for name, scale in scales.items()]
    base = next(each for each in sources if each.id.endswith("base"))
    outcomes = run([one], sources, tasks=("prose", "code"), bases=[base], cache=Cache(tmp_path))
    assert [o.error for o in outcomes] == [""]
    first, second = (sources[[n.endswith(x) for n in names].index(True)] if any(n.endswith(x) for n in names) else y
                     for x, y in (("prose", sources[1]), ("code", sources[2])))  # fmt: skip
    expected = [[float(loss(each.theta)) for each in (first, second)] for loss in sources[0].losses.values()]
    torch.testing.assert_close(outcomes[0].result.losses, torch.tensor(expected, dtype=torch.float64))
    assert outcomes[0].result.base == float(base.theta.norm())
    assert run([one], sources, tasks=("prose", "code"), bases=[base], cache=Cache(tmp_path))[0].reused


def test_a_model_without_experts_is_named():
    one = Metric("merged", merged, ("task_losses", "experts", "theta"), on="experts")
    with pytest.warns(UserWarning, match="fine-tuned from one base"):
        assert run([one], [of_two("base", 1.0), of_two("one", 2.0)], tasks=("prose", "code")) == []


def fine_tuned(name, scale, run=""):
    """A language model on two data sets, moved by `scale`."""
    net = made.language().net
    ids = {task: seeded(seed, lambda: torch.randint(1, 9, (6, 5))) for task, seed in (("prose", 1), ("code", 2))}
    losses = {task: fs.objective(net, [{"input_ids": each}], fs.causal_lm) for task, each in ids.items()}
    theta = net.theta + scale * fs.normal(fs.fold_in(fs.key(7), name), net.theta)
    step = int(name.rpartition("@")[2]) if run else None
    return InMemory(losses, name, theta=theta, at=step, run=run, content="1")


SEVERAL = {
    "gradient_aggregation": {"methods": ["mean"]},
    "gradient_alignment": {"num": 19},
    "influence": {"damping": 1.0},
    "merge_curves": {"coefficients": [0.0, 1.0], "num": 2},
    "most_influential": {"damping": 1.0},
    "separability": {"num": 19},
    "ties_merging": {"coefficients": [0.0, 1.0]},
    "fisher_merging": {"coefficients": [0.0, 1.0], "num": 2},
}
"""Of metrics of several subjects, settings for small data."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(one.name, marks=pytest.mark.slow) if one.name == "merge_curves" else one.name
        for one in (*GRADIENTS, *WEIGHTS)
        if one.on != "model"
    ],
)
def test_every_metric_of_several_gives_what_its_function_gives_and_comes_back_from_the_cache(name, tmp_path):
    one = metric(name).configured(**SEVERAL.get(name, {}))
    if one.on == "series":
        sources = [fine_tuned(f"run@{step}", 0.1 * step, "run") for step in (0, 1, 2)]
    else:
        three = [fine_tuned(*each) for each in (("base", 0.0), ("prose", 0.1), ("code", 0.1))]
        sources = three if one.on == "experts" else three[:1]
    cache = Cache(tmp_path)
    (first,) = run([one], sources, tasks=("prose", "code"), cache=cache)
    assert first.ok, first.traceback
    (again,) = run([one], sources, tasks=("prose", "code"), cache=cache)
    assert again.reused
    assert again.result == first.result
    base, *others = sources
    given = {
        "first_loss": base.losses["prose"], "second_loss": base.losses["code"], "task_losses": base.losses,
        "loss": sources[-1].losses["prose"], "theta": base.theta, "thetas": [each.theta for each in sources],
        "experts": {each.id: each.theta for each in others}, "steps": [0, 1, 2], "names": [each.id for each in sources],
        "token_names": lambda ids: [*map(str, ids)],
    }  # fmt: skip
    drawn = {"key": fs.key(42)} if "key" in one.needs else {}
    direct = one.call(*(given[need] for need in one.needs if need != "key"), **drawn, **one.settings, **one.plan)
    assert first.result == direct
    for word in one.sentence.replace("}", "{").split("{")[1::2]:
        assert word in first.result.asdict(), word
    for quantity in one.drawn:
        assert quantity in {each.name or key for key, each in first.result.quantities().items()} | {
            *first.result.asdict()
        }, quantity
