"""How many features share how many dimensions: overlaps of feature vectors, and what each has for itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..core.anatomy import ANATOMIES, body_of
from ..core.checks import check_count, check_positive
from ..core.estimate import wide
from ..core.layout import Params
from ..core.model import Functional
from ..core.result import Result, derived, internal, quantity
from .overlap_moments import mean_abs_coordinate, welch_bound

Rows = Float[Tensor, "n m"]


class Overlap(NamedTuple):
    """Of all pairs of rows that are not 0; nan where there is no pair."""

    mean: float
    """|cos|,"""
    mean_square: float
    """its square,"""
    largest: float
    num: int
    """Rows that are not 0."""


class Superposition(Result):
    """How the feature vectors of matrices share their dimensions, each matrix for itself."""

    num_features: Int[Tensor, " w"] = quantity("features", per="matrix")
    """Rows that are not 0."""
    num_dims: Int[Tensor, " w"] = quantity("dimensions", per="matrix")
    rank: Int[Tensor, " w"] = quantity("rank", per="matrix")
    """Singular values above eps times the Frobenius norm, eps that of the weights' dtype: rounding makes none of these."""
    dimensionality: Float[Tensor, " w"] = quantity("sum of feature dimensionalities", per="matrix")
    """At most the rank."""
    effective_features: Float[Tensor, " w"] = quantity("effective features", per="matrix")
    features_per_dim: Float[Tensor, " w"] = quantity("squared norms, by that of the scale, per dimension", per="matrix")
    mean_overlap: Float[Tensor, " w"] = quantity("mean |cos|", per="matrix")
    random_overlap: Float[Tensor, " w"] = quantity("mean |cos| of random directions", per="matrix")
    square_ratio: Float[Tensor, " w"] = quantity("mean cos², by that of random directions", per="matrix")
    largest_overlap: Float[Tensor, " w"] = quantity("largest |cos|", per="matrix")
    welch: Float[Tensor, " w"] = quantity("least largest |cos| (Welch)", per="matrix")
    norm_scale: Float[Tensor, " w"] = quantity("norm that counts as 1", per="matrix")
    phi_half: Float[Tensor, " w"] = quantity("share of norms above half the scale", per="matrix")
    phi_one: Float[Tensor, " w"] = quantity("share of norms above the scale", per="matrix")
    feature_dimensionality: Float[Tensor, "w n"] = quantity(
        "dimensionality of the feature", per=("matrix", "feature"), shown=False
    )
    feature_norm: Float[Tensor, "w n"] = quantity("norm of the feature", per=("matrix", "feature"), shown=False)
    scale: str
    matrices: list[str] = internal()

    @derived("effective features per dimension", per="matrix")
    def index(self) -> Float[Tensor, " w"]:
        """Above 1 where norms are spread over more features than there are dimensions, be they all alike: see the rank."""
        return self.effective_features / self.num_dims

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"matrix": self.matrices}

    @property
    def head(self) -> str:
        return f"superposition of features; norms by {self.scale}"

    @property
    def notes(self) -> list[str]:
        made = ["Weights are no sample, and sums are over all pairs of rows: nothing here has a standard error."]
        if self.scale == "the median norm":
            made.append("By the median norm, half of the norms lie above the scale whatever they are (`phi_one`).")
        return made


def feature_overlap(w: Rows, *, chunk: int = 4096) -> Overlap:
    r"""|cos| of all pairs of rows: its mean, its mean square, and the largest.

    $$c_{ij} = \frac{|w_i \cdot w_j|}{\|w_i\| \|w_j\|}, \quad i \ne j.$$

    Rows that are 0 have no direction and are left out. Of random directions the mean is `mean_abs_coordinate(m)`, the mean
    square 1 / m; the largest is at least `welch_bound(n, m)`. In the dtype of w, float32 at least, sums in float64; chunk:
    rows that meet a chunk of others at a time, so that no n x n matrix exists; the time is that of n^2 m products.

    >>> three = torch.tensor([[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)], [0.0, 0.0]], dtype=torch.float64)
    >>> [round(x, 6) for x in feature_overlap(three)]
    [0.5, 0.25, 0.5, 3]
    """
    check_count("chunk", chunk)
    w = w.to(torch.promote_types(w.dtype, torch.float32))
    norms = w.norm(dim=1)
    unit = w[norms > 0] / norms[norms > 0, None]
    if (num := len(unit)) < 2:
        return Overlap(math.nan, math.nan, math.nan, num)
    total, square, largest = 0.0, 0.0, 0.0
    parts = unit.split(chunk)
    for i, rows in enumerate(parts):
        for j, others in enumerate(parts[i:], i):
            cosines = (rows @ others.T).abs()
            if i == j:
                cosines = cosines - torch.diag(cosines.diagonal())
            times, double = (1 if i == j else 2), wide(w.device)
            total += times * float(cosines.sum(dtype=double))
            square += times * float(cosines.square().sum(dtype=double))
            largest = max(largest, float(cosines.max()))
    pairs = num * (num - 1)
    return Overlap(total / pairs, square / pairs, largest, num)


