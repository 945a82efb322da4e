"""Divergences of distributions that are given by their log-probabilities."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from .estimate import wide


def kl_divergence(log_p: Float[Tensor, "*m V"], log_q: Float[Tensor, "*m V"]) -> Float[Tensor, "*m"]:
    r"""Kullback and Leibler's divergence $\mathrm{KL}(p \| q) = \sum_v p_v (\log p_v - \log q_v)$ in nats, in float64.

    log_p, log_q: log-probabilities over the last dimension; -inf is probability 0. It is not symmetric, infinite where q is 0
    and p is not, and 0 exactly for equal arguments. As both add up to 1, it is summed as $\sum_v p_v \log(p_v / q_v) + q_v -
    p_v$, of which no term is negative: rounding of normalisers, of first order in the shorter sum, is of second order.

    Kullback, Leibler (1951), doi:10.1214/aoms/1177729694.

    >>> import torch
    >>> half, sure = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log()
    >>> round(float(kl_divergence(sure, half)), 4), float(kl_divergence(half, sure))
    (0.6931, inf)
    """
    log_p, log_q = log_p.to(wide(log_p.device)), log_q.to(wide(log_q.device))
    p, q, apart = log_p.exp(), log_q.exp(), log_p - log_q
    near = p * (apart + torch.expm1(-apart.clamp_min(-1.0))).clamp_min(0)
    terms = torch.where(apart < -1, p * apart + q - p, near)
    terms = torch.where(apart == math.inf, math.inf, terms)  # even where exp(log p) underflows
    return torch.where(log_p == -math.inf, q, terms).sum(-1)


def js_divergence(log_p: Float[Tensor, "*m V"], log_q: Float[Tensor, "*m V"]) -> Float[Tensor, "*m"]:
    r"""Jensen and Shannon's divergence in nats, between 0 and ln 2, in float64.

    $$\mathrm{JS} = \tfrac12 \mathrm{KL}(p \| m) + \tfrac12 \mathrm{KL}(q \| m), \qquad m = \tfrac12 (p + q).$$

    Symmetric; finite for every p and q; its root is a metric. The mixture is never formed: $\log m_v - \log p_v$ follows
    from the difference of the two log-probabilities, and is 0 exactly where that is.

    Lin (1991), doi:10.1109/18.61115; Endres, Schindelin (2003), doi:10.1109/TIT.2003.813506.

    >>> import torch
    >>> one, other = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log()
    >>> round(float(js_divergence(one, other)), 6)                                              # ln 2
    0.693147
    """
    log_p, log_q = log_p.to(wide(log_p.device)), log_q.to(wide(log_q.device))
    apart = log_q - log_p
    both = _mean_under(log_p, _half_rise(apart)) + _mean_under(log_q, _half_rise(-apart))
    return (0.0 - both / 2).clamp_min(0)  # rounding of a divergence that is nearly 0


def _half_rise(d: Tensor) -> Tensor:
    """log((1 + exp(d)) / 2), to the last digits of a small d."""
    return torch.log1p(torch.expm1(-d.abs()) / 2) + d.clamp_min(0)


def _mean_under(log_p: Tensor, values: Tensor) -> Tensor:
    """A value that p does not look at may be anything."""
    return torch.where(log_p == -math.inf, 0.0, log_p.exp() * values).sum(-1)
