"""How far a network falls into blocks whose gradients do not go together, and which of them are communities."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_count
from ..core.estimate import Estimate
from ..core.keys import Key, check_key
from ..core.objective import Loss, Theta
from ..core.result import Result, internal, quantity
from ..core.tables import counted
from ..curvature.gram import Blocks, Grams, gram
from ..curvature.gram_errors import free_errors
from ..curvature.gram_statistics import Data, coupled
from ..curvature.scored_sequences import apart_from_copies
from ..curvature.task_pairs import check_grams
from .communities import communities

Matrix = Float[Tensor, "b b"]
BLOCKS = ("block", "other block")


class Modularity(Result):
    """How far the Fisher matrix falls into blocks, and whether blocks fall into communities."""

    coupling: Matrix = quantity("coupling of blocks", per=BLOCKS, stderr="coupling_stderr")
    coupling_naive: Matrix = quantity("coupling of blocks, with the samples' noise", per=BLOCKS, shown=False)
    community: Float[Tensor, " b"] = quantity("community", per="block")
    """A number for every block; nan where there is no graph."""
    off_block_mass: Estimate = quantity("share of the squares off the blocks")
    off_block_mass_naive: float = quantity("share of the squares off the blocks, with the samples' noise")
    modularity: float = quantity("modularity of the coupling")
    null_mean: float = quantity("modularity of permuted couplings")
    null_quantile: float = quantity("95 % point of permuted couplings")
    p_value: float = quantity("p value of the modularity")
    num_sequences: int
    num_left_out: int
    num: int
    key: Key
    coupling_stderr: Matrix = internal()
    blocks: list[str] = internal()

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"block": self.blocks, "other block": self.blocks}

    @property
    def unresolved(self) -> list[str]:
        names = ["off_block_mass"] if bool(self.off_block_mass.value.isnan()) else []
        graph = ["modularity", "null_mean", "null_quantile", "p_value"]
        return [*names, *(graph if math.isnan(self.modularity) else [])]

    @property
    def head(self) -> str:
        num = counted(self.num_sequences, "sequence")
        return f"coupling of {counted(len(self.blocks), 'block')} by the gradients of {num}"

    @property
    def notes(self) -> list[str]:
        notes = []
        if self.num_left_out:
            notes.append(f"{counted(self.num_left_out, 'sequence')} left out: not scored, or a copy.")
        own = self.coupling.diagonal().isnan().tolist()
        if none := [name for name, lost in zip(self.blocks, own, strict=True) if lost]:
            notes.append(f"no coupling, as ||F|| is not told from 0 in {', '.join(none)}: take more sequences.")
        if math.isnan(self.modularity):
            notes.append("no modularity: it needs three resolved blocks or more, two of them coupled.")
        else:
            notes.append(
                "`modularity` is the largest that a search makes, and above 0 for permuted couplings, too: read it beside "
                "`null_quantile`. It has no error over sequences."
            )
        return notes


def modularity_score(
    loss: Loss, theta: Theta, *, key: Key, by: Blocks = "module", num: int = 99, chunk_size: int = 64
) -> Modularity:
    r"""How far the parameters fall into blocks whose gradients do not go together, by the blocks of the Fisher matrix.

    `block_coupling` of the Gram of sequences. by, chunk_size: of `gram`; the couplings of three blocks or more have a
    modularity. Copies of sequences, and what is not scored, are left out.

    Raises ValueError for fewer than three different sequences, and as `gram` does.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)))
    >>> half_square = fs.custom(lambda out, y: (out - y)[:, 0] ** 2 / 2)
    >>> loss = fs.objective(net, [(torch.ones(9, 1), 5 + 0.1 * torch.arange(9.0)[:, None])], half_square)
    >>> modularity_score(loss, torch.tensor([0.5, 2.0]), key=fs.key(0), by="tensor").coupling.round(decimals=3)
    tensor([[1., 1.],
            [1., 1.]], dtype=torch.float64)
    """
    check_key(key)
    samples, num_left_out = apart_from_copies(loss, theta)
    result = block_coupling(gram(samples, theta, by=by, chunk_size=chunk_size), key=key, num=num)
    return replace(result, num_left_out=num_left_out)


def block_coupling(grams: Grams, *, key: Key, num: int = 99) -> Modularity:
    r"""Cosines between blocks of the empirical Fisher matrix, without the bias of few samples, and communities of blocks.

    $$\text{coupling}_{ab} = \frac{\lVert F_{ab} \rVert^2}{\lVert F_{aa} \rVert \lVert F_{bb} \rVert}, \qquad
      \text{off-block mass} = 1 - \frac{\sum_b \lVert F_{bb} \rVert^2}{\lVert F \rVert^2}, \qquad
      \lVert F_{ab} \rVert_F^2 \approx \frac{\sum_{i \ne j} K^a_{ij} K^b_{ij}}{n (n-1)},$$

    K the Grams of the blocks: 0 for blocks whose gradients are independent and have no means, 1 for blocks of one direction
    each that are always seen together. Sequences are the samples; errors are jackknifed, and too large for independent
    blocks. What a squared norm that is not two of its errors above 0 enters is nan. `*_naive` has pairs of a sample with
    itself, too: $\mathbb E \lVert g_a \rVert^2 \lVert g_b \rVert^2 / n$ in every cell. Two independent blocks of 150
    parameters have the naive coupling .95, .83, .54, .13 at n = 8, 32, 128, 1024.

    `modularity`: Newman's Q of the graph of blocks, with the couplings between them, those below 0 taken for 0, for weights
    A of sum 2m, 0 on the diagonal, degrees $k_a = \sum_b A_{ab}$, and the communities c that Louvain's search gives,

    $$Q = \frac{1}{2m} \sum_{a, b} \Big(A_{ab} - \frac{k_a k_b}{2m}\Big) [c_a = c_b].$$

    A search finds communities in any graph: `null_mean`, `null_quantile` and `p_value` are of `num` graphs with the same
    couplings on permuted pairs. Blocks that are not resolved are not in the graph. Needs networkx.

    Raises ValueError for Grams of two data sets or of tokens and for fewer than three samples, ModuleNotFoundError without
    networkx.

    Newman, Girvan (2004), doi:10.1103/PhysRevE.69.026113; Blondel et al. (2008), doi:10.1088/1742-5468/2008/10/P10008.

    >>> import funcscope as fs
    >>> a = torch.tensor([[1.0], [2.0], [-1.0], [-2.0]]).double()                # the second block is 3 times the first
    >>> grams = Grams(torch.stack([a @ a.T, 9 * a @ a.T]), "sequence", 0, [], ["one", "other"])
    >>> block_coupling(grams, key=fs.key(0)).coupling_naive
    tensor([[1., 1.],
            [1., 1.]], dtype=torch.float64)
    """
    check_key(key)
    check_count("num", num)
    check_grams(grams, grams, grams)
    values = grams.values.double()
    count = values.shape[-1]
    if count < 3:
        raise ValueError(f"couplings need three sequences at least, got {count}.")
    own = torch.arange(count, device=values.device)
    free = free_errors(Data(values, own, own[:0], False, 0.0))
    off = values.masked_fill(own[:, None] == own, 0)
    naive, debiased = (torch.einsum("aij,bij->ab", x, x) for x in (values, off))
    plain, made = coupled(naive, ""), coupled(debiased, "")
    known = torch.where(free.resolved, 1.0, math.nan).to(values)
    coupling = made["coupling"] * known[:-1, None] * known[:-1]
    mass = made["off_block_mass"] * known[-1]
    graph = communities(coupling.cpu(), key=key, num=num)
    return Modularity(
        coupling, plain["coupling"], graph.places, Estimate(mass, free.off_block_mass + 0 * mass, count),
        float(plain["off_block_mass"]), *graph[1:], count, 0, num, key, free.coupling + 0 * coupling,
        list(grams.blocks),
    )  # fmt: skip
