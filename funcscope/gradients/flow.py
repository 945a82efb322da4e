"""How long the gradient is from the first block of a model to its last, and where it is interrupted."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..core.checks import check_positive
from ..core.estimate import Estimate
from ..core.layout import By
from ..core.objective import Loss, Theta
from ..core.result import Result, internal, quantity
from ..core.standard_errors import jackknife_stderr
from ..core.statistics import left_out
from ..core.tables import counted
from .left_out import (
    GroupedGradients,
    block_norms,
    error_notes,
    forward_blocks,
    num_entries,
    num_nonfinite,
    sampling_notes,
)

Values = Float[Tensor, " b"]
_TRANSFORMER_BLOCK = re.compile(r"(?:^|\.)(?:h|layers?|blocks?)\.\d+$")


class GradientFlow(Result):
    """Lengths of the gradient block by block, in the order of the forward pass; made by `gradient_flow`."""

    norm: Values = quantity("length of the gradient", per="block", stderr="norm_stderr")
    rms: Values = quantity("root mean square of the gradient", per="block", stderr="rms_stderr")
    size: Int[Tensor, " b"] = quantity("parameters", per="block", shown=False)
    mean_rms: Values = quantity(
        "mean root mean square over groups", per="block", name="mean_gradient_norm", stderr="mean_rms_stderr"
    )
    variance_rms: Values = quantity(
        "variance of the root mean square over groups", per="block", name="gradient_variance", stderr="variance_stderr"
    )
    log_ratio: Values = quantity("log10 of the ratio to the next block", per="block", stderr="log_ratio_stderr")
    interrupted: Bool[Tensor, " b"] = quantity("interrupted", per="block", name="flow_interruptions")
    num_nonfinite: Int[Tensor, " b"] = quantity("entries that are not finite", per="block", shown=False)
    slope: Estimate = quantity("slope of the logarithm of the root mean square", unit="1/block")
    limit: float
    num_sequences: int
    num_groups: int
    num_unscored: int
    norm_stderr: Values = internal()
    rms_stderr: Values = internal()
    mean_rms_stderr: Values = internal()
    variance_stderr: Values = internal()
    log_ratio_stderr: Values = internal()
    blocks: list[str] = internal()
    nonfinite: list[str] = internal()

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"block": self.blocks}

    @property
    def head(self) -> str:
        return (
            f"gradient flow through {counted(len(self.blocks), 'block')}, errors over "
            f"{counted(self.num_groups, 'group')} of {counted(self.num_sequences, 'sequence')}"
        )

    @property
    def notes(self) -> list[str]:
        notes = []
        if self.nonfinite:
            notes.append(
                f"The gradient is not finite in {', '.join(self.nonfinite)}: look at the weights or the batch."
            )
        if zero := [name for name, x in zip(self.blocks, self.rms, strict=True) if x == 0]:
            notes.append(f"There is no gradient in {', '.join(zero)}.")
        if self.slope.value.isnan():
            notes.append("There is no slope: it needs two transformer blocks with a finite gradient that is not 0.")
        notes += error_notes(self.blocks, self.log_ratio, self.log_ratio_stderr, self.num_groups)
        return notes + sampling_notes(self.num_groups, self.num_unscored)


def gradient_flow(
    loss: Loss, theta: Theta, *, by: By = "layer", limit: float = 2.0, num_groups: int = 8
) -> GradientFlow:
    r"""Lengths of the gradient of the mean loss by block, in the order in which a forward pass uses the blocks.

    With $g_b$ the gradient of block b and $d_b$ the number of its parameters,

    $$\mathrm{rms}_b = \frac{\lVert g_b \rVert}{\sqrt{d_b}}, \qquad
      \mathrm{ratio}_b = \log_{10} \frac{\mathrm{rms}_b}{\mathrm{rms}_{b+1}}, \qquad
      \mathrm{slope} = \frac{\sum_l (l - \bar l) \ln \mathrm{rms}_l}{\sum_l (l - \bar l)^2}.$$

    The slope is over the transformer blocks l = 0, 1, ... only (over all blocks of a model that has none); below 0 gradients
    are larger near the input. A block is interrupted where its gradient is 0 or not finite, or |ratio| above `limit`; the
    last block, and one beside a gradient that is not finite, has no ratio. Gradients that are not finite are counted and
    named here, not refused.

    norm, rms, ratio and slope are of the gradient of all data. Their errors are the jackknife's over `num_groups` groups of
    sequences, each of which holds every so-many-th one; a length also has a part by noise, which `gradient_noise` takes off.
    `mean_gradient_norm` and `gradient_variance` are, as documented, over these groups as micro-batches: the mean and the
    variance (ddof 1) of the rms of each group's own gradient. They depend on the size of a group, as the noise in it does.

    by: `layer`, `module`, `tensor`, or a callable on names; a tied parameter is where it is first used.

    Cost: a gradient of the data twice, which is six forward passes, one more to see the order, and one to see what is scored
    where the criterion does not say it. Memory: three gradients.

    Raises ValueError for `by="filter"`, a `limit` that is not above 0, fewer than two groups, and data without a scored
    position.

    Glorot, Bengio (2010), Understanding the difficulty of training deep feedforward neural networks, AISTATS, section 4.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)))
    >>> data = torch.ones(2, 1), torch.tensor([[0.0], [1.0]])
    >>> loss = fs.objective(net, [data], fs.custom(lambda out, y: (out - y)[:, 0]))
    >>> flow = gradient_flow(loss, torch.tensor([1.0, 10.0]))
    >>> flow.norm.tolist(), flow.log_ratio.tolist(), flow.interrupted.tolist()                      # of x w_0 w_1
    ([10.0, 1.0], [1.0, nan], [False, False])
    """
    check_positive("limit", limit)
    theta = Loss.vector(loss, theta)
    blocks = forward_blocks(loss, by)
    made = GroupedGradients(loss, theta, num_groups)
    whole, sizes = made.whole, num_entries(made.leaves, blocks)
    depth = [i for i, name in enumerate(blocks) if _TRANSFORMER_BLOCK.search(name)] or [*range(len(blocks))]

    def rms(norms: Tensor) -> Tensor:
        return norms / sizes.sqrt()

    norms = block_norms(whole, blocks)
    parts = [(block_norms(own, blocks), block_norms(rest, blocks)) for own, rest in made.each()]
    own, rest = (torch.stack(each, 1) for each in zip(*parts, strict=True)) if parts else (norms[:, None],) * 2

    def error(statistic: Callable[[Tensor], Tensor]) -> Tensor:
        """Of a statistic of norms, from groups left out; nan without groups."""
        values = torch.stack([statistic(each) for each in rest.T], -1)
        return jackknife_stderr(values) if parts else torch.full_like(values[..., 0], math.nan)

    own = own / sizes.sqrt()[:, None]
    ratio, num = _log_ratios(rms(norms)), own.shape[1]
    variances = torch.stack([left_out(each)[1] for each in own]) if num > 2 else torch.full_like(own, math.nan)
    slope = Estimate(_slope(rms(norms)[depth]), error(lambda x: _slope(rms(x)[depth])), num)
    return GradientFlow(
        norms, rms(norms), sizes, own.mean(1), own.var(1) if parts else torch.full_like(norms, math.nan), ratio,
        ~rms(norms).isfinite() | (norms == 0) | (ratio.abs() > limit), num_nonfinite(whole, blocks), slope, limit,
        made.num_sequences, len(made.groups), made.num_unscored,
        error(lambda x: x), error(rms), own.std(1) / num**0.5 if parts else torch.full_like(norms, math.nan),
        jackknife_stderr(variances), error(lambda x: _log_ratios(rms(x))),
        list(blocks), [name for name, x in whole.items() if not bool(x.isfinite().all())],
    )  # fmt: skip


def _log_ratios(rms: Values) -> Values:
    """nan for the last, and beside what is not finite."""
    known = torch.where(rms.isfinite(), rms, math.nan)
    return torch.cat([(known[:-1] / known[1:]).log10(), rms.new_full((1,), math.nan)])


def _slope(rms: Values) -> Float[Tensor, ""]:
    """nan for fewer than two, and where a logarithm is not finite."""
    logs, places = rms.log(), torch.arange(len(rms), dtype=rms.dtype)
    places = places - places.mean()
    value = (places * logs).sum() / places.square().sum()
    return torch.where(value.isfinite(), value, math.nan)
