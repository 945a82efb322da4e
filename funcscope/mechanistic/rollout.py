"""How much of each token there is at each position behind all layers, if attention were all that moves information."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..core.estimate import wide


def attention_rollout(
    patterns: Float[Tensor, "l b h t t"], *, alpha: float = 0.5, mask: Bool[Tensor, "b t"] | None = None
) -> Float[Tensor, "b t t"]:
    r"""Attention rollout: row q says of which tokens position q is a mixture behind the last layer.

    $$R = \tilde A_L \cdots \tilde A_1, \qquad \tilde A_l = \alpha \bar A_l + (1 - \alpha) I,$$

    with $\bar A_l$ the mean pattern of the heads of a layer. Later layers are on the left: they read what earlier ones wrote.
    Rows sum to one, and are 0 beyond q for causal patterns (proofs/attention_rollout.py). What values, the output matrices
    and the MLPs do is left out, and all heads count alike: a picture of where information can flow, no attribution.

    patterns: of all layers, of a trace (`trace(...)["pattern"]`). alpha: the share of attention beside the residual stream.
    mask: which positions hold tokens; rows and columns of padding are 0.

    Raises ValueError where alpha is not between 0 and 1.

    Abnar, Zuidema (2020), arXiv:2005.00928.

    >>> import torch
    >>> attention_rollout(torch.tensor([[1.0, 0.0], [1.0, 0.0]]).expand(2, 1, 1, 2, 2))
    tensor([[[1.0000, 0.0000],
             [0.7500, 0.2500]]], dtype=torch.float64)
    """
    rolled: Tensor | None = None
    for mixed in _mixtures(patterns, alpha, mask):
        rolled = mixed if rolled is None else mixed @ rolled
    assert rolled is not None
    return rolled


def attention_flow(
    patterns: Float[Tensor, "l h t t"], *, alpha: float = 0.5, mask: Bool[Tensor, " t"] | None = None
) -> Float[Tensor, "t t"]:
    r"""Attention flow of one sequence: the most that can flow from token k to position q behind the last layer.

    The maximum flow in the graph whose nodes are the positions of every layer and whose edges, from k below to q above, have
    the capacities $\tilde A_l[q, k]$ of `attention_rollout`: unlike there, a way is as wide as its narrowest place, and
    widths do not multiply. It is at least the rollout and at most 1; rows need not sum to one. nan for padding.

    A maximum flow for every pair of positions: for short texts. Needs networkx.

    Raises ModuleNotFoundError without networkx, and ValueError as `attention_rollout`.

    Abnar, Zuidema (2020), arXiv:2005.00928.

    >>> import torch
    >>> attention_flow(torch.tensor([[1.0, 0.0], [1.0, 0.0]]).expand(2, 1, 2, 2)).tolist()
    [[1.0, 0.0], [1.0, 0.5]]
    """
    try:
        import networkx as nx
    except ModuleNotFoundError as err:
        raise ModuleNotFoundError("`attention_flow` needs networkx: pip install networkx.") from err
    graph, length = nx.DiGraph(), patterns.shape[-1]
    layers = list(_mixtures(patterns[:, None], alpha, None if mask is None else mask[None]))
    for layer, (mixed,) in enumerate(layers):
        places = mixed.nonzero().tolist()
        graph.add_weighted_edges_from(
            (((layer, k), (layer + 1, q), float(mixed[q, k])) for q, k in places), weight="capacity"
        )
    flow = torch.full((length, length), torch.nan, dtype=torch.float64)
    real = range(length) if mask is None else mask.nonzero()[:, 0].tolist()
    for q in real:
        for k in real:
            ends = (0, k), (len(layers), q)
            flow[q, k] = nx.maximum_flow_value(graph, *ends) if all(end in graph for end in ends) else 0.0
    return flow


def _mixtures(patterns: Tensor, alpha: float, mask: Tensor | None) -> Iterator[Float[Tensor, "b t t"]]:
    """Layer by layer, attention mixed with the residual stream."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` is a share, from 0 to 1, got {alpha}.")
    total = wide(patterns.device)
    stay = torch.eye(patterns.shape[-1], dtype=total, device=patterns.device)
    for pattern in patterns:
        mixed = alpha * pattern.mean(1, dtype=total) + (1 - alpha) * stay
        yield mixed if mask is None else mixed * (mask[:, None] & mask[:, :, None])
