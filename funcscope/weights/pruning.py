"""How the loss grows as weights, heads or neurons are removed, the least important first, beside random ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor

from ..core.checks import check_choice, check_count, check_number
from ..core.keys import Key, check_key, fold_in, uniform
from ..core.layout import Layout, Leaf
from ..core.objective import Loss, Theta
from .prunable import SCOPES, Prunable, Scope, largest, num_left, prunable_leaves, sparse_mask
from .pruning_curves import MaskAt, curves_result, measured
from .pruning_result import RANDOM, PruningRobustness
from .saliency import BY_ROW, SCORES, Score, saliency
from .sequence_scores import sequence_scores
from .units import Units, head_units, neuron_units, unit_mask, unit_saliency

SPARSITIES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
By = Literal["tensor", "layer", "module"]


def pruning_robustness(
    loss: Loss,
    theta: Theta,
    *,
    key: Key,
    scores: Sequence[Score] = ("magnitude", "taylor", "obd", "wanda"),
    sparsities: Sequence[float] = SPARSITIES,
    scope: Scope = "global",
    prunable: Prunable = "linear",
    by: By = "layer",
    threshold: float = 0.1,
    num_random: int = 3,
    num_draws: int = 8,
    calibration: Loss | None = None,
    chunk_size: int = 8,
) -> PruningRobustness:
    r"""The loss with the least important weights at 0, against how many: one curve per score, and one of random masks.

    $$\Delta(s) = L(m_s \odot \theta) - L(\theta), \qquad
      A = \frac{1}{s_n - s_1} \int_{s_1}^{s_n} \Delta(s)\, ds, \qquad s^* = \min\{s : \Delta(s) = \text{threshold}\},$$

    with $m_s$ exactly $n - \lfloor s n + 1/2 \rfloor$ of the n prunable weights of the largest scores, and A and $s^*$ by
    linear interpolation (trapezoids). A is a mean loss in the units of the loss, whatever range the sparsities have; $s^*$
    is the first crossing, nan with a note where the curve starts above the threshold or stays below it. At s = 0 the loss is
    that of the model, at s = 1 all prunable weights are 0. Nothing is trained. `perplexity_ratio` is $e^\Delta$, `accuracy`
    the share of labels that are the largest output at the position that predicts them, of k that are as large 1 / k.

    Scores from derivatives are local. A row of an untied head whose class hardly occurs has next to no gradient and Fisher
    information, is pruned first by `taylor`, `obd` and `fisher`, and costs what no second-order term sees: a logit that was
    far below the others is 0. Name a prunable set without the head to leave that out.

    Errors are over sequences and paired: of the same sequences with and without the mask; that of $s^*$ is by the delta
    method. The curve `random` is the mean over `num_random` masks from uniform scores; its errors over draws and data are
    apart in `random_area` and the two `random_stderr`, and `delta_loss_stderr` holds both.

    scores: of `saliency`; `wanda` is compared inside output rows, the others in `scope`. prunable: as `prunable_leaves`; its
    default leaves biases, norms and embeddings alone. by: the blocks of `density`, what is left of each. num_draws: of the
    labels, for `obd` and `fisher`. calibration: the loss that scores are made from; default: the one that is measured.
    chunk_size: of per-sequence gradients.

    A document has $L(\theta) / L(m_s \odot \theta)$ for an accuracy, its maximum over s, which is that of the mildest
    pruning, for the score of a winning ticket, and an area over [0.1, 0.9] that ends at 0.8 for one from 0 to 1.

    Raises ValueError for sparsities that do not increase inside [0, 1], for a score of another name or without a number
    for what may be pruned (`wanda` for a matrix that is used in another way than by a linear map or a convolution), and as
    `saliency`.

    Frankle, Carbin (2019), arXiv:1803.03635; Gale, Elsen, Hooker (2019), arXiv:1902.09574.

    >>> import torch, funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(4, 1, bias=False))
    >>> loss = fs.objective(net, [(torch.eye(4), torch.tensor([[1.0], [2.0], [3.0], [4.0]]))], fs.mse)
    >>> theta = torch.tensor([1.0, 2.0, 3.0, 4.0])
    >>> made = pruning_robustness(loss, theta, key=fs.key(0), scores=["magnitude"], sparsities=(0.0, 0.5, 1.0))
    >>> made.delta_loss[0].tolist()                                      # (1 + 4) / 4 and (1 + 4 + 9 + 16) / 4
    [0.0, 1.25, 7.5]
    """
    check_choice("scope", scope, SCOPES)
    theta, layout = Loss.vector(loss, theta), loss.layout
    leaves = prunable_leaves(layout, prunable)

    def ranked(score: Tensor, within: Scope) -> MaskAt:
        return lambda s: sparse_mask(score, layout, sparsity=s, scope=within, prunable=prunable)

    def of_score(name: Score) -> MaskAt:
        score = saliency(calibration or loss, theta, name, key=fold_in(key, name), num=num_draws, chunk_size=chunk_size)
        if without := [leaf.name for leaf in leaves if bool(score[leaf.slice].isnan().any())]:
            raise ValueError(
                f"the score {name!r} has no number for `{without[0]}`, which may be pruned: take {name!r} out of `scores`, "
                "or name in `prunable` what it has numbers for."
            )
        return ranked(score, "row" if name in BY_ROW else scope)

    def at_random(draw: Key) -> MaskAt:
        return ranked(uniform(draw, theta), scope)

    return _result(
        loss, theta, of_score, at_random, leaves, key=key, scores=scores, sparsities=sparsities, by=by,
        threshold=threshold, num_random=num_random, pruned="weights", num_prunable=sum(leaf.numel for leaf in leaves),
        scope=scope,
    )  # fmt: skip


def structured_pruning(
    loss: Loss,
    theta: Theta,
    *,
    key: Key,
    units: Literal["heads", "neurons"] | Units = "heads",
    scores: Sequence[Score] = ("magnitude", "taylor", "obd"),
    sparsities: Sequence[float] = SPARSITIES,
    by: By = "layer",
    threshold: float = 0.1,
    num_random: int = 3,
    num_draws: int = 8,
    calibration: Loss | None = None,
    chunk_size: int = 8,
) -> PruningRobustness:
    r"""`pruning_robustness` with whole heads or neurons removed, by the sum of the scores of their parameters.

    units: `heads`, all of q, k, v and o of a head, queries that share keys and values being one (`head_units`); `neurons`
    of MLPs, rows into the hidden layer, biases, and columns out of it (`neuron_units`); or sets of your own. The sparsity is
    the share of units that are removed, of all layers together, rounded to whole ones. Sums of `obd` and of `taylor` are
    estimates of what removing a unit adds, without the terms of pairs of its parameters; sums favour units of many
    parameters. `wanda` has no scores for biases, which add nothing. All else is as there.

    Raises ValueError as `head_units`, `neuron_units` and `pruning_robustness` do.

    Michel, Levy, Neubig (2019), arXiv:1905.10650; Molchanov et al. (2017), arXiv:1611.06440.

    >>> import torch, funcscope as fs
    >>> mlp = torch.nn.Sequential()
    >>> mlp.add_module("fc1", torch.nn.Linear(2, 4))
    >>> mlp.add_module("fc2", torch.nn.Linear(4, 2))
    >>> net = fs.functional(mlp)
    >>> loss = fs.objective(net, [(torch.eye(2), torch.tensor([0, 1]))], fs.classification)
    >>> made = structured_pruning(loss, net.theta, key=fs.key(0), units="neurons", scores=["magnitude"])
    >>> made.num_prunable, made.pruned
    (4, 'neurons')
    """
    theta, layout = Loss.vector(loss, theta), loss.layout
    if isinstance(units, str):
        check_choice("units", units, ("heads", "neurons"))
        units = head_units(layout) if units == "heads" else neuron_units(layout)
    of_units: Units = units
    num = len(of_units.names)

    def ranked(values: Tensor) -> MaskAt:
        return lambda s: unit_mask(largest(values[None], num_left(num, s))[0], layout, of_units)

    def of_score(name: Score) -> MaskAt:
        score = saliency(calibration or loss, theta, name, key=fold_in(key, name), num=num_draws, chunk_size=chunk_size)
        return ranked(unit_saliency(score, layout, of_units))

    def at_random(draw: Key) -> MaskAt:
        return ranked(uniform(draw, theta.new_zeros(num)))

    leaves = [layout.by_name[name] for name in dict.fromkeys(part.leaf for part in of_units.parts)]
    return _result(
        loss, theta, of_score, at_random, leaves, key=key, scores=scores, sparsities=sparsities, by=by,
        threshold=threshold, num_random=num_random, pruned=of_units.kind, num_prunable=num, scope="global",
    )  # fmt: skip


def _result(
    loss: Loss, theta: Tensor, of_score: Callable[[Score], MaskAt], at_random: Callable[[Key], MaskAt],
    leaves: Iterable[Leaf], *, key: Key, scores: Sequence[Score], sparsities: Sequence[float], by: By, threshold: float,
    num_random: int, pruned: str, num_prunable: int, scope: str,
) -> PruningRobustness:  # fmt: skip
    check_key(key)
    _check_settings(scores, sparsities, by, threshold, num_random)
    loss.baseline(theta)
    blocks = _blocks(loss.layout, leaves, by)
    whole = sequence_scores(loss, theta)
    curves, passes, known = {}, 1, []  # type: ignore[var-annotated]
    for name in scores:
        curves[str(name)], num = measured(loss, theta, [of_score(name)], sparsities, whole, blocks, known)
        passes += num
    draws = [at_random(fold_in(fold_in(key, RANDOM), draw)) for draw in range(num_random)]
    curves[RANDOM], num = measured(loss, theta, draws, sparsities, whole, blocks, known)
    return curves_result(
        curves, whole, sparsities, threshold, blocks=list(blocks), pruned=pruned, num_prunable=num_prunable, scope=scope,
        unit=loss.criterion.unit, num_forwards=passes + num, key=key,
    )  # fmt: skip


def _blocks(layout: Layout, leaves: Iterable[Leaf], by: By) -> dict[str, list[slice]]:
    """The prunable parameters of each block."""
    groups, blocks = layout.group_of(by), {}  # type: ignore[var-annotated]
    for leaf in leaves:
        blocks.setdefault(groups[leaf.name], []).append(leaf.slice)
    return blocks


def _check_settings(
    scores: Sequence[str], sparsities: Sequence[float], by: str, threshold: float, num_random: int
) -> None:
    if isinstance(scores, str) or not len(scores) or len(set(scores)) != len(scores):
        raise ValueError(f"`scores` must be a list of different names, one at least, got {scores!r}.")
    for name in scores:
        check_choice("scores", name, SCORES)
    for sparsity in sparsities:
        check_number("sparsities", sparsity, 0.0, 1.0)
    if len(sparsities) < 2 or not all(a < b for a, b in pairwise(sparsities)):
        raise ValueError(f"`sparsities` must be two numbers or more that increase, got {list(sparsities)}.")
    check_choice("by", by, ("tensor", "layer", "module"))
    check_number("threshold", threshold, 0.0)
    check_count("num_random", num_random)
