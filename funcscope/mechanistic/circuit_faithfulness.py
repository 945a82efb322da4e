"""What circuits of a transformer's edges keep of a difference of two inputs, beside random ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import takewhile

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..core.checks import check_count
from ..core.estimate import Estimate
from ..core.forward import Inputs
from ..core.keys import Key, check_key, fold_in, uniform
from ..core.layout import Params
from ..core.model import Functional
from ..core.result import Result, internal, quantity
from ..core.standard_errors import jackknife_stderr, ratio_stderr
from .edge_attribution import EdgeAttribution, cut_scores, edge_patching
from .edges import Graph, graph_of
from .patching import Metric, patching_task


class CircuitFaithfulness(Result):
    """What circuits keep of a difference, beside random ones, and the largest edges; made by `circuit_faithfulness`."""

    faithfulness: Float[Tensor, " k"] = quantity(
        "share kept by the circuit", per="edges kept", stderr="faithfulness_stderr"
    )
    random_mean: Float[Tensor, " k"] = quantity(
        "share kept by random circuits", per="edges kept", stderr="random_mean_stderr"
    )
    random: Float[Tensor, "k m"] = quantity("share kept by a random circuit", per=("edges kept", "draw"), shown=False)
    estimated: Float[Tensor, " j"] = quantity("estimated share", per="edge", stderr="estimated_stderr")
    exact: Float[Tensor, " j"] = quantity("exact share", per="edge", stderr="exact_stderr")
    correlation: Estimate = quantity("correlation of estimated and exact shares")
    num_sign_errors: int = quantity("edges whose estimate has the wrong sign")
    """Of those whose exact share is more than twice its standard error away from 0."""
    num_resolved: int = quantity("edges whose exact share is resolved")
    faithfulness_stderr: Float[Tensor, " k"] = internal()
    random_mean_stderr: Float[Tensor, " k"] = internal()
    estimated_stderr: Float[Tensor, " j"] = internal()
    exact_stderr: Float[Tensor, " j"] = internal()
    sizes: list[int] = internal()
    edges: list[str] = internal()
    num_random: int
    key: Key

    @property
    def coords(self) -> dict[str, list[int] | list[str]]:
        return {"edges kept": self.sizes, "edge": self.edges}

    @property
    def head(self) -> str:
        return f"circuits of up to {self.sizes[-1]} edges beside {self.num_random} random ones of each size"


def circuit_faithfulness(
    net: Functional,
    params: Params,
    clean: Inputs,
    corrupt: Inputs,
    metric: Metric,
    attribution: EdgeAttribution,
    *,
    key: Key,
    sizes: Sequence[int] = (),
    num_random: int = 8,
    num_exact: int = 20,
    chunk: int = 8,
) -> CircuitFaithfulness:
    r"""How much of the difference between two inputs the largest edges keep, all others carrying the corrupt input.

    $$\frac{\sum_i M_i(\text{all but the circuit corrupt}) - M_i(\mathrm{corrupt})}
      {\sum_i M_i(\mathrm{clean}) - M_i(\mathrm{corrupt})},$$

    exactly, by one pass per circuit: 1 for all edges and 0 for none; it may leave that range. Beside it, `num_random`
    circuits of as many edges drawn without replacement: a circuit says something where it keeps more than these. Errors of
    the circuit are over sequences, those of the random mean over draws. The circuit was chosen on these sequences: give
    others for a fair value.

    The `num_exact` largest edges (all, where there are fewer) are patched one by one: the correlation of estimated and exact
    shares (of these edges, which were chosen for large estimates; jackknife error over sequences), and how many have the
    wrong sign.

    attribution: of the same model. sizes: how many edges circuits have; powers of 2, and all, where none are given.

    Raises ValueError as `edge_attribution`, for an attribution of other edges, sizes that are not from 0 to their number, and
    fewer than one random circuit or two exact patches.
    """
    check_key(key)
    check_count("num_random", num_random)
    check_count("num_exact", num_exact, 2)
    graph, task = graph_of(net, params), patching_task(net, params, clean, corrupt, metric, "noise")
    num = int(graph.edges.sum())
    if attribution.senders != graph.senders or not torch.equal(attribution.edges, graph.edges):
        raise ValueError("`attribution` is of another model: it has other edges.")
    num_exact, made = min(num_exact, num), _sizes(sizes, num)
    orders = [attribution.order] + [
        uniform(fold_in(key, i), torch.zeros(num, dtype=torch.float64)).argsort().tolist() for i in range(num_random)
    ]
    cuts = torch.stack([_all_but(graph, order[:size]) for size in made for order in orders])
    kept = cut_scores(graph, task, metric, cuts, chunk) - task.end_score.cpu()
    reference = (task.start_score - task.end_score).cpu()
    shares = (kept.sum(1) / reference.sum()).view(len(made), -1)
    best = kept.view(len(made), len(orders), -1)[:, 0]
    random = shares[:, 1:].contiguous()
    spread = random.std(1) / num_random**0.5 if num_random > 1 else torch.full_like(random[:, 0], math.nan)
    top = attribution.circuit(num_exact)
    exact = edge_patching(net, params, clean, corrupt, metric, top, chunk=chunk)
    estimates = attribution.samples[attribution.order[:num_exact]]
    (one, one_error), (two, two_error) = (
        _shares(x, r) for x, r in ((estimates, attribution.reference), (exact, -reference))
    )
    resolved = two.abs() > 2 * two_error
    return CircuitFaithfulness(
        shares[:, 0].contiguous(), random.mean(1), random, one, two, _correlation(estimates, exact),
        int((resolved & (one.sign() != two.sign())).sum()), int(resolved.sum()), ratio_stderr(best, reference), spread,
        one_error, two_error, made, top, num_random, key,
    )  # fmt: skip


def _sizes(sizes: Sequence[int], num: int) -> list[int]:
    """Those that are asked for, or powers of 2 and all edges."""
    made = list(sizes) or [*takewhile(lambda size: size < num, (2**i for i in range(num))), num]
    if bad := [size for size in made if not 0 <= size <= num]:
        raise ValueError(f"`sizes` must be from 0 to the {num} edges, got {bad[0]}.")
    return made


def _all_but(graph: Graph, circuit: Sequence[int]) -> Bool[Tensor, "s r"]:
    """Every edge that is not in the circuit."""
    edges = graph.edges
    places = edges.nonzero()[torch.as_tensor(circuit, dtype=torch.long)]
    inside = torch.zeros_like(edges)
    inside[places[:, 0], places[:, 1]] = True
    return edges & ~inside


def _shares(samples: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    return samples.sum(1) / reference.sum(), ratio_stderr(samples, reference)


def _correlation(first: Float[Tensor, "e n"], second: Float[Tensor, "e n"]) -> Estimate:
    """Of two numbers per edge, means over sequences; error by leaving each sequence out."""

    def correlation(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - a.mean(0), b - b.mean(0)
        return (a * b).sum(0) / (a.square().sum(0) * b.square().sum(0)).sqrt()

    a, b = (x.double() for x in (first, second))
    rest = correlation(a.sum(1, keepdim=True) - a, b.sum(1, keepdim=True) - b)
    num = first.shape[1]
    stderr = jackknife_stderr(rest) if num > 1 else a.new_tensor(math.nan)
    return Estimate(correlation(a.sum(1), b.sum(1)), stderr, num)
