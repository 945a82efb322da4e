"""How the gradients of several tasks lie to each other, pair by pair and block by block, from Grams of their sequences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_count
from ..core.keys import Key, check_key, fold_in
from ..core.objective import Loss, Theta
from ..core.result import Derived, Result, derived, internal, quantity
from ..core.statistics import q_values
from ..core.tables import counted
from ..curvature.gram import Blocks, Grams
from ..curvature.gram_errors import LEAST
from ..curvature.gram_statistics import with_total
from ..curvature.scored_sequences import LeftOut, all_apart
from ..curvature.task_pairs import PairStatistics, check_grams, pair_statistics, relative_weights, task_grams
from ..curvature.whitening import check_tasks

Pairs = Float[Tensor, "b q"]
BY_BLOCK = ("block", "pair")
BY_TASK = ("task", "other task")


def _of_all(name: str, label: str, **what: Any) -> Derived[Tensor]:
    """A matrix over tasks, from the last block, which is all of them together."""
    return derived(label, per=BY_TASK, **what)(lambda self: self.whole[name])


class GradientAlignment(Result):
    """Mean gradients of several tasks: how long they are, how aligned, and whether they oppose each other."""

    cosine: Pairs = quantity("cosine of mean gradients", per=BY_BLOCK, stderr="cosine_stderr")
    cosine_low: Pairs = quantity("2.5 % bound of the cosine", per=BY_BLOCK, shown=False)
    cosine_high: Pairs = quantity("97.5 % bound of the cosine", per=BY_BLOCK, shown=False)
    inner: Pairs = quantity("inner product of mean gradients", per=BY_BLOCK, stderr="inner_stderr", shown=False)
    magnitude_ratio: Pairs = quantity(
        "length of the first mean gradient over the second", per=BY_BLOCK, stderr="magnitude_ratio_stderr", shown=False
    )
    p_conflict: Pairs = quantity("p value of conflict", per=BY_BLOCK, shown=False)
    num_sequences: dict[str, int]
    num: int
    num_unscored: int
    num_shared: int
    num_copies: int
    key: Key
    cosine_stderr: Pairs = internal()
    inner_stderr: Pairs = internal()
    magnitude_ratio_stderr: Pairs = internal()
    whole: dict[str, Tensor] = internal()
    """By name, of all blocks together: (k, k) over tasks."""
    blocks: list[str] = internal()

    @derived("conflict of mean gradients", per=BY_BLOCK, shown=False)
    def conflict(self) -> Pairs:
        """max(0, -cosine): 0 where gradients agree, 1 where they are opposite."""
        return (-self.cosine).clamp(min=0)

    @derived("q value of conflict", per=BY_BLOCK, shown=False)
    def q_conflict(self) -> Pairs:
        """Benjamini and Hochberg's, over all pairs and blocks."""
        return torch.tensor(q_values(self.p_conflict.flatten().tolist())).double().view_as(self.p_conflict)

    cosine_of_all = _of_all("cosine", "cosine of mean gradients, all blocks", stderr="cosine_of_all_stderr")
    cosine_of_all_low = _of_all("low", "2.5 % bound of the cosine, all blocks")
    cosine_of_all_high = _of_all("high", "97.5 % bound of the cosine, all blocks")
    inner_of_all = _of_all("inner", "inner product of mean gradients, all blocks", stderr="inner_of_all_stderr")
    magnitude_ratio_of_all = _of_all(
        "ratio", "length of a mean gradient over the other, all blocks", stderr="magnitude_ratio_of_all_stderr"
    )
    cosine_of_all_stderr = property(lambda self: self.whole["cosine_stderr"])
    inner_of_all_stderr = property(lambda self: self.whole["inner_stderr"])
    magnitude_ratio_of_all_stderr = property(lambda self: self.whole["ratio_stderr"])

    @derived("conflict of mean gradients, all blocks", per=BY_TASK)
    def conflict_of_all(self) -> Tensor:
        return (-self.whole["cosine"]).clamp(min=0)

    @derived("q value of conflict, all blocks", per=BY_TASK)
    def q_conflict_of_all(self) -> Tensor:
        """Over all pairs of tasks."""
        values = self.whole["p_conflict"].clone()
        rows, columns = torch.triu_indices(*values.shape, offset=1)
        values[rows, columns] = values[columns, rows] = values.new_tensor(q_values(values[rows, columns].tolist()))
        return values

    @property
    def tasks(self) -> list[str]:
        return list(self.num_sequences)

    @property
    def pairs(self) -> list[str]:
        return [f"{a} / {b}" for a, b in combinations(self.num_sequences, 2)]

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"block": self.blocks, "pair": self.pairs, "task": self.tasks, "other task": self.tasks}

    @property
    def head(self) -> str:
        sizes = ", ".join(f"{name}: {counted(num, 'sequence')}" for name, num in self.num_sequences.items())
        return f"gradients of {len(self.tasks)} tasks ({sizes}) in {counted(len(self.blocks), 'block')}"

    @property
    def notes(self) -> list[str]:
        notes = LeftOut(self.num_unscored, self.num_shared, self.num_copies).notes
        if missing := int(self.cosine.isnan().sum()):
            notes.append(
                f"no cosine in {missing} of {self.cosine.numel()} cells, as a mean gradient is not told from 0."
            )
        return notes


