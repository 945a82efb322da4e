"""How much of a mean gradient is signal: its squared length without bias, the noise of single sequences, their ratios."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_count
from ..core.estimate import Estimate
from ..core.objective import Loss, Theta
from ..core.result import Result, derived, internal, quantity
from ..core.tables import counted
from ..curvature.blocks import Blocks
from ..curvature.gram import Grams, gram
from ..curvature.gram_errors import LEAST
from ..curvature.leafwise import terms_at
from ..curvature.pair_errors import pair_stderr
from ..curvature.scored_sequences import LeftOut, num_different, scored_sequences, sizes

Values = Float[Tensor, " b"]


class GradientNoise(Result):
    """Signal and noise of the gradient of the mean loss, block by block; made by `gradient_noise`."""

    square: Values = quantity("squared length of the mean gradient", per="block", stderr="square_stderr")
    trace: Values = quantity("trace of the covariance of a sequence's gradient", per="block", stderr="trace_stderr")
    snr_square: Values = quantity("squared signal-to-noise ratio", per="block", stderr="snr_square_stderr")
    noise_scale: Values = quantity("noise scale", unit="sequences", per="block", stderr="noise_scale_stderr")
    total_square: Estimate = quantity("squared length of the mean gradient, all blocks")
    total_trace: Estimate = quantity("trace of the covariance of a sequence's gradient, all blocks")
    total_snr_square: Estimate = quantity("squared signal-to-noise ratio, all blocks")
    total_noise_scale: Estimate = quantity("noise scale, all blocks", unit="sequences")
    mean_weight: float = quantity("mean weight of a sequence", unit="scored positions")
    num_sequences: int
    num_unscored: int
    num_copies: int
    square_stderr: Values = internal()
    trace_stderr: Values = internal()
    snr_square_stderr: Values = internal()
    noise_scale_stderr: Values = internal()
    blocks: list[str] = internal()

    @derived("noise scale, all blocks", unit="scored positions")
    def total_noise_scale_tokens(self) -> Estimate:
        """The noise scale times the mean weight of a sequence, which is taken as it is."""
        scale = self.total_noise_scale
        return Estimate(scale.value * self.mean_weight, scale.stderr * self.mean_weight, scale.num)

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"block": self.blocks}

    @property
    def head(self) -> str:
        return f"gradient noise of {counted(self.num_sequences, 'sequence')} in {counted(len(self.blocks), 'block')}"

    @property
    def notes(self) -> list[str]:
        notes = []
        if none := [name for name, x in zip(self.blocks, self.noise_scale, strict=True) if x.isnan()]:
            notes.append(f"no noise scale, as the mean gradient is not told from 0: {', '.join(none)}.")
        if self.total_noise_scale.value.isnan():
            notes.append("no noise scale of all blocks, as the mean gradient is not told from 0: take more sequences.")
        if self.num_sequences < 3:
            notes.append("Two sequences have no standard errors.")
        notes += LeftOut(self.num_unscored, 0, 0).notes
        if self.num_copies:
            notes.append(
                f"{counted(self.num_copies, 'copy', 'copies')} of other sequences: no independent samples, so that squares "
                "are too large and errors too small."
            )
        return notes


def gradient_noise(loss: Loss, theta: Theta, *, by: Blocks = "layer", chunk_size: int = 64) -> GradientNoise:
    r"""Signal and noise of the mean gradient from the exact gradients of single sequences, none of which is made.

    `gram_noise` of the Grams of the sequences' gradients and of their weights. Sequences are the samples; those of which
    nothing is scored are left out. by, chunk_size: those of `gram`; views must not overlap, as blocks are added up.

    Cost: one forward and one backward pass (more beyond `chunk_size` sequences, as `gram` says), and one forward pass.

    Raises ValueError for fewer than two scored sequences and for overlapping views, and as `gram` does.

    McCandlish, Kaplan, Amodei, OpenAI Dota Team (2018), arXiv:1812.06162.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(1, 1, bias=False))
    >>> half_square = fs.custom(lambda out, y: (out - y)[:, 0] ** 2 / 2)
    >>> data = torch.ones(4, 1), torch.tensor([[1.0], [3.0], [5.0], [7.0]])          # gradients 9, 7, 5, 3 at theta = 10
    >>> noise = gradient_noise(fs.objective(net, [data], half_square), torch.tensor([10.0]))
    >>> round(float(noise.total_trace.value), 3), round(float(noise.total_square.value), 3)     # 20 / 3, 36 - 20 / 12
    (6.667, 34.333)
    """
    theta = Loss.vector(loss, theta)
    sizes(loss.layout, by)
    scored, unscored = scored_sequences(loss, theta)
    grams = gram(scored, theta, by=by, chunk_size=chunk_size)
    noise = gram_noise(grams, terms_at(scored, theta).weights)
    copies = noise.num_sequences - num_different(scored, theta)
    return replace(noise, num_unscored=unscored, num_copies=copies)


def gram_noise(grams: Grams, weights: Float[Tensor, " n"]) -> GradientNoise:
    r"""Unbiased squared length of the mean gradient, noise of a sequence, and their ratios, from inner products.

    $g_i$ is the gradient of the weighted sum of sequence i's token losses and $w_i$ the sum of its weights; the gradient of
    the loss is $\sum_i g_i / \sum_i w_i$, an estimate of $G = \mathbb{E} g / \mathbb{E} w$. With
    $r_i = g_i - w_i \nabla L$, and a sequence of the mean weight as the unit,

    $$\widehat{|G|^2} = \frac{\sum_{i \ne j} \langle g_i, g_j \rangle}{\sum_{i \ne j} w_i w_j}, \qquad
      \widehat{\mathrm{tr}\,S} = \frac{\sum_{i \ne j} |r_i - r_j|^2 / 2}{\sum_{i \ne j} w_i w_j}, \qquad
      \widehat{B} = \frac{\widehat{\mathrm{tr}\,S}}{\widehat{|G|^2}}, \qquad
      \widehat{\mathrm{SNR}^2} = \frac{\widehat{|G|^2}}{\widehat{\mathrm{tr}\,S} / n}.$$

    tr S is n times the variance of the gradient of n sequences: it falls to tr S / n, and the simple noise scale B is the
    number of sequences at which it is as large as |G|^2. Where all weights are equal, |G|^2 and tr S are unbiased
    (proofs/gradient_noise.py) and |G|^2 is $|\bar g|^2 - \mathrm{tr}\,S / n$; else they are ratios of sums, right to first
    order. |G|^2 and SNR^2 may be negative. The squared length of the gradient at hand, $|\nabla L|^2$, is too large by
    tr S / n.

    Errors are those of means over pairs (`pair_stderr`), of ratios to first order; the weights are part of the sample. B has
    none, and is nan, where |G|^2 is not two of its errors above 0, as its reciprocal then has no scale: look at SNR^2.
    How often Student's 95 % interval of n - 1 degrees had the truth in it, of 1500 repetitions in 20 parameters:

    | samples | 5 | 12 | 24 | 60 |
    | - | - | - | - | - |
    | normal: square, trace | .91 to .98, .90 | .90 to .97, .93 | .90 to .96, .94 | .93 to .97, .95 |
    | sizes lognormal (sd .5): square, trace | .85 to .99, .78 | .87 to .98, .81 | .85 to .97, .85 | .91 to .96, .88 |

    Few samples of unlike size seldom hold the long ones; intervals of a B that is seldom resolved are not to be trusted.

    A document divides the norm of the mean gradient, over d coordinates, by the mean of the coordinates' standard deviations:
    of n samples of pure noise that is $\sqrt{d / n} / c_4(n)$, 475 for a million coordinates and n = 5, where the SNR is 0
    ($c_4$ is the mean of a normal sample's standard deviation).

    weights: of every sequence, on any device.

    Raises ValueError for Grams of tokens or of two data sets, for fewer than two sequences, and for weights that are not one
    positive number for each.

    >>> g = torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    >>> noise = gram_noise(Grams((g @ g.T)[None], "sequence", 0, [], ["all"]), torch.ones(2))
    >>> float(noise.square), float(noise.trace)
    (3.0, 2.0)
    """
    values, weights = grams.values.cpu().double(), weights.cpu().double()
    _check(grams, weights)
    num = len(weights)
    values = torch.cat([values, values.sum(0, keepdim=True)])
    spreads, both = _spreads(values, weights), weights[:, None] * weights
    square, trace, pairs = _off(values), _off(spreads), _off(both[None])
    of_square, of_trace = pair_stderr(values, both), pair_stderr(spreads, both)
    of_snr, of_scale = _of_ratio(values, spreads), _of_ratio(spreads, values)
    resolved = square / pairs > LEAST * of_square
    snr, scale = num * square / trace, torch.where(resolved, trace / square, math.nan)
    values = torch.stack([square / pairs, trace / pairs, snr, scale])
    errors = torch.stack([of_square, of_trace, num * of_snr, torch.where(resolved, of_scale, math.nan)])
    totals = (Estimate(value[-1], error[-1], num) for value, error in zip(values, errors, strict=True))
    names = ("square", "trace", "snr_square", "noise_scale")
    columns: dict[str, Any] = dict(zip((f"total_{name}" for name in names), totals, strict=True))
    for name, value, error in zip(names, values, errors, strict=True):
        columns |= {name: value[:-1], f"{name}_stderr": error[:-1]}
    return GradientNoise(
        **columns,
        mean_weight=float(weights.mean()),
        num_sequences=num,
        num_unscored=0,
        num_copies=0,
        blocks=list(grams.blocks),
    )


class TwoBatchNoise(NamedTuple):
    """From the squared lengths of the gradients of a small and a large batch."""

    square: float
    """|G|^2."""
    trace: float
    """tr S, of a single sample."""
    noise_scale: float
    """tr S / |G|^2, in samples; nan where |G|^2 is not above 0."""


def two_batch_noise(small_square: float, large_square: float, *, small: int, large: int) -> TwoBatchNoise:
    r"""Signal and noise from the mean squared lengths of gradients of batches of two sizes, as training gives them for free.

    $$|G|^2 = \frac{B_l |G_l|^2 - B_s |G_s|^2}{B_l - B_s}, \qquad
      \mathrm{tr}\,S = \frac{|G_s|^2 - |G_l|^2}{1 / B_s - 1 / B_l}.$$

    Both are unbiased (proofs/gradient_noise.py), and have no errors: average the two lengths over many steps first, divide
    last. small, large: samples in a batch, all of equal weight.

    Raises ValueError for sizes that are no counts, and where `large` is not above `small`.

    McCandlish et al. (2018), arXiv:1812.06162, appendix A.1.

    >>> two_batch_noise(5.0, 2.0, small=1, large=4)                                       # 1 + 4 / B
    TwoBatchNoise(square=1.0, trace=4.0, noise_scale=4.0)
    """
    check_count("small", small)
    check_count("large", large, small + 1)
    square = (large * large_square - small * small_square) / (large - small)
    trace = (small_square - large_square) / (1 / small - 1 / large)
    return TwoBatchNoise(square, trace, trace / square if square > 0 else math.nan)


def _spreads(values: Float[Tensor, "b n n"], weights: Float[Tensor, " n"]) -> Float[Tensor, "b n n"]:
    r"""$|r_i - r_j|^2 / 2$, less what the estimate of G in r moves their sum by: $\langle c, r_i + r_j \rangle$ with
    $c = \sum_k w_k r_k / W$, which adds up to 0 and is 0 for equal weights."""
    total = weights.sum()
    along = values.sum(2) / total
    square = along.sum(1) / total
    inner = values - weights[:, None] * along[:, None] - along[:, :, None] * weights
    inner = inner + square[:, None, None] * weights[:, None] * weights
    own = inner.diagonal(dim1=1, dim2=2) / 2 - inner @ weights / total
    return own[:, :, None] + own[:, None] - inner


def _of_ratio(above: Float[Tensor, "b n n"], below: Float[Tensor, "b n n"]) -> Values:
    return torch.stack([pair_stderr(*each) for each in zip(above, below, strict=True)])


def _off(values: Float[Tensor, "b n n"]) -> Values:
    """Sums over pairs of different samples."""
    return values.sum((1, 2)) - values.diagonal(dim1=1, dim2=2).sum(1)


def _check(grams: Grams, weights: Tensor) -> None:
    n, m = grams.values.shape[1:]
    if grams.unit != "sequence":
        raise ValueError("tokens of one sequence go together, and are no samples: take Grams with `unit='sequence'`.")
    if n != m or n < 2:
        raise ValueError(f"the Grams must be of at least two sequences with themselves, got {n} x {m}.")
    if weights.shape != (n,) or not bool((weights > 0).all()):
        raise ValueError(
            f"`weights` must be {n} numbers above 0, one for each sequence, got shape {tuple(weights.shape)}: "
            "`loss.terms(theta)[1]`, without sequences that are not scored."
        )
