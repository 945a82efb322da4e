"""Whether the units of consecutive layers fall into communities of large weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_count
from ..core.keys import Key, check_key, fold_in
from ..core.result import Result, quantity
from ..core.tables import counted
from .communities import beside_null, permutation, search


class WeightModularity(Result):
    """Whether the units of consecutive layers fall into communities of large weights, beside permuted weights."""

    modularity: float = quantity("modularity of the weights")
    null_mean: float = quantity("modularity of permuted weights")
    null_quantile: float = quantity("95 % point of permuted weights")
    p_value: float = quantity("p value of the modularity")
    num_communities: int = quantity("communities")
    num_units: int
    num: int
    key: Key

    @property
    def head(self) -> str:
        return f"communities of {counted(self.num_units, 'unit')}, beside {self.num} permutations of every matrix"

    @property
    def notes(self) -> list[str]:
        return ["the weights are all there are: no error but that of `num` permutations."]


def weight_modularity(matrices: Sequence[Float[Tensor, "_ _"]], *, key: Key, num: int = 19) -> WeightModularity:
    r"""Newman's Q of the units of consecutive layers, joined by |W|, beside that of the same weights in random places.

    Every entry of a matrix joins a unit of one layer to one of the next with the weight |W|; communities are those of
    Louvain's search. The null permutes the entries of every matrix, so that sizes of layers and of weights stay: networks of
    random weights have a modularity well above 0, which falls with their width.

    matrices: (out, in), the outputs of one being the inputs of the next. num: permutations, each a search of its own.

    Raises ValueError for matrices that do not follow each other or of which one is 0, ModuleNotFoundError without networkx.

    Filan et al. (2021), arXiv:2103.03386, with a null of permuted weights, and normalised cuts in the place of Q.

    >>> import funcscope as fs
    >>> apart = torch.block_diag(*3 * [torch.ones(2, 2)])                 # three parts that do not touch
    >>> result = weight_modularity([apart, apart], key=fs.key(0))
    >>> round(result.modularity, 4), result.num_communities, result.p_value
    (0.6667, 3, 0.05)
    """
    check_key(key)
    check_count("num", num)
    _check_follow(matrices)
    weights = [each.detach().abs().double().cpu() for each in matrices]
    places, found = _layered(weights, fold_in(key, "search"))
    null = []
    for i in range(num):
        keys = (fold_in(fold_in(fold_in(key, "null"), i), layer) for layer in range(len(weights)))
        mixed = [x.flatten()[permutation(each, x.numel())].view_as(x) for each, x in zip(keys, weights, strict=True)]
        null.append(_layered(mixed, fold_in(key, i))[1])
    numbers = beside_null(found, torch.tensor(null))
    return WeightModularity(found, *numbers, int(places.max()) + 1, len(places), num, key)


def _check_follow(matrices: Iterable[Tensor]) -> None:
    each = list(matrices)
    shapes = [tuple(x.shape) for x in each]
    if not each or any(x.ndim != 2 for x in each) or any(a.shape[0] != b.shape[1] for a, b in pairwise(each)):
        raise ValueError(
            f"`matrices` must be (out, in), the outputs of one being the inputs of the next, got the shapes {shapes}."
        )
    if not all(bool(x.any()) and bool(x.isfinite().all()) for x in each):
        raise ValueError("`matrices` must be finite, and each have an entry that is not 0.")


def _layered(weights: Sequence[Tensor], key: Key) -> tuple[Tensor, float]:
    rows, columns, values, start = [], [], [], 0
    for each in weights:
        out, into = torch.meshgrid(torch.arange(each.shape[0]), torch.arange(each.shape[1]), indexing="ij")
        columns.append(start + into.flatten())
        start += each.shape[1]
        rows.append(start + out.flatten())
        values.append(each.flatten())
    return search(start + weights[-1].shape[0], torch.cat(columns), torch.cat(rows), torch.cat(values), key)