def feature_dimensionality(w: Rows) -> Float[Tensor, " n"]:
    r"""The share of a dimension that each feature has for itself, in float64.

    $$D_i = \frac{\|w_i\|^2}{\sum_j (\hat w_i \cdot w_j)^2}, \qquad \hat w_i = w_i / \|w_i\|:$$

    1 for a feature that is orthogonal to all others, 1/2 for one of two opposite ones, 0 for a row of 0. The sum over j is
    $\hat w_i^\top W^\top W \hat w_i$, so that no n x n matrix exists. $\sum_i D_i \le \mathrm{rank}\, W \le m$, equal to the
    rank just where every row is an eigenvector of $W^\top W$ (proofs/feature_dimensionality.py): features that make
    orthogonal groups, each of them a tight frame.

    Elhage et al. (2022), arXiv:2209.10652.

    >>> feature_dimensionality(torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, -3.0], [0.0, 0.0]]))
    tensor([1.0000, 0.5000, 0.5000, 0.0000], dtype=torch.float64)
    """
    w = w.to(wide(w.device))
    square = w.square().sum(1)
    if not bool((square > 0).any()):
        return square
    scale = square.max().sqrt()  # dimensionalities do not depend on it, and fourth powers of small weights would vanish
    w, square = w / scale, square / scale.square()
    both = ((w @ (w.T @ w)) * w).sum(1)  # |w_i|^2 times the sum
    return torch.where(square > 0, square.square() / both, 0.0)


def effective_features(w: Rows) -> float:
    r"""$(\sum_i \|w_i\|^2)^2 / \sum_i \|w_i\|^4$: n where all rows have one norm, 1 where one alone is not 0.

    It looks at norms only: rows that are all the same count as n, too. nan where all are 0.

    >>> effective_features(torch.tensor([[3.0, 0.0], [0.0, 3.0], [0.0, 0.0]]))
    2.0
    """
    square = w.to(wide(w.device)).square().sum(1)
    square = square / square.max()
    return float(square.sum().square() / square.square().sum())


def superposition(
    weights: Mapping[str, Float[Tensor, "_ _"]], *, norm_scale: float | None = None, chunk: int = 4096
) -> Superposition:
    r"""Whether more features than dimensions are there, and how they share these, for every matrix of feature vectors (n, m).

    - n, m, the rank, $\sum_i D_i \le \mathrm{rank}$ (`feature_dimensionality`): superposition needs n > m, and features that
      are all there ($D_i$ above 0).
    - `effective_features`, and per dimension: above 1 follows from n > m even where rows repeat each other.
    - |cos| of pairs: its mean beside that of random directions, $m\, \overline{\cos^2}$ (1 for random directions, 0 for
      orthogonal ones), its largest beside Welch's bound, which is one of the largest.
    - $\sum_i \|w_i\|^2 / (m s^2)$, and the shares of norms above s / 2 and s (phi), with s the norm that counts as 1: these
      mean nothing without it. norm_scale: s, 1 in the toy model; None is the median norm of the rows that are not 0.

    Nothing here says which of these features a network uses. chunk: as for `feature_overlap`. Matrices of a transformer:
    `feature_matrices`.

    Elhage et al. (2022), arXiv:2209.10652; Liu, Liu, Gore (2025), arXiv:2505.10465 (phi); Welch (1974).

    Raises ValueError for what is no matrix of floating-point numbers, is empty, or has entries that are not finite.

    >>> found = superposition({"antipodal": torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])})
    >>> found.dimensionality, found.index, found.feature_dimensionality
    (tensor([2.], dtype=torch.float64), tensor([2.], dtype=torch.float64),
     tensor([[0.5000, 0.5000, 0.5000, 0.5000]], dtype=torch.float64))
    """
    if norm_scale is not None:
        check_positive("norm_scale", norm_scale)
    if not weights:
        raise ValueError("`weights` must have a matrix by name, got none.")
    columns: dict[str, list[Any]] = {}
    for name, w in weights.items():
        if w.ndim != 2 or not w.numel() or not w.is_floating_point():
            got = f"the shape {tuple(w.shape)} of {w.dtype}"
            raise ValueError(f"`weights[{name!r}]` must be a matrix of feature vectors, got {got}.")
        if not bool(w.isfinite().all()):
            raise ValueError(f"`weights[{name!r}]` must be finite, got nan or infinite entries: check the weights.")
        for field, value in _of_matrix(w, norm_scale, chunk).items():
            columns.setdefault(field, []).append(value)
    made = {name: nn.utils.rnn.pad_sequence(x, batch_first=True, padding_value=math.nan) if isinstance(x[0], Tensor)
            else torch.tensor(x, dtype=torch.long if isinstance(x[0], int) else torch.float64)
            for name, x in columns.items()}  # fmt: skip
    scale = "the median norm" if norm_scale is None else f"{norm_scale:g}"
    return Superposition(**made, scale=scale, matrices=list(weights))


