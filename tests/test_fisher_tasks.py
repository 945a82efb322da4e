"""Fisher information of tasks in one call each: against plain loops, and which models a study looks at with two data sets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from problems import problem, seeded, tokens

import funcscope as fs
from funcscope.core.keys import fold_in
from funcscope.curvature.fisher import fisher_diagonal_mc
from funcscope.curvature.outputs import total_weight
from funcscope.curvature.scored_sequences import dealt
from funcscope.fisher import (
    fisher_diagonal,
    fisher_importance,
    fisher_overlap,
    head_interference,
    head_views,
    mask_overlap,
    pruning_mask,
    qkov_interference,
)
from funcscope.fisher.tasks import _splits
from funcscope.study.cache import Cache
from funcscope.study.catalogue import metric
from funcscope.study.engine import run
from funcscope.study.metric import Metric
from funcscope.study.sources import InMemory, Pretrained
from funcscope.study.texts import DataSpec
from funcscope.study.together import arranged


def classes(seed: int, rows: int, columns: slice, net: fs.Functional) -> fs.Loss:
    """Inputs that are 0 outside some columns: the weights of these are all that the task needs."""
    x = torch.zeros(rows, 8)
    x[:, columns] = seeded(seed, lambda: torch.randn(rows, 8))[:, columns]
    y = seeded(seed + 1, lambda: torch.randint(3, (rows,)))
    return fs.objective(net, [(x[:5], y[:5]), (x[5:], y[5:])], fs.classification)


@pytest.fixture(scope="module")
def net() -> fs.Functional:
    return fs.functional(
        seeded(0, lambda: torch.nn.Sequential(torch.nn.Linear(8, 6, bias=False), torch.nn.Linear(6, 3)))
    )


@pytest.fixture(scope="module")
def texts() -> tuple[fs.Loss, fs.Loss]:
    model, _, criterion = problem("llama")
    net = fs.functional(model)
    return tuple(fs.objective(net, [tokens(seed, 3, 6), tokens(seed + 9, 2, 5)], criterion) for seed in (21, 22))


def test_shares_are_those_of_the_fisher_information_within_their_errors(net):
    loss = classes(1, 20, slice(0, 5), net)
    found = fisher_importance(loss, net.theta, key=fs.key(0), by="tensor", num=10)
    exact = fisher_diagonal(loss, net.theta, method="exact").value
    shares = torch.stack([exact[leaf.slice].sum() for leaf in net.layout.leaves]) / exact.sum()
    assert found.blocks == [leaf.name for leaf in net.layout.leaves]
    assert ((found.share - shares).abs() < 4 * found.share_stderr).all()
    assert float(found.share_stderr.max()) < 0.1


def test_every_group_has_draws_of_its_own_and_counts_by_its_tokens(texts):
    loss, _ = texts
    theta, key = loss.net.theta, fs.key(3)
    found = fisher_importance(loss, theta, key=key, num_groups=2)
    parts = dealt(loss, theta, 2)
    assert [len(part.terms(theta)[0]) for part in parts] == [3, 2]  # sequences 0, 2, 4 and 1, 3
    total = sum(
        total_weight(part, theta) * fisher_diagonal_mc(part, theta, key=fold_in(key, i), num=1).value.double()
        for i, part in enumerate(parts)
    )
    for block, share in zip(found.blocks, found.share, strict=True):
        places = [loss.layout.by_name[view.leaf].slice for view in loss.layout.blocks("layer")[block]]
        assert float(share) == pytest.approx(float(sum(total[each].sum() for each in places) / total.sum()), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("score", ["fisher", "obd"])
def test_tasks_that_use_other_columns_share_nothing_and_each_is_like_itself(net, score):
    first, second = classes(1, 20, slice(0, 4), net), classes(3, 20, slice(4, 8), net)
    by = {"first layer": net.layout.blocks("tensor")["0.weight"]}
    options = {"key": fs.key(0), "by": by, "within": by, "density": 0.3, "score": score, "num": 10}
    apart = fisher_overlap(first, second, net.theta, **options)
    different, one, other = apart.halves[0].tolist()
    assert float(apart.num_both) == 0
    assert float(apart.kappa) == pytest.approx(different) == pytest.approx(-0.3 / 0.7, rel=0.1)
    assert min(one, other) > 0.4
    alike = fisher_overlap(first, classes(5, 20, slice(0, 4), net), net.theta, **options)
    assert float(alike.kappa) > 0.5
    assert alike.coords["halves"] == ["different tasks", "first task", "second task"]
    torch.testing.assert_close(alike.total_halves[0], alike.halves[0, 0])


@pytest.mark.parametrize(("rows", "groups"), [(20, 8), (5, 4), (3, 2)])
def test_halves_and_errors_are_those_of_balanced_half_samples(net, rows, groups):
    """By sets of groups: of 8, every second of those of 4 with 0 of which the others are the complement, no more."""
    first, second = classes(1, rows, slice(0, 6), net), classes(3, rows, slice(2, 8), net)
    found = fisher_overlap(first, second, net.theta, key=fs.key(0), by="tensor", density=0.3, num=2)
    ways = {2: ["0"], 4: ["02", "01", "03"], 8: ["0246", "0145", "0347", "0123", "0257", "0167", "0356"]}[groups]
    sides = []
    for i, loss in enumerate((first, second)):
        parts = [
            total_weight(part, net.theta) * fisher_diagonal_mc(part, net.theta, key=key, num=2).value
            for part, key in zip(
                dealt(loss, net.theta, groups), map(fs.fold_in, [fs.fold_in(fs.key(0), i)] * 8, range(8)), strict=False
            )
        ]
        masks = []
        for way in ways:
            chosen = [
                torch.stack([x for j, x in enumerate(parts) if (str(j) in way) == side]).sum(0)
                for side in (True, False)
            ]
            masks.append([pruning_mask(x, net.layout, sparsity=0.7).mask for x in chosen])
        sides.append(masks)
    made = [mask_overlap(x, y, net.layout) for one, other in zip(*sides, strict=False) for x in one for y in other]
    kappas = torch.stack([each.kappa for each in made])
    torch.testing.assert_close(found.halves[:, 0], kappas.mean(0), equal_nan=True)
    torch.testing.assert_close(found.kappa_stderr, kappas.std(0, correction=0), equal_nan=True)
    totals = torch.tensor([each.total_kappa for each in made])
    assert found.total_kappa_stderr == pytest.approx(float(totals.double().std(correction=0)), rel=1e-4)
    assert "±" in next(line for line in str(found).splitlines() if line.startswith("total_kappa "))


def test_balanced_half_samples_give_the_error_of_a_mean_exactly():
    x = seeded(0, lambda: torch.randn(8, dtype=torch.float64))
    means = torch.stack([torch.stack(side).mean() for halves in _splits(list(x)) for side in halves])
    assert len(means) == 14
    torch.testing.assert_close(means.std(correction=0), x.std() / 8**0.5)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "num", "score"), [(24, 2, "fisher"), (48, 2, "obd")])
def test_the_error_of_the_overlap_is_of_the_size_that_repetitions_have(rows, num, score):
    net = fs.functional(
        seeded(1, lambda: torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)))
    )
    options = {"by": "layer", "within": "layer", "density": 0.2, "num": num, "score": score}
    made = [
        fisher_overlap(
            classes(10 * i, rows, slice(0, 6), net),
            classes(10 * i + 5, rows, slice(2, 8), net),
            net.theta,
            key=fs.key(i),
            **options,
        )
        for i in range(50)
    ]
    values = torch.stack([torch.cat([one.kappa, one.kappa.new_tensor([one.total_kappa])]) for one in made])
    errors = torch.stack(
        [torch.cat([one.kappa_stderr, one.kappa.new_tensor([one.total_kappa_stderr])]) for one in made]
    )
    ratio = errors.square().nanmean(0).sqrt() / values.std(0)
    assert bool(((ratio > 0.6) & (ratio < 1.6)).all()), ratio


def test_every_second_sequence_of_both_is_held_out(texts):
    first, _ = texts
    theta = first.net.theta
    four = [
        fs.objective(loss.net, [tokens(seed, 4, 6)], loss.criterion) for loss, seed in zip(texts, (31, 32), strict=True)
    ]
    found = qkov_interference(*four, theta, key=fs.key(0), num=9)
    rows = [loss.batches[0][0]["input_ids"] for loss in four]

    def on(ids):
        return fs.objective(first.net, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], first.criterion)

    oracle = head_interference(
        on(rows[0][::2]), on(rows[1][::2]), on(torch.cat([rows[0][1::2], rows[1][1::2]])), theta,
        views=head_views(first.net, first.net.config), key=fs.key(0), num=9,
    )  # fmt: skip
    torch.testing.assert_close(found.directed, oracle.directed, rtol=1e-4, atol=0)
    assert torch.equal(found.p_signed, oracle.p_signed)


def test_what_cannot_be_halved_is_refused(net, texts):
    first, second = texts
    one = fs.objective(net, [(torch.ones(1, 8), torch.tensor([0]))], fs.classification)
    with pytest.raises(ValueError, match="the second task must have 2 different scored sequences, got 1"):
        fisher_overlap(classes(1, 9, slice(0, 4), net), one, net.theta, key=fs.key(0))
    with pytest.raises(ValueError, match="heads are those of a Hugging Face model"):
        qkov_interference(one, one, net.theta, key=fs.key(0))
    few = fs.objective(first.net, [tokens(1, 3, 6)], first.criterion)
    with pytest.raises(ValueError, match="the first task must have 4 different scored sequences, got 3"):
        qkov_interference(few, second, first.net.theta, key=fs.key(0))


TASKS = Metric("both", abs, ("first_loss",), on="tasks")


def test_a_model_in_several_sources_is_looked_at_on_every_two_data_sets():
    def of(folder: str, on: str) -> Pretrained:
        spec = {"data": DataSpec(data=f"{on}.jsonl"), "fisher": DataSpec(data=f"{on}.jsonl", num_samples=3)}
        return Pretrained(folder, spec, name=f"{folder} on {on}", on=on)

    sources = [of(folder, on) for folder in ("m", "n") for on in ("a", "b", "c")]
    seen = [one for one, _ in arranged([TASKS], sources, tasks=("data", "fisher", "landscape"))]
    ids = [f"{m} on {pair}" for m in "mn" for pair in ("a and b", "a and c", "b and c")]
    assert [one.id for one in seen] == ids
    assert seen[0].names_of("fisher") == ("a/fisher", "b/fisher")
    assert seen[0].source.tasks["b/fisher"].data == "b.jsonl"
    assert not list(arranged([TASKS], sources[:1], tasks=("data",)))


def test_a_source_of_several_tasks_is_looked_at_on_every_two_and_stored(net, tmp_path: Path):
    losses = {"left": classes(1, 12, slice(0, 4), net), "right": classes(3, 12, slice(4, 8), net)}
    source = InMemory(losses, "model", content="1")
    study = [
        metric("cross_task_conflicts").configured(by="tensor", num=9), metric("fisher_overlap").configured(num=2),
        metric("qkov_interference"),
    ]  # fmt: skip
    conflicts, overlap, heads = run(study, [source], tasks=("left", "right"), cache=Cache(tmp_path))
    assert conflicts.subject == "model on left and right"
    key = fs.key(42)
    oracle = fs.fisher.task_conflicts(losses["left"], losses["right"], net.theta, key=key, by="tensor", num=9)
    assert torch.equal(conflicts.result.inner, oracle.inner)
    assert conflicts.cost["forwards"] > 0
    assert overlap.ok
    assert "Hugging Face model" in heads.error
    again = run(study[:2], [source], tasks=("left", "right"), cache=Cache(tmp_path))
    assert [one.reused for one in again] == [True, True]
    other = run(study[:1], [source], tasks=("right", "left"), cache=Cache(tmp_path))
    assert not other[0].reused


def doubled(loss: fs.Loss, rows: list[int], pad: int = 0) -> fs.Loss:
    """Some sequences of its first batch, some of them twice; padded further on the right."""
    inputs = loss.batches[0][0]
    ids = torch.nn.functional.pad(inputs["input_ids"][rows], (0, pad))
    mask = torch.arange(ids.shape[1]).expand(ids.shape) < ids.shape[1] - pad
    return fs.objective(loss.net, [{"input_ids": ids, "attention_mask": mask.long()}], loss.criterion)


@pytest.mark.slow
def test_copies_stay_together_and_what_both_tasks_have_is_left_out(texts):
    first, second = (
        fs.objective(loss.net, [tokens(seed, 6, 6)], loss.criterion) for loss, seed in zip(texts, (41, 42), strict=True)
    )
    theta = first.net.theta
    parts = dealt(doubled(first, [0, 1, 2, 0, 3, 1]), theta, 2)
    rows = [part.batches[0][0]["input_ids"].tolist() for part in parts]
    ids = first.batches[0][0]["input_ids"].tolist()
    assert rows == [[ids[0], ids[2], ids[0]], [ids[1], ids[3], ids[1]]]
    mixed = replace(second, batches=(*second.batches, *doubled(first, [1, 4], pad=2).batches))
    found = fs.fisher.task_conflicts(first, mixed, theta, key=fs.key(0), num=19)
    oracle = fs.fisher.task_conflicts(doubled(first, [0, 2, 3, 5]), second, theta, key=fs.key(0), num=19)
    assert (found.num_shared, found.num_first, found.num_second) == (4, 4, 6)
    assert any("4 sequences left out: in several tasks" in note for note in found.notes)
    torch.testing.assert_close(found.inner, oracle.inner, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="two different scored sequences that the other one has not, got 0"):
        fs.fisher.task_conflicts(first, first, theta, key=fs.key(0))
    heads = qkov_interference(doubled(first, [0, 1, 2, 0, 3, 1]), second, theta, key=fs.key(0), num=9)
    assert heads.directed.shape[1:] == (2, 3)
    again, once = doubled(first, [0, 1, 2, 0, 3, 1]), doubled(first, [0, 1, 2, 3])
    copied, oracle = (fs.fisher.task_conflicts(loss, second, theta, key=fs.key(0), num=19) for loss in (again, once))
    assert (copied.num_first, copied.num_copies) == (4, 2)
    assert any("2 sequences left out: a copy of another one" in note for note in copied.notes)
    torch.testing.assert_close(copied.square_first, oracle.square_first, rtol=1e-5, atol=0)


def test_identical_sequences_are_one(texts):
    loss, other = texts
    theta, alike = loss.net.theta, doubled(loss, [0] * 8)
    for call, least in (
        (fisher_overlap, "2 different"),
        (qkov_interference, "two different"),
        (fs.fisher.task_conflicts, "two"),
    ):
        with pytest.raises(ValueError, match=f"the first task must have {least}.* got 1"):
            call(alike, other, theta, key=fs.key(0))
    three = fisher_overlap(doubled(loss, [0] * 6 + [1, 2]), other, theta, key=fs.key(0), num=1)
    assert three.halves.shape[1] == 3
    assert fisher_importance(alike, theta, key=fs.key(0)).share_stderr.isnan().all()


def test_weights_that_are_not_finite_are_named(net):
    loss = classes(1, 8, slice(0, 4), net)
    theta = net.theta.clone()
    theta[7] = torch.nan
    for call in (fisher_importance, fs.fisher.compare_methods):
        with pytest.raises(ValueError, match=r"`0\.weight` is not finite"):
            call(loss, theta, key=fs.key(0))


def test_a_metric_of_two_data_sets_says_that_there_is_one(net):
    with pytest.warns(UserWarning, match="cross_task_conflicts looks at one model on two data sets"):
        assert run([metric("cross_task_conflicts")], [InMemory({"data": classes(1, 8, slice(0, 4), net)})]) == []