def gradient_alignment(
    losses: Mapping[str, Loss],
    theta: Theta,
    *,
    key: Key,
    by: Blocks = "layer",
    num: int = 999,
    chunk_size: int = 64,
) -> GradientAlignment:
    r"""Cosines, inner products and relative lengths of the gradients of several tasks, and which of them conflict.

    With $\mu_a$ the gradient of task a's loss over the population that its sequences are a sample of, for every pair of tasks
    and every block,

    $$\cos_{ab} = \frac{\langle \mu_a, \mu_b \rangle}{\lVert \mu_a \rVert \lVert \mu_b \rVert}, \qquad
      \text{conflict}_{ab} = \max(0, -\cos_{ab}), \qquad \text{ratio}_{ab} = \lVert \mu_a \rVert / \lVert \mu_b \rVert,$$

    each inner product and squared length without bias, from pairs of different sequences: a cosine of sample means is nearer
    to 0, as their lengths hold noise, and the mean of cosines of chunks, which a document reports, nearer still. Errors,
    bounds and `p_conflict`: those of `fisher.gram_conflicts`, pair by pair; sequences are the samples, and their weights are
    part of them: of texts of unlike length, errors with the weights held would be several times too large. The error of a
    ratio is to first order. `q_conflict`: over all pairs and blocks; those of the whole, over pairs of tasks. Where a squared
    length is not two errors above 0, cosine, conflict and ratio are nan.

    A document calls $\Phi(\operatorname{atanh}(\cos) \sqrt{27})$ a p value, as if every cosine were a correlation of 30
    independent pairs: it depends on nothing but the cosine.

    losses: two tasks or more, by name. Gradients are those of the losses: sums over a sequence over the task's mean weight of
    a sequence. by, chunk_size: of `gram`, of which there is one for each task and each pair. num: resamples.
    Sequences that several tasks have, copies, and what is not scored are left out.

    Raises ValueError for fewer than two tasks, tasks of different parameters, fewer than two sequences of a task, and as
    `gram` does.

    Yu et al. (2020), arXiv:2001.06782.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(2, 1, bias=False))
    >>> half_square = fs.custom(lambda out, y: (out - y)[:, 0] ** 2 / 2)
    >>> x = torch.tensor([[1.0, 0.1], [1.0, -0.1], [1.0, 0.0], [1.0, 0.2]])
    >>> targets = {"up": 1 + x[:, 1:], "down": -1 + x[:, 1:]}              # one weight is pulled both ways
    >>> losses = {name: fs.objective(net, [(x + i / 50, y)], half_square) for i, (name, y) in enumerate(targets.items())}
    >>> result = gradient_alignment(losses, torch.zeros(2), key=fs.key(0), num=99)
    >>> result.conflict_of_all.round(decimals=1).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    check_key(key)
    check_several(losses)
    tasks, lost = all_apart(losses, theta)
    grams = task_grams(tasks, theta, by=by, chunk_size=chunk_size)
    result = gram_alignment(grams, key=key, num=num, weights=relative_weights(tasks, theta))
    return replace(result, num_unscored=lost.unscored, num_shared=lost.shared, num_copies=lost.copies)


def gram_alignment(
    grams: Mapping[tuple[str, str], Grams],
    *,
    key: Key,
    num: int = 999,
    weights: Mapping[str, Float[Tensor, " n"]] | None = None,
) -> GradientAlignment:
    """`gradient_alignment` of Grams: of every task with itself, (a, a), and of every pair, (a, b), as of `task_grams`.

    Blocks must cover every parameter once, as their sum is taken for the whole. weights: of each task's sequences in units
    of their mean (`relative_weights`), for errors of inner products and lengths; without, all sequences weigh the same.

    Raises ValueError for Grams that do not belong together, are of tokens, or are missing, and for fewer than two sequences.
    """
    check_key(key)
    check_count("num", num)
    names = list(dict.fromkeys(a for a, _ in grams))
    pairs = list(combinations(names, 2))
    if not pairs or (missing := [pair for pair in pairs if pair not in grams]):
        raise ValueError(f"`grams` must have every pair of two tasks or more, has the tasks {names} and not {missing}.")
    made = []
    for a, b in pairs:
        three = grams[a, a], grams[a, b], grams[b, b]
        check_grams(*three)
        if min(three[1].values.shape[1:]) < 2:
            raise ValueError(f"each task must have two sequences at least, got {a!r} and {b!r} with fewer.")
        values = [with_total(each.values.double()) for each in three]
        both = None if weights is None else (weights[a].to(values[1]), weights[b].to(values[1]))
        made.append(pair_statistics(*values, key=fold_in(fold_in(key, a), b), num=num, weights=both))
    columns = {name: torch.stack(each, 1) for name, each in _columns(made).items()}
    sizes = {name: grams[name, name].values.shape[1] for name in names}
    part = {name: each[:-1].contiguous() for name, each in columns.items()}
    whole = {name: _matrix(name, each[-1], len(names)) for name, each in columns.items() if name not in _SQUARES}
    _fill_diagonal(whole, {name: each[-1] for name, each in columns.items()}, pairs, names)
    return GradientAlignment(
        part["cosine"], part["low"], part["high"], part["inner"], part["ratio"], part["p_conflict"], sizes, num, 0, 0, 0, key,
        part["cosine_stderr"], part["inner_stderr"], part["ratio_stderr"], whole, list(three[0].blocks),
    )  # fmt: skip


def check_several(losses: Mapping[str, Loss]) -> None:
    """Two tasks or more, of the same parameters."""
    if len(losses) < 2:
        raise ValueError(f"`losses` must be of two tasks or more, by name, got {len(losses)}.")
    first, *rest = losses.values()
    for each in rest:
        check_tasks(first, each)


_SQUARES = ("first", "first_stderr", "second", "second_stderr")


def _columns(made: list[PairStatistics]) -> dict[str, list[Tensor]]:
    """By name, one array over blocks for every pair."""
    columns: dict[str, list[Tensor]] = {}
    for of in made:
        ratio = torch.where(of.resolved, (of.value.first / of.value.second).clamp(min=0).sqrt(), math.nan)
        relative = (of.errors.first / of.value.first).square() + (of.errors.second / of.value.second).square()
        named = {
            "cosine": of.cosine, "cosine_stderr": of.cosine_stderr, "low": of.low, "high": of.high, "ratio": ratio,
            "ratio_stderr": ratio * relative.sqrt() / 2, "p_conflict": of.p_conflict, "inner": of.value.inner,
            "inner_stderr": of.errors.inner, "first": of.value.first, "first_stderr": of.errors.first,
            "second": of.value.second, "second_stderr": of.errors.second,
        }  # fmt: skip
        for name, each in named.items():
            columns.setdefault(name, []).append(each)
    return columns


def _matrix(name: str, values: Float[Tensor, " q"], size: int) -> Float[Tensor, "k k"]:
    """Of pairs, over tasks: what is of (b, a) is what is of (a, b), but for ratios; nan on the diagonal."""
    out = values.new_full((size, size), math.nan)
    rows, columns = torch.triu_indices(size, size, offset=1)
    out[rows, columns] = values
    out[columns, rows] = 1 / values if name == "ratio" else values
    return out


def _fill_diagonal(
    whole: dict[str, Tensor], columns: dict[str, Tensor], pairs: list[tuple[str, str]], names: list[str]
) -> None:
    """A task with itself: its squared length; a cosine of 1, and a ratio of 1, where that is told from 0."""
    rows, places = torch.triu_indices(len(names), len(names), offset=1)
    ratio = whole["ratio"]
    whole["ratio_stderr"][places, rows] = columns["ratio_stderr"] * ratio[places, rows].square()
    for i, name in enumerate(names):
        pair, side = next((q, "first" if a == name else "second") for q, (a, b) in enumerate(pairs) if name in (a, b))
        square, error = columns[side][pair], columns[f"{side}_stderr"][pair]
        whole["inner"][i, i], whole["inner_stderr"][i, i] = square, error
        if bool(square > LEAST * error):
            for each in ("cosine", "low", "high", "ratio"):
                whole[each][i, i] = 1.0
            for each in ("cosine_stderr", "ratio_stderr"):
                whole[each][i, i] = 0.0
