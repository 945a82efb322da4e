"""What merged models lose on every task, over how far the merge goes, and what a quadratic loss would have said."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad

from ..core.checks import check_choice, check_number
from ..core.estimate import wide
from ..core.keys import Key, check_key, fold_in
from ..core.objective import Loss, Theta
from ..core.standard_errors import means
from ..core.vectors import dot
from ..curvature.fisher import fisher_diagonal_mc
from ..curvature.hessian import ggn
from ..curvature.kfac_factors import kfac_factors
from ..curvature.leafwise import Terms, terms_at
from ..curvature.scored_sequences import contents
from .merge_curves_result import MergeCurves, mean_error
from .merging import METHODS, Grams, Method, merge
from .task_vectors import flat_of

USUAL: tuple[Method, ...] = ("linear", "task_arithmetic", "ties", "dare", "fisher", "regmean")
COEFFICIENTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def merge_curves(
    losses: Mapping[str, Loss],
    experts: Mapping[str, Theta],
    base: Theta,
    *,
    key: Key,
    methods: Sequence[Method] = USUAL,
    coefficients: Sequence[float] = COEFFICIENTS,
    density: float = 0.2,
    drop: float = 0.5,
    shrink: float = 0.9,
    num: int = 8,
    fishers: Mapping[str, Theta] | None = None,
    grams: Mapping[str, Grams] | None = None,
) -> MergeCurves:
    r"""The loss of every task on the line from the base through each merged model, and what quadratics predict there.

    $$\theta_m(c) = \theta_0 + c\, (\theta_m - \theta_0), \qquad
      \Delta_{mck} = L_k(\theta_m(c)) - L_k(\theta_0),$$

    $\theta_m$ what method m makes of all experts with equal weights: `linear` their mean, `task_arithmetic` the sum of
    their task vectors (the same line in other units), TIES and DARE at scale 1, where c is their scale; Fisher merging and
    RegMean are gone beyond and not quite to in the same way. Means over tasks count tasks alike. Errors are over sequences,
    and those of differences in pairs; where tasks have sequences in common, the error of a mean over tasks is the mean of
    their errors, its largest value, and otherwise that of independent ones.

    The best coefficient of a method is that of the grid with the least mean loss. Its loss on the same data is too good;
    `best_loss` is cross-fitted: chosen on every other sequence of each task, measured on the rest, and the other way round.
    `gain` is above the single model that is chosen likewise: the least loss of several on the same data is too good as
    well. Both are nan where a task has one sequence.

    There, with $\delta = \theta_m(c) - \theta_k$ for each task's own expert,

    $$L_k(\theta_k + \delta) - L_k(\theta_k) \approx g_k^\top \delta + \tfrac12 \delta^\top G_k \delta
      \approx g_k^\top \delta + \tfrac12 \textstyle\sum_i F_{ki} \delta_i^2,$$

    G the Gauss-Newton matrix, which is the Fisher information of a softmax, and F its diagonal (`num` draws of labels).
    Fisher merging is the least of the sum of the last, without g (`merge_rules.fisher`): where the diagonal is far from the
    form, that is why it is not better.

    losses, experts: by task, with the same names; all losses of one architecture. methods: of `merging.METHODS`; `slerp` for
    two experts. fishers, grams: by task, in place of those that are computed: diagonals by `fisher_diagonal_mc` at the
    expert, and second moments of the inputs of linear maps over positions that are scored (those with a gradient,
    `kfac_factors`), as means, so that tasks count alike.

    Cost in forwards per task: methods x coefficients, 3 per draw of the Fisher diagonal, 3 for the Grams, 6 per method for
    the quadratics.

    Raises ValueError for other names of tasks, fewer than two, an unknown method, coefficients that do not increase, and as
    `merge`, `fisher_diagonal_mc` and `kfac_factors` do.

    Ilharco et al. (2023), arXiv:2212.04089; Yadav et al. (2023), arXiv:2306.01708; Matena, Raffel (2022), arXiv:2111.09832.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(1, 2, bias=False))
    >>> data = {"a": torch.tensor([0, 0]), "b": torch.tensor([1, 1])}
    >>> losses = {name: fs.objective(net, [(torch.ones(2, 1), y)], fs.classification) for name, y in data.items()}
    >>> experts = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 1.0])}
    >>> curves = merge_curves(losses, experts, torch.zeros(2), key=fs.key(0), methods=("linear",), coefficients=(0.0, 1.0))
    >>> [round(x, 4) for x in curves.mean_losses[0].tolist()]                                   # opposite tasks: ln 2
    [0.6931, 0.6931]
    """
    check_key(key)
    tasks = list(losses)
    if len(tasks) < 2 or set(experts) != set(tasks):
        raise ValueError(f"`experts` must have the tasks of `losses`, two or more: {tasks} and {list(experts)}.")
    for method in methods:
        check_choice("methods", method, METHODS)
    _check_increasing(coefficients)
    _check_alike(losses)
    start = Loss.vector(losses[tasks[0]], base, "base")
    at = {task: Loss.vector(losses[task], experts[task], f"experts[{task!r}]") for task in tasks}
    needs = _needs(losses, at, methods, key, num, fishers, grams)
    models = _merged(losses[tasks[0]], at, start, methods, needs, key, density, drop, shrink)
    terms = _line_terms(losses, start, models, coefficients)
    singles = [[terms_at(losses[task], model) for model in (start, *at.values())] for task in tasks]
    times = Counter(each for loss in losses.values() for each in {*contents(loss)})
    num_shared = sum(num > 1 for num in times.values())
    curves = _curves(terms, singles, tasks, methods, coefficients, key, density, drop, num_shared)
    points = [start + coefficients[i] * (model - start) for i, model in zip(curves.best_index, models, strict=True)]
    return curves.with_forms(_forms(losses, at, points, needs.fishers))


@dataclass(frozen=True)
class _Needs:
    fishers: dict[str, Tensor]
    grams: list[Grams] | None


def input_moments(loss: Loss, theta: Theta) -> dict[str, Float[Tensor, "i i"]]:
    r"""$\tfrac1U \sum_u x_u x_u^\top$ of every weight that is used as a matrix, over the U positions with a gradient.

    By name of the weight, for RegMean; one forward and one backward pass.

    >>> import funcscope as fs
    >>> loss = fs.objective(fs.functional(torch.nn.Linear(2, 2)), [(torch.eye(2), torch.tensor([0, 1]))], fs.classification)
    >>> input_moments(loss, loss.net.theta)["weight"]
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])
    """
    kfac = kfac_factors(loss, theta, labels="data")
    out = {}
    for name, block in kfac.blocks.items():
        moments = block.product.a.dense()
        out[name] = moments if block.bias is None else moments[:-1, :-1].contiguous()
    return out


def _check_increasing(coefficients: Sequence[float]) -> None:
    for each in coefficients:
        check_number("coefficients", each)
    if not coefficients or any(b <= a for a, b in pairwise(coefficients)):
        raise ValueError(f"`coefficients` must be one or more numbers that increase, got {list(coefficients)}.")


def _check_alike(losses: Mapping[str, Loss]) -> None:
    shapes = [dict(loss.layout.shapes) for loss in losses.values()]
    if any(each != shapes[0] for each in shapes):
        raise ValueError("`losses` must be of one architecture, and their layouts differ.")


def _needs(
    losses: Mapping[str, Loss],
    at: Mapping[str, Tensor],
    methods: Sequence[Method],
    key: Key,
    num: int,
    fishers: Mapping[str, Theta] | None,
    grams: Mapping[str, Grams] | None,
) -> _Needs:
    diagonals, moments = {}, []
    for task, loss in losses.items():
        if fishers is not None and task in fishers:
            diagonals[task] = flat_of(f"fishers[{task!r}]", fishers[task], loss.layout)
        elif loss.criterion.sample is not None or "fisher" in methods:
            diagonals[task] = fisher_diagonal_mc(
                loss, at[task], key=fold_in(fold_in(key, "fisher"), task), num=num
            ).value
        if "regmean" in methods:
            moments.append(grams[task] if grams is not None and task in grams else input_moments(loss, at[task]))
    return _Needs(diagonals, moments or None)


def _merged(
    loss: Loss,
    at: Mapping[str, Tensor],
    start: Tensor,
    methods: Sequence[Method],
    needs: _Needs,
    key: Key,
    density: float,
    drop: float,
    shrink: float,
) -> list[Tensor]:
    options = {"base": start, "density": density, "drop": drop, "shrink": shrink, "key": fold_in(key, "dare")}
    fishers = [needs.fishers[task] for task in at] if needs.fishers else None
    return [
        merge(list(at.values()), method, loss.layout, fishers=fishers, grams=needs.grams, **options)  # type: ignore[arg-type]
        for method in methods
    ]


def _line_terms(
    losses: Mapping[str, Loss], start: Tensor, models: Sequence[Tensor], coefficients: Sequence[float]
) -> list[list[list[Terms]]]:
    """By task, method and coefficient; 0 is the base, whatever the method."""
    out = []
    for loss in losses.values():
        at_base = terms_at(loss, start) if 0.0 in coefficients else None
        rows = [
            [at_base if not c else terms_at(loss, start + c * (model - start)) for c in coefficients]
            for model in models
        ]
        out.append(rows)
    return out  # type: ignore[return-value]


def _curves(
    terms: Sequence[Sequence[Sequence[Terms]]],
    singles: Sequence[Sequence[Terms]],
    tasks: list[str],
    methods: Sequence[Method],
    coefficients: Sequence[float],
    key: Key,
    density: float,
    drop: float,
    num_shared: int,
) -> MergeCurves:
    """Means and errors over sequences, and the best coefficient of every method."""
    sums = [torch.stack([torch.stack([each.sums for each in row]) for row in rows]) for rows in terms]  # (m, c, n)
    weights = [row[0].weights for row in singles]
    alone = [torch.stack([each.sums for each in row]) for row in singles]  # (1 + k, n)
    shape = (len(methods), len(coefficients))
    whole = [means(x.flatten(0, 1), w) for x, w in zip(sums, weights, strict=True)]
    single = [means(x, w) for x, w in zip(alone, weights, strict=True)]
    values = torch.stack([each.value for each in single], 1)  # (1 + k, tasks)
    deltas = [means((x - a[0]).flatten(0, 1), w) for x, a, w in zip(sums, alone, weights, strict=True)]
    table = torch.stack([each.value for each in whole], -1).view(*shape, -1)
    rows = [_cross_fitted(m, sums, weights, alone, num_shared) for m in range(len(methods))]
    fitted = torch.tensor(rows, dtype=torch.float64).T.contiguous()
    return MergeCurves(
        losses=table, losses_stderr=torch.stack([each.stderr for each in whole], -1).view(*shape, -1),
        deltas=torch.stack([each.value for each in deltas], -1).view(*shape, -1),
        deltas_stderr=torch.stack([each.stderr for each in deltas], -1).view(*shape, -1),
        single_losses=values, single_losses_stderr=torch.stack([each.stderr for each in single], 1),
        best_index=_least(table).tolist(), best_loss=fitted[0], best_loss_stderr=fitted[1], gain=fitted[2],
        gain_stderr=fitted[3], coefficients=torch.tensor(list(coefficients), dtype=torch.float64), methods=list(methods),
        tasks=tasks, best_single=int(_least(values)),
        density=float(density), drop=float(drop), num_shared=num_shared, key=key,
    )  # fmt: skip


def _cross_fitted(
    m: int, sums: Sequence[Tensor], weights: Sequence[Tensor], alone: Sequence[Tensor], num_shared: int
) -> tuple[float, float, float, float]:
    """Mean loss over tasks at the coefficient chosen on the other half, and its difference to the single model chosen so."""
    halves = [_halves(w) for w in weights]
    if not all(bool(half.any()) for pair in halves for half in pair):
        return (math.nan,) * 4

    def chosen(tables: Sequence[Tensor], half: int) -> int:
        columns = zip(tables, weights, halves, strict=True)
        return int(_least(torch.stack([x[:, at[half]].sum(1) / w[at[half]].sum() for x, w, at in columns], -1)))

    ours, single = ([chosen(tables, half) for half in (1, 0)] for tables in ([x[m] for x in sums], alone))
    parts = []
    for x, w, a, pair in zip(sums, weights, alone, halves, strict=True):
        merged, best = (torch.where(pair[0], t[i[0]], t[i[1]]) for t, i in ((x[m], ours), (a, single)))
        parts.append(means(torch.stack([merged, merged - best]), w))
    value = torch.stack([each.value for each in parts]).mean(0)
    stderr = mean_error(torch.stack([each.stderr for each in parts], -1), num_shared)
    return float(value[0]), float(stderr[0]), float(value[1]), float(stderr[1])


def _halves(weights: Float[Tensor, " n"]) -> tuple[Tensor, Tensor]:
    """Every other of the sequences that score something, and the rest of these."""
    scored = weights != 0
    odd = scored.cumsum(0) % 2 == 1
    return scored & odd, scored & ~odd


def _least(losses: Float[Tensor, "*m c k"]) -> Tensor:
    """Where the mean over tasks is least; what is nan is not."""
    return losses.mean(-1).nan_to_num(math.inf).argmin(-1)


def _forms(
    losses: Mapping[str, Loss], at: Mapping[str, Tensor], points: Sequence[Tensor], fishers: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """(m, k) each: what moving from a task's expert to the merged model costs, and what is predicted."""
    names = ("increase", "increase_stderr", "slope", "quadratic", "diagonal")
    out = {name: torch.full((len(points), len(losses)), math.nan, dtype=torch.float64) for name in names}
    for k, (task, loss) in enumerate(losses.items()):
        own, theta = terms_at(loss, at[task]), at[task]
        matvec, slope = ggn(loss, theta, keep=False), grad(loss)(theta)
        for m, point in enumerate(points):
            delta, moved = point - theta, terms_at(loss, point)
            change = means((moved.sums - own.sums)[None], own.weights)
            out["increase"][m, k], out["increase_stderr"][m, k] = change.value[0], change.stderr[0]
            out["slope"][m, k] = dot(slope, delta)
            out["quadratic"][m, k] = dot(delta, matvec(delta)) / 2
            if task in fishers:
                total = wide(delta.device)
                out["diagonal"][m, k] = (fishers[task].to(total) * delta.to(total).square()).sum() / 2
    return out
