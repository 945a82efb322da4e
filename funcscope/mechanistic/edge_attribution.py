"""Which edges of a transformer carry a difference of two inputs, by gradients and exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..core.checks import check_count
from ..core.estimate import Estimate
from ..core.forward import Inputs
from ..core.layout import Params
from ..core.model import Functional
from ..core.result import Result, derived, internal
from ..core.standard_errors import ratio_stderr
from ..core.statistics import mean
from .edges import Graph, graph_of, names_of_edges, pass_with_edges, writes_of
from .effects import one_by_one
from .passes import not_finite
from .patching import Metric, Task, patching_task, scored


class EdgeAttribution(Result):
    """Estimated effects of all edges; made by `edge_attribution`."""

    samples: Float[Tensor, "e n"] = internal()
    """Per edge and sequence, in the unit of the metric."""
    reference: Float[Tensor, " n"] = internal()
    edges: Bool[Tensor, "s r"] = internal()
    senders: list[str] = internal()
    receivers: list[str] = internal()
    num_nodes: int

    @derived("estimated share of the difference", per=("sender", "receiver"), stderr="scores_stderr", shown=False)
    def scores(self) -> Float[Tensor, "s r"]:
        """nan where there is no edge."""
        return self._placed(self.shares)

    @property
    def scores_stderr(self) -> Float[Tensor, "s r"]:
        return self._placed(ratio_stderr(self.samples, self.reference))

    @derived("difference of the metric, corrupt minus clean")
    def difference(self) -> Estimate:
        return mean(self.reference)

    @property
    def shares(self) -> Float[Tensor, " e"]:
        return self.samples.sum(1) / self.reference.sum()

    @property
    def order(self) -> list[int]:
        """Edges from the largest |share| to the smallest."""
        return self.samples.sum(1).abs().argsort(descending=True, stable=True).tolist()

    @property
    def names(self) -> list[str]:
        return [f"{self.senders[s]} -> {self.receivers[r]}" for s, r in self.edges.nonzero().tolist()]

    def circuit(self, num: int) -> list[str]:
        """The `num` edges of the largest |share|, largest first."""
        return [self.names[i] for i in self.order[:num]]

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"sender": self.senders, "receiver": self.receivers}

    @property
    def head(self) -> str:
        how = f"EAP-IG, {self.num_nodes} nodes" if self.num_nodes else "EAP"
        return f"{len(self.samples)} edges by {how}, {self.samples.shape[1]} pairs of sequences"

    @property
    def notes(self) -> tuple[str, ...]:
        if lost := not_finite("effects of edges are", self.samples, self.reference):
            return tuple(lost)
        return (f"Largest: {', '.join(self.circuit(5))}. Errors are over sequences, not those of the first order.",)

    def _placed(self, values: Tensor) -> Tensor:
        out = values.new_full(self.edges.shape, math.nan)
        return out.masked_scatter(self.edges, values)


def edge_attribution(
    net: Functional, params: Params, clean: Inputs, corrupt: Inputs, metric: Metric, *, num_nodes: int = 5
) -> EdgeAttribution:
    r"""To first order, what share of the difference between two inputs every edge carries, by one backward pass per node.

    $$\hat e_{sr} = \frac{\sum_i (w_s^{\mathrm{corrupt}} - w_s^{\mathrm{clean}})_i \cdot \overline{\nabla_{x_r} M_i}}
      {\sum_i M_i(\mathrm{corrupt}) - M_i(\mathrm{clean})},$$

    with w what a sender (embedding, head, MLP) writes into the residual stream and x_r what a receiver (a head's query,
    key or value, an MLP, the logits) reads of it, before its own norm. num_nodes 0: the gradient at the clean input (EAP);
    from 1: its mean over the way of the embedding from clean to corrupt, by Gauss-Legendre quadrature of so many nodes
    (EAP-IG), which sees past places where the gradient vanishes. Standard errors are over sequences; the error of the first
    order is not in them: `circuit_faithfulness` has exact patches beside it. For a model that is linear both are exact:
    proofs/attribution_patching.py.

    Memory: the writes of all senders, and one gradient per edge and sequence.

    Raises ValueError for inputs and metrics as `activation_patching`, fewer than 0 nodes, and a family whose residual stream
    is no sum of what heads and MLPs write (there are GPT-2, GPT-NeoX, Llama, Mistral, Qwen2 and Qwen3).

    Syed, Rager, Conmy (2023), arXiv:2310.10348; Hanna, Pezzelle, Belinkov (2024), arXiv:2403.17806.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=4, n_head=2, vocab_size=9, n_positions=8))
    >>> net, clean, corrupt = fs.functional(model), torch.tensor([[1, 2, 3]]), torch.tensor([[4, 2, 3]])
    >>> found = edge_attribution(net, net.params, clean, corrupt, lambda logits: logits[:, -1, 5])
    >>> found.scores.shape                                                        # 2 (2 heads + MLP) + embedding
    torch.Size([7, 15])
    """
    check_count("num_nodes", num_nodes, 0)
    graph = graph_of(net, params)
    task = patching_task(net, params, clean, corrupt, metric, "noise")
    edges = graph.edges.to(net.device)
    with torch.no_grad():
        start, end = (writes_of(graph, inputs) for inputs in (clean, corrupt))
    steps = end - start
    places, weights = _nodes(num_nodes)
    zeros = steps.new_zeros(steps.shape[1], *edges.shape)
    total = torch.zeros_like(zeros, dtype=torch.float64)
    for place, weight in zip(places, weights, strict=True):
        embedding = start[0] + place * steps[0]

        def score(cut: Tensor, embedding: Tensor = embedding) -> Tensor:
            return scored(metric, pass_with_edges(graph, clean, cut, end, embedding=embedding, fixed=steps)).sum()

        total = total + weight * torch.func.grad(score)(zeros).double()
    samples = total[:, edges].T.contiguous()
    reference = (task.end_score - task.start_score).cpu()
    return EdgeAttribution(samples.cpu(), reference, edges.cpu(), graph.senders, graph.receivers, num_nodes)


def edge_patching(
    net: Functional,
    params: Params,
    clean: Inputs,
    corrupt: Inputs,
    metric: Metric,
    edges: Sequence[str],
    *,
    chunk: int = 8,
) -> Float[Tensor, "e n"]:
    """Exactly: per edge and sequence, the change of the metric where one edge alone carries what its sender writes in the
    corrupt pass; chunk of them side by side.

    edges: as `EdgeAttribution.names` has them. Raises ValueError for others and for none, and as `edge_attribution`.
    """
    if not edges:
        raise ValueError("`edges` must name an edge at least, as `EdgeAttribution.names` has them.")
    graph, task = graph_of(net, params), patching_task(net, params, clean, corrupt, metric, "noise")
    names = names_of_edges(graph)
    if unknown := [each for each in edges if each not in names]:
        raise ValueError(f"there is no edge {unknown[0]!r}: they are written {names[0]!r}.")
    places = graph.edges.nonzero()[[names.index(each) for each in edges]]
    chosen = torch.zeros(len(places), *graph.edges.shape, dtype=torch.bool)
    chosen[torch.arange(len(places)), places[:, 0], places[:, 1]] = True
    return cut_scores(graph, task, metric, chosen, chunk) - task.start_score.cpu()


def _nodes(num: int) -> tuple[list[float], list[float]]:
    """Places on the way from clean to corrupt, and their weights; the start alone without nodes."""
    if num == 0:
        return [0.0], [1.0]
    at, weights = np.polynomial.legendre.leggauss(num)
    return ((at + 1) / 2).tolist(), (weights / 2).tolist()


def cut_scores(
    graph: Graph, task: Task, metric: Metric, cuts: Bool[Tensor, "m s r"], chunk: int
) -> Float[Tensor, "m n"]:
    """The metric of passes of the clean input in which some edges carry the corrupt one."""
    with torch.no_grad():
        given = writes_of(graph, task.end)

    def of(cut: Tensor) -> Tensor:
        return scored(metric, pass_with_edges(graph, task.start, cut[None].to(given.dtype), given))

    return one_by_one(of, cuts.to(given.device), chunk).cpu()
