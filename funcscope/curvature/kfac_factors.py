"""Kronecker factors of the Fisher information, and the eigenvalues in their basis, from inputs and output gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.checks import check_choice, check_count
from ..core.keys import Key, check_key
from ..core.objective import Loss, Theta
from .fisher import _check_distribution, label_draws
from .kfac import Kfac
from .kfac_sums import Map, Sums, affine_maps, entry_squares
from .leaf_gradients import LeafGradients, Outer
from .leafwise import terms_at
from .outputs import total_weight
from .samples import Data, tiles_of

LabelsFrom = Literal["model", "data"]
Take = Callable[[str, LeafGradients, slice], None]
Passes = list[Callable[[Take], None]]


def kfac_factors(
    loss: Loss,
    theta: Theta,
    *,
    key: Key | None = None,
    labels: LabelsFrom = "model",
    num: int = 1,
    chunk_size: int = 64,
) -> Kfac:
    r"""The Fisher information per scored token by Kronecker factors: a block for every weight matrix, in one pass per draw.

    For a weight $s_u = W x_u + b$ with $g_u$ the gradient at $s_u$ of the SUM of the losses of all T scored tokens,

    $$F \approx \tfrac{U}{T}\, G \otimes A, \qquad A = \tfrac1U \textstyle\sum_u [x_u; 1][x_u; 1]^\top, \qquad
      G = \tfrac1U \textstyle\sum_u g_u g_u^\top$$

    over the U positions u whose gradient is not 0: those of padding and the last of a sequence have none, those of a prompt
    that is not scored have one in inner layers. Row by row, as torch flattens W, the product is $G \otimes A$. A weight that
    is used several times has all its uses for positions (KFAC-expand). T counts tokens by their weights, and gradients are
    those of $\sum_t \sqrt{w_t} \ell_t$.

    labels: `model`: drawn `num` times from the model's predictions, as the Fisher information asks for; the key decides.
    `data`: the data's own, an empirical second moment of the same shape and no Fisher information; no key.

    Any other parameter (embeddings, tables tied to a head, norms, convolutions, whatever the first sequence does not use as
    a matrix) has a diagonal block: squares of its gradients, sequence by sequence, over T. They are named in the result.

    EKFAC is never further from what is approximated (proofs/ekfac_distance.py).

    Bias: inputs and gradients are taken to be independent, and positions uncorrelated: exact for one layer and one datum,
    and in the limit of inputs that say nothing of the gradient; cross terms of layers are left out. Standard errors of
    traces are over draws. The document takes gradients of the mean loss, which makes G too small by T^2 beside an absolute
    damping, and lets positions without a gradient into A and G.

    Raises ValueError for a criterion without `sample`, negative weights, data of which nothing is scored, a gradient that is
    not finite (its sequence and parameter), and a weight whose kind of use changes from batch to batch.

    Martens, Grosse (2015), arXiv:1503.05671; Eschenhagen et al. (2023), arXiv:2311.00636.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(1, 2, bias=False))
    >>> loss = fs.objective(net, [(torch.ones(1, 1), torch.tensor([0]))], fs.classification)
    >>> kfac_factors(loss, torch.zeros(2), labels="data").matvec(torch.tensor([1.0, 0.0]))     # g = (-1/2, 1/2)
    tensor([ 0.2500, -0.2500])
    """
    theta, drawn = scored_losses(loss, theta, key, labels, num)
    return _factors(total_weight(loss, theta), theta, drawn, labels, _passes(drawn, theta, chunk_size))


def ekfac_factors(
    loss: Loss,
    theta: Theta,
    *,
    key: Key | None = None,
    labels: LabelsFrom = "model",
    num: int = 1,
    chunk_size: int = 64,
) -> Kfac:
    r"""`kfac_factors` with the eigenvalues measured in its eigenbasis: the best block with these eigenvectors. A second pass.

    $$\lambda_{jk} = \frac1T \sum_b \big(u_j^\top\, \nabla_W \ell_b\, a_k\big)^2, \qquad
      G = \sum_j \gamma_j u_j u_j^\top, \quad A = \sum_k \alpha_k a_k a_k^\top,$$

    b over sequences, whose gradients keep the cross terms of their positions; T, labels and all arguments as there. Of
    all matrices with these eigenvectors it is the nearest, in Frobenius norm, to the second moment of the sequences'
    gradients of the same draws, so that KFAC is never nearer to that (proofs/ekfac_distance.py); to the Fisher
    information itself, up to the error of the draws.

    George et al. (2018), arXiv:1806.03884.
    """
    theta, drawn = scored_losses(loss, theta, key, labels, num)
    passes, total = _passes(drawn, theta, chunk_size), total_weight(loss, theta)
    return _corrected(_factors(total, theta, drawn, labels, passes), passes, total)


def _factors(total: float, theta: Tensor, drawn: list[Loss], labels: LabelsFrom, passes: Passes) -> Kfac:
    sums = Sums(drawn[0], affine_maps(drawn[0], theta))
    for each in passes:
        sums.start()
        each(sums.take)
    return sums.factors(total, labels, theta)


def _corrected(kfac: Kfac, passes: Passes, total: float) -> Kfac:
    maps = {name: Map("" if block.bias else None, block.transposed) for name, block in kfac.blocks.items()}
    order = list(kfac.blocks)
    values = {name: torch.zeros_like(block.product.eigenvalues) for name, block in kfac.blocks.items()}
    traces = kfac.draw_traces.clone()
    traces[:, :-1] = 0

    for draw, each in enumerate(passes):

        def take(name: str, leaf: LeafGradients, at: slice, draw: int = draw) -> None:
            if name not in maps:
                return
            product = kfac.blocks[name].product
            x, g = maps[name].sides(leaf.parts[0])  # type: ignore[arg-type]
            turned = Outer(g @ product.g.eigen.vectors.to(g), x @ product.a.eigen.vectors.to(x))
            made = entry_squares(LeafGradients([turned], tuple(values[name].shape)), name, at)  # type: ignore[arg-type]
            values[name] += made / (kfac.num * total)
            traces[draw, order.index(name)] += float(made.sum()) / total

        each(take)
    blocks = {
        name: replace(block, product=replace(block.product, values=values[name])) for name, block in kfac.blocks.items()
    }
    return replace(kfac, blocks=blocks, draw_traces=traces, corrected=True)


def scored_losses(loss: Loss, theta: Theta, key: Key | None, labels: LabelsFrom, num: int) -> tuple[Tensor, list[Loss]]:
    """A loss for each draw of the labels, weights being rooted, so that products of gradients have the weights."""
    check_choice("labels", labels, ("model", "data"))
    check_count("num", num)
    theta = Loss.vector(loss, theta)
    if _has_negative(loss, theta):
        raise ValueError("weights must be at least 0: their square roots are those of the scores.")
    plain = loss.criterion.token_loss

    def rooted(out: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        losses, weight = plain(out, targets)
        return losses, weight.sqrt()

    loss = replace(loss, criterion=replace(loss.criterion, token_loss=rooted))
    if labels == "data":
        if num != 1:
            raise ValueError(f"`num` must be 1 with the data's own labels, of which there is one set, got {num}.")
        return theta, [loss]
    check_key(key)
    assert key is not None
    _check_distribution(loss.criterion)
    targets = label_draws(loss, theta, key, num)
    pairs = [list(zip(loss.batches, targets, strict=True))] * num
    return theta, [
        replace(loss, batches=tuple((inputs, several[i]) for (inputs, _), several in each))
        for i, each in enumerate(pairs)
    ]


def _has_negative(loss: Loss, theta: Tensor) -> bool:
    if loss.criterion.positionwise:
        return any(bool((targets.weight < 0).any()) for _, targets in loss.batches)
    return bool((terms_at(loss, theta).weights < 0).any())


def _passes(drawn: list[Loss], theta: Tensor, chunk_size: int) -> Passes:
    """Per draw, a pass over the data that shows every parameter's gradients, and which rows they are of.

    What is known of the uses of parameters after one pass is known in all.
    """
    check_count("chunk_size", chunk_size)
    by_rows: set[str] = set()
    compared: set[Any] = set()

    def whole(loss: Loss) -> Callable[[Take], None]:
        def each(take: Take) -> None:
            tiles = tiles_of(loss, "sequence", chunk_size)
            data = Data(loss, theta, tiles)
            data.by_rows, data.compared = by_rows, compared
            for at, batch in tiles:
                data.each(batch, lambda name, leaf, at=at: take(name, leaf, at))  # type: ignore[misc]

        return each

    return [whole(loss) for loss in drawn]
