"""How much the gradients of one task fall on what another task needs, in the queries, keys, values and outputs of heads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.apart import tolerance
from ..core.heads import head_part
from ..core.keys import Key, check_key, fold_in
from ..core.layout import View
from ..core.objective import Loss, Theta
from ..core.result import Result, derived, internal, quantity
from ..core.statistics import q_values
from ..curvature.label_permutation import label_test
from ..curvature.scored_sequences import scored_sequences
from ..curvature.whitening import block_rows, check_tasks, damped

Pairs = Float[Tensor, "b n m"]
Values = Float[Tensor, " b"]
SAMPLES = ("block", "sample", "other sample")


class HeadInterference(Result):
    """Interference of single sequences of two tasks in the parameters of attention heads."""

    directed: Pairs = quantity("interference", per=SAMPLES, shown=False)
    signed: Pairs = quantity("signed interference", per=SAMPLES, shown=False)
    symmetric: Pairs = quantity("symmetric interference", per=SAMPLES, shown=False)
    absolute: Float[Tensor, "b m"] = quantity("sum of |gradient|", per=("block", "other sample"), shown=False)
    p_directed: Values = quantity("p value of needing other parameters", per="block")
    p_signed: Values = quantity("p value of difference", per="block")
    damping: float
    num_held_out: int
    num: int
    key: Key
    blocks: list[str] = internal()

    @derived("mean interference", per="block", stderr="mean_directed_stderr")
    def mean_directed(self) -> Values:
        return self.directed.mean((1, 2))

    @derived("mean signed interference", per="block", stderr="mean_signed_stderr")
    def mean_signed(self) -> Values:
        return self.signed.mean((1, 2))

    @derived("mean symmetric interference", per="block", stderr="mean_symmetric_stderr")
    def mean_symmetric(self) -> Values:
        return self.symmetric.mean((1, 2))

    @derived("interference over that of the held-out samples", per="block", stderr="ratio_stderr")
    def ratio(self) -> Values:
        """Mean interference over the mean sum of |g|, which is what it is (up to the damping) where the first task has the
        Fisher information of the held-out samples."""
        return self.mean_directed / self.absolute.mean(1)

    @derived("q value of needing other parameters", per="block")
    def q_directed(self) -> Values:
        return torch.tensor(q_values(self.p_directed.tolist()), dtype=torch.float64)

    @derived("q value of difference", per="block")
    def q_signed(self) -> Values:
        return torch.tensor(q_values(self.p_signed.tolist()), dtype=torch.float64)

    @derived("interference of heads", per=("layer", "part"))
    def heads(self) -> Float[Tensor, "l p"]:
        """`ratio` by place: 1 where the first task has the information of the held-out ones; nan for what is not there."""
        return self._by_part(self.ratio)

    @derived("q value of heads", per=("layer", "part"))
    def q_heads(self) -> Float[Tensor, "l p"]:
        return self._by_part(self.q_directed)

    mean_directed_stderr = property(lambda self: _stderr(self.directed))
    mean_signed_stderr = property(lambda self: _stderr(self.signed))
    mean_symmetric_stderr = property(lambda self: _stderr(self.symmetric))

    @property
    def ratio_stderr(self) -> Values:
        """Of a ratio of means, linearised, over the sequences of both tasks; the held-out ones are as they are."""
        n, m = self.directed.shape[1:]
        rest = self.directed.mean(1) - self.ratio[:, None] * self.absolute
        return (self.directed.mean(2).var(1) / n + rest.var(1) / m).sqrt() / self.absolute.mean(1)

    @property
    def coords(self) -> dict[str, list[str]]:
        layers, parts = self._places
        return {"block": self.blocks, "layer": layers, "part": parts}

    @property
    def head(self) -> str:
        n, m = self.directed.shape[1:]
        return (
            f"interference of {n} x {m} sequences of two tasks in {len(self.blocks)} parts of heads, weighed by "
            f"{self.num_held_out} held out"
        )

    @property
    def _places(self) -> tuple[list[str], list[str]]:
        """Attention modules, and the parts of their heads by kind."""
        parts = [head_part(block) for block in self.blocks]
        kinds = sorted({("QKVO".index(part.kind), part.head) for part in parts})
        return list(dict.fromkeys(part.attention for part in parts)), [f"{'QKVO'[kind]} {head}" for kind, head in kinds]

    def _by_part(self, values: Values) -> Tensor:
        layers, names = self._places
        out = values.new_full((len(layers), len(names)), math.nan)
        for block, value in zip(self.blocks, values, strict=True):
            part = head_part(block)
            out[layers.index(part.attention), names.index(f"{part.kind} {part.head}")] = value
        return out


def head_interference(
    first: Loss,
    second: Loss,
    held_out: Loss,
    theta: Theta,
    *,
    views: Mapping[str, Sequence[View]],
    key: Key,
    damping: float = 1e-3,
    num: int = 999,
    chunk_size: int = 8,
) -> HeadInterference:
    r"""Interference of sequence j of task B with sequence i of task A, in blocks of `head_views`: Q, K, V, O of each head.

    $$M_{ij} = \sum_k \frac{g_{ik}^2}{I_k + \lambda} |g_{jk}|, \qquad
      \text{signed: } \sum_k \frac{g_{ik}\, g_{jk}}{I_k + \lambda}, \qquad
      \text{symmetric: } \sum_k \frac{|g_{ik}|\, |g_{jk}|}{I_k + \lambda},$$

    with g the gradient of a sequence's summed loss, I the mean of g^2 over the held-out sequences, and lambda the damping
    times the mean of I over the block. A signed one below 0 means that a step for one sequence, scaled by the Fisher
    information, hurts the other.
    Standard errors are of the mean over pairs, both tasks' sequences being samples and the held-out ones fixed. Few of those
    bias M and `ratio` upward, as 1 / I is convex: compare blocks and tasks at one number of them.

    A document takes I from the sequences of A themselves. Then the mean of M over A is $\sum_k |g_{jk}|$ up to the damping,
    and says nothing of A (proofs/interference_average.py). Held-out sequences of A alone tend to the same as they grow in
    number: `ratio` is 1 then. Take them from the data that the tasks are compared to (both tasks together, or those of the
    base model), and `ratio` says how much more of A's information lies where B moves.

    `p_directed`, `p_signed`: `label_test` of M and of the signed inner products over the sequences of both tasks. Nothing of
    I depends on the labels, so that they are exact. Permuting rows of g_i^2, as a document does, leaves the mean as it is:
    p is 1 always.

    Sequences of which nothing is scored are left out.
    Memory is (n + m + held out) times the attention parameters of one layer.

    Raises ValueError for losses of different parameters, a sequence that is held out and in a task, names that are not those
    of `head_views`, a block whose held-out gradients are all 0, and fewer than two sequences of a task.
    """
    check_key(key)
    theta = Loss.vector(first, theta)
    check_tasks(first, second)
    check_tasks(first, held_out)
    first, second, held_out = (scored_sequences(loss, theta)[0] for loss in (first, second, held_out))
    if not damping >= 0:
        raise ValueError(f"`damping` must be at least 0, got {damping}.")
    made: list[tuple[_Pooled, int]] = []
    names, num_held_out = [], 0
    for blocks in _by_module(views):
        a, b, held = (block_rows(loss, theta, list(blocks.values()), chunk_size) for loss in (first, second, held_out))
        check_held_out(torch.cat(a, 1), torch.cat(b, 1), torch.cat(held, 1), tolerance(first))
        for name, one, two, rest in zip(blocks, a, b, held, strict=True):
            weights = damped(rest.square().mean(0), damping, name)
            made.append((interference_of(one, two, weights), len(one)))
            names.append(name)
            num_held_out = len(rest)
    n = made[0][1]
    pooled = _Pooled(*(torch.stack(each) for each in zip(*(each for each, _ in made), strict=True)))
    directed, signed = (
        label_test(each, n, key=fold_in(key, "labels"), num=num).p_value for each in (pooled.directed, pooled.signed)
    )
    directed_ab, signed_ab, symmetric_ab = (each[:, :n, n:].contiguous() for each in pooled[:3])
    return HeadInterference(
        directed_ab, signed_ab, symmetric_ab, pooled.absolute[:, n:].contiguous(), directed, signed, float(damping),
        num_held_out, num, key, names,
    )  # fmt: skip


class _Pooled(NamedTuple):
    """Of the sequences of both tasks with each other, those of the first task first."""

    directed: Tensor
    signed: Tensor
    symmetric: Tensor
    absolute: Tensor
    """Sum of |g| of each."""


def interference_of(a: Float[Tensor, "n k"], b: Float[Tensor, "m k"], weights: Float[Tensor, " k"]) -> _Pooled:
    """From gradients in one block, and what they are divided by; see proofs/interference_average.py."""
    rows = torch.cat([a, b])
    scaled = rows / weights
    return _Pooled((rows * scaled) @ rows.abs().T, scaled @ rows.T, scaled.abs() @ rows.abs().T, rows.abs().sum(1))


def check_held_out(a: Tensor, b: Tensor, held: Tensor, relative: float) -> None:
    """No gradient of the held-out sequences is that of another one."""
    for task, rows in (("first", a), ("second", b)):
        apart = torch.cdist(rows, held, compute_mode="donot_use_mm_for_euclid_dist")
        same = apart <= relative * rows.norm(dim=1, keepdim=True)
        same &= rows.any(1, keepdim=True)
        if bool(same.any()):
            i, j = same.nonzero()[0].tolist()
            raise ValueError(
                f"sequences of `held_out` must be in no task, and {j} of it has the gradient of {i} of the {task} task: its "
                "own Fisher information would make every task's mean interference the same."
            )


def _by_module(views: Mapping[str, Sequence[View]]) -> Iterator[dict[str, Sequence[View]]]:
    """The blocks of one attention module after another."""
    modules: dict[str, dict[str, Sequence[View]]] = {}
    for name, each in views.items():
        modules.setdefault(head_part(name).attention, {})[name] = each
    return iter(modules.values())


def _stderr(pairs: Tensor) -> Tensor:
    """Of the mean over pairs: over rows and over columns, both drawn."""
    n, m = pairs.shape[1:]
    return (pairs.mean(2).var(1) / n + pairs.mean(1).var(1) / m).sqrt()
