"""Communities of a weighted graph by Louvain's search, and the modularity of graphs with the same weights elsewhere."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.keys import Key, fold_in, uniform


class Communities(NamedTuple):
    places: Float[Tensor, " b"]
    modularity: float
    null_mean: float
    null_quantile: float
    p_value: float


def communities(coupling: Float[Tensor, "b b"], *, key: Key, num: int) -> Communities:
    """Of the blocks that have a coupling, beside `num` graphs with the same couplings on permuted pairs."""
    there = ~coupling.diagonal().isnan()
    places = torch.full((len(coupling),), math.nan, dtype=torch.float64)
    some = coupling[there][:, there].nan_to_num().clamp(min=0)
    rows, columns = torch.triu_indices(len(some), len(some), offset=1)
    weights = some[rows, columns]
    if len(some) < 3 or not bool(weights.any()):
        return Communities(places, *4 * [math.nan])
    nodes = int(there.sum())
    at, found = search(nodes, rows, columns, weights, fold_in(key, "search"))
    null = torch.tensor(
        [
            search(
                nodes,
                rows,
                columns,
                weights[permutation(fold_in(fold_in(key, "null"), i), len(weights))],
                fold_in(key, i),
            )[1]
            for i in range(num)
        ]
    )
    places[there] = at
    return Communities(places, found, *beside_null(found, null))


def beside_null(value: float, null: Float[Tensor, " r"]) -> tuple[float, float, float]:
    """Mean, 95 % point, and p value of a value as large; rounding counts for equal."""
    as_large = int((null >= value - 1e-12).sum())
    return float(null.mean()), float(null.quantile(0.95)), (1 + as_large) / (1 + len(null))


def permutation(key: Key, num: int) -> Tensor:
    return uniform(key, torch.zeros(num, dtype=torch.float64)).argsort()


def search(nodes: int, rows: Tensor, columns: Tensor, weights: Tensor, key: Key) -> tuple[Float[Tensor, " k"], float]:
    """Communities, numbered by their first node, and their modularity."""
    nx = _networkx()
    graph = nx.Graph()
    graph.add_nodes_from(range(nodes))
    edges = zip(rows.tolist(), columns.tolist(), weights.tolist(), strict=True)
    graph.add_weighted_edges_from(edge for edge in edges if edge[2] > 0)
    found = sorted(map(sorted, nx.community.louvain_communities(graph, seed=key.bits % 2**32)))
    places = torch.zeros(nodes, dtype=torch.float64)
    for number, each in enumerate(found):
        places[each] = number
    return places, float(nx.community.modularity(graph, found))


def _networkx() -> Any:
    """Raises ModuleNotFoundError where it is not installed."""
    try:
        import networkx as nx
    except ModuleNotFoundError as err:
        raise ModuleNotFoundError("modularity of a graph needs networkx: pip install networkx.") from err
    return nx