def _of_matrix(w: Rows, norm_scale: float | None, chunk: int) -> dict[str, Any]:
    """Fields of the result."""
    overlap, each, norms = feature_overlap(w, chunk=chunk), feature_dimensionality(w), w.to(wide(w.device)).norm(dim=1)
    there, m = norms[norms > 0], w.shape[1]
    scale = norm_scale or (float(there.quantile(0.5)) if len(there) else math.nan)
    of_weights, of_sums = (torch.finfo(each).eps for each in (w.dtype, wide(w.device)))
    rank = int(torch.linalg.matrix_rank(  # rounding of the weights has at most their norm times eps / 2
        w.to(wide(w.device)), atol=of_weights * float(norms.norm()), rtol=max(w.shape) * of_sums,
    ))  # fmt: skip
    return {
        "num_features": overlap.num, "num_dims": m, "rank": rank,
        "dimensionality": float(each.sum()), "effective_features": effective_features(w),
        "features_per_dim": float((norms / scale).square().sum()) / m,
        "mean_overlap": overlap.mean, "random_overlap": mean_abs_coordinate(m), "square_ratio": m * overlap.mean_square,
        "largest_overlap": overlap.largest, "welch": welch_bound(overlap.num, m), "norm_scale": scale,
        "phi_half": float((norms > scale / 2).to(norms).mean()), "phi_one": float((norms > scale).to(norms).mean()),
        "feature_dimensionality": each.cpu(), "feature_norm": norms.cpu(),
    }  # fmt: skip


def feature_matrices(net: Functional, params: Params) -> dict[str, Rows]:
    r"""The matrices of a transformer whose rows are feature vectors in the residual stream, (n, D).

    `embedding` (V, D): what each token puts into the stream. `unembedding` (V, D): what each logit reads of the final norm's
    output, without its gain; absent where it is the embedding itself, or the model has no such head. `mlp_out.l`
    (units, D): what each unit of layer l's MLP writes.

    Raises ValueError for a model whose parts are not described.

    >>> import funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> {name: tuple(w.shape) for name, w in feature_matrices(net, net.params).items()}
    {'embedding': (9, 4), 'mlp_out.0': (16, 4)}
    """
    body = body_of(net._skeleton)
    if body is None:
        raise ValueError(
            f"the parts of {type(net._skeleton).__name__} are not described (those of {', '.join(sorted(ANATOMIES))} are): "
            "give `superposition` matrices of your own."
        )
    values, names = net._values(params), {id(each): name for name, each in net._skeleton.named_parameters()}

    def rows(module: Any) -> Tensor:
        return values[names[id(module.weight)]]

    tokens = body.model.get_submodule(body.anatomy.tokens)
    made = {"embedding": rows(tokens)}
    head: Any = net._skeleton.get_output_embeddings()  # type: ignore[operator]
    if head is not None and head.weight is not tokens.weight:
        made["unembedding"] = rows(head)
    for layer, block in enumerate(body.blocks):
        module = block.get_submodule(body.anatomy.mlp_post)
        made[f"mlp_out.{layer}"] = rows(module).T if isinstance(module, nn.Linear) else rows(module)
    return made
