"""Gauss's rules of Lanczos matrices, what fewer steps would have given, and how far a rule determines a distribution."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Resolution(NamedTuple):
    """How far the steps determine a number, beside what is left to chance in the probes."""

    moved: float
    """By how much the number with half the steps differs from it."""
    bound: float
    """The truth of the same probes is at most this far away (Chebyshev, Markov, Stieltjes); nan where there is no bound."""
    resolved: bool
    """The bound, or else the move, is at most twice the standard error, or a hundredth of the number's scale."""
    steps: int
    """Steps that it would take, if the error falls as 1 / steps; those taken, where it is resolved."""

    def __str__(self) -> str:
        return "resolved" if self.resolved else f"not resolved: some {self.steps:,} steps would be needed"


def rule(T: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Gauss's nodes and weights; what is missing of `steps` nodes is filled with the first one, at weight 0."""
    nodes, S = torch.linalg.eigh(T)
    weights = S[0].square()
    missing = steps - len(nodes)
    return torch.cat([nodes, nodes[:1].expand(missing)]), torch.nn.functional.pad(weights / weights.sum(), (0, missing))


def corner(nodes: Tensor, weights: Tensor, steps: int) -> Tensor:
    """The leading part of the Lanczos matrix of which these are Gauss's nodes and weights: Lanczos on the nodes."""
    rows, T = [weights.sqrt() / weights.sum().sqrt()], torch.zeros(steps, steps, dtype=torch.float64)
    scale = float(nodes.abs().max())
    for i in range(steps):
        w = nodes * rows[i]
        T[i, i] = w @ rows[i]
        for _ in range(2):
            w = w - torch.stack(rows).T @ (torch.stack(rows) @ w)
        beta = float(w.norm())
        if beta <= 1e-12 * scale:  # all nodes of the probe are used
            return T[: i + 1, : i + 1]
        if i + 1 < steps:
            T[i, i + 1] = T[i + 1, i] = beta
            rows.append(w / beta)
    return T


def christoffel(nodes: Tensor, weights: Tensor, at: float, rounding: float) -> float:
    """1 / sum of p_k(at)^2 = 1 / sum of L_i(at)^2 / w_i, with L_i Lagrange's polynomials; copies of a node count as one."""
    real = weights > 1e-14
    values, shares = nodes[real], weights[real]
    new = torch.ones(len(values), dtype=torch.bool)
    new[1:] = values.diff() > rounding * float(nodes.abs().max())
    group = new.cumsum(0) - 1
    masses = torch.zeros(int(new.sum()), dtype=torch.float64).index_add(0, group, shares)
    points = torch.zeros_like(masses).index_add(0, group, shares * values) / masses
    apart = points[:, None] - points + torch.eye(len(points), dtype=torch.float64)
    ratio = (at - points)[None] / apart  # (at - x_j) / (x_i - x_j)
    logs = (ratio.abs().log() * (1 - torch.eye(len(points), dtype=torch.float64))).nan_to_num(0.0).sum(1)
    return float(torch.exp(-torch.logsumexp(2 * logs - masses.log(), 0)).clamp_max(1.0))
