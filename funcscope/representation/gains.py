"""How the residual stream grows from layer to layer, and how a perturbation of the embeddings grows with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.func import jvp

from ..core.checks import check_count
from ..core.estimate import wide
from ..core.forward import Inputs
from ..core.keys import Key, check_key, fold_in, normal
from ..core.layout import Params
from ..core.model import Functional
from ..core.result import Result, derived, internal, quantity
from ..core.streams import streams_of
from ..core.tables import counted
from ..core.trace import apply_with, trace
from .sequence_sums import Ratios, batches_of


class ResidualGains(Result):
    """By how much each layer changes the norm of the residual stream: means over tokens."""

    gain: Float[Tensor, " l"] = quantity("norm behind the layer by that before it", per="layer", stderr="gain_stderr")
    gain_stderr: Float[Tensor, " l"]
    log_gain: Float[Tensor, " l"] = quantity(
        "logarithm of that ratio", unit="nats", per="layer", stderr="log_gain_stderr"
    )
    log_gain_stderr: Float[Tensor, " l"]
    change: Float[Tensor, " l"] = quantity(
        "norm of what the layer adds by that before it", per="layer", stderr="change_stderr"
    )
    change_stderr: Float[Tensor, " l"]
    num_zero: int
    """Tokens whose stream is 0 at a layer: they have no ratios, and count nowhere."""
    num_tokens: int
    num_sequences: int

    @derived("geometric mean of the gains", per="layer", stderr="geometric_gain_stderr")
    def geometric_gain(self) -> Float[Tensor, " l"]:
        """exp of the mean logarithm: these multiply to that of the whole stack."""
        return self.log_gain.exp()

    @property
    def geometric_gain_stderr(self) -> Float[Tensor, " l"]:
        return self.log_gain.exp() * self.log_gain_stderr

    @property
    def coords(self) -> dict[str, range]:
        return {"layer": range(len(self.gain))}

    @property
    def head(self) -> str:
        over = f"{counted(self.num_tokens, 'token')} of {counted(self.num_sequences, 'sequence')}"
        return f"gains of the residual stream by layer, over {over}"

    @property
    def notes(self) -> list[str]:
        made = ["There is one sequence, and no error over sequences."] if self.num_sequences < 2 else []
        if not bool(self.gain.isfinite().all()):
            made.append("The stream is not finite, and what is made of it undefined: check the weights.")
        return made


class GainSums(NamedTuple):
    """Over tokens and sequences; made by `gain_sums`, and additive."""

    ratios: Ratios
    """Gain, its logarithm and the change, (3, l)."""
    num: int
    """Tokens with ratios."""
    num_zero: int

    def merge(self, other: GainSums) -> GainSums:
        """Of the sequences of both."""
        return GainSums(self.ratios.merge(other.ratios), self.num + other.num, self.num_zero + other.num_zero)


def gain_sums(streams: Float[Tensor, "l b t d"], mask: Bool[Tensor, "b t"]) -> GainSums:
    """The sums of a batch. streams: before the first layer, behind it, ..., behind the last."""
    h = streams.to(wide(streams.device))
    norms, steps = h.norm(dim=-1), (h[1:] - h[:-1]).norm(dim=-1)
    there = mask & (norms != 0).all(0)
    before = torch.where(there, norms[:-1], 1.0)
    gain = torch.where(there, norms[1:], 1.0) / before
    each = torch.stack([gain, gain.log(), torch.where(there, steps, 0.0) / before])
    sums = Ratios.of(torch.where(there, each, 0.0).sum(-1), there.sum(-1).to(h))
    return GainSums(sums, int(there.sum()), int((mask & ~there).sum()))


@torch.no_grad()
def residual_gains(net: Functional, params: Params, batches: Inputs | Iterable[Inputs]) -> ResidualGains:
    r"""How the residual stream's norm changes from layer to layer, as means over tokens with errors over sequences.

    $$g_l = \overline{\|h_{l+1}\| / \|h_l\|}, \qquad \overline{\log (\|h_{l+1}\| / \|h_l\|)}, \qquad
      \overline{\|h_{l+1} - h_l\| / \|h_l\|},$$

    with $h_l$ the stream before layer l and $h_L$ that behind the last. The first two are gains, near 1 where a layer adds
    little; the last is what it adds, near 0 there, and no gain: a change of 0.2 is no shrinking of the stream. The means of
    logarithms add up over layers to that of the whole stack. No order or chaos follows from a norm: for that see how
    perturbations grow (`perturbation_gains`).

    batches: inputs, of one batch or of each. Streamed: one forward pass a batch.

    Raises ValueError for models that are not described, and without a token.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> residual_gains(net, net.params, [torch.tensor([[1, 2, 3], [4, 5, 6]])]).gain.shape
    torch.Size([2])
    """
    names, sums = streams_of(net), None
    for inputs in batches_of(batches):
        seen = trace(net, params, inputs, names)
        part = gain_sums(torch.stack([seen[name] for name in names]), seen.mask)
        sums = part if sums is None else sums.merge(part)
    if sums is None:
        raise ValueError("`batches` hold no token: there is nothing to be known of them.")
    return gains_of(sums)


def gains_of(sums: GainSums) -> ResidualGains:
    """The result of the sums of a corpus. Raises ValueError where no token has a stream with a norm."""
    if not sums.num:
        raise ValueError("there is no token whose stream has a norm: nothing can be said of its gains.")
    (gain, log_gain, change), errors = sums.ratios.value.cpu(), sums.ratios.stderr.cpu()
    return ResidualGains(
        gain=gain, gain_stderr=errors[0], log_gain=log_gain, log_gain_stderr=errors[1], change=change,
        change_stderr=errors[2], num_zero=sums.num_zero, num_tokens=sums.num, num_sequences=int(sums.ratios.num.max()),
    )  # fmt: skip


class PerturbationGains(Result):
    """By how much a random perturbation of the embeddings has grown at each layer: entry l is before layer l."""

    gain: Float[Tensor, " l"] = quantity("root mean square gain", per="stream", stderr="gain_stderr")
    gain_stderr: Float[Tensor, " l"]
    """Over sequences, each of which has directions of its own: these are in it."""
    relative_gain: Float[Tensor, " l"] = quantity(
        "gain by that of the stream itself", per="stream", stderr="relative_gain_stderr"
    )
    relative_gain_stderr: Float[Tensor, " l"]
    num: int
    num_sequences: int
    key: Key
    num_products: int = internal()

    @property
    def coords(self) -> dict[str, range]:
        return {"stream": range(len(self.gain))}

    @property
    def head(self) -> str:
        over = f"{counted(self.num, 'direction')} for each of {counted(self.num_sequences, 'sequence')}"
        return f"gains of perturbations of the embeddings, {over}"

    @property
    def notes(self) -> list[str]:
        made = ["There is one sequence, and no error over sequences."] if self.num_sequences < 2 else []
        if not bool(self.gain.isfinite().all()):
            made.append("Derivatives are not finite, and what is made of them undefined: check the weights.")
        return made


@torch.no_grad()
def perturbation_gains(
    net: Functional, params: Params, batches: Inputs | Iterable[Inputs], *, key: Key, num: int = 4
) -> PerturbationGains:
    r"""How much a small random perturbation of the first residual stream has grown at every layer behind it.

    $$G_l^2 = \frac{\mathbb E \|J_l v\|^2}{\mathbb E \|v\|^2} = \overline{\|J_l\|_F^2} / (T D), \qquad
      J_l = \partial h_l / \partial h_0,$$

    for v uniform on the sphere of a sequence's T tokens together, drawn anew for every sequence and direction, so that it
    enters at all positions at once and is read at all: exact derivatives by jvp, not differences. The mean is over directions
    (`num` of them) and sequences, which weigh by their tokens. `relative_gain` divides the squares of a sequence by the
    growth of its stream, $\sum_t \|h_l\|^2 / \sum_t \|h_0\|^2$: above 1, what is small grows faster than the whole. Entry 0
    is the perturbation itself: 1. Each direction is taken as long as it is in the dtype of the stream.

    The error is over sequences: as each has directions of its own, it holds what these add. In a causal model the result for
    a sequence does not depend on its padding, which is not perturbed. batches: inputs, of one batch or of each.

    Raises ValueError for models that are not described, and without a token.

    Poole et al. (2016), arXiv:1606.05340 (perturbations through layers).

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> perturbation_gains(net, net.params, [torch.tensor([[1, 2, 3], [4, 5, 6]])], key=fs.key(0)).gain.shape
    torch.Size([3])
    """
    check_key(key)
    check_count("num", num)
    names, start, sums = streams_of(net), 0, None
    for inputs in batches_of(batches):
        seen = trace(net, params, inputs, names)
        h, mask = torch.stack([seen[name] for name in names]), seen.mask[..., None]
        draws = (_direction(fold_in(key, i), start, h[0], mask) for i in range(num))
        grown = torch.stack([_norms(_pushed(net, params, inputs, names, each), mask) for each in draws])
        own, count = _norms(h, mask), seen.mask.sum(1) * h.shape[-1]
        squares = torch.where(count > 0, grown / grown[:, :1], 0.0).mean(0) * count
        part = Ratios.of(torch.cat([squares, squares * _growth(own)]), count.to(own))
        sums, start = part if sums is None else sums.merge(part), start + len(seen.mask)
    if sums is None or not int(sums.num.max()):
        raise ValueError("`batches` hold no token: there is nothing to be perturbed.")
    value, error = sums.value.cpu().sqrt(), sums.stderr.cpu()
    error = torch.where(value == 0, 0.0, error / (2 * value))
    (gain, relative), (gain_stderr, relative_stderr) = value.chunk(2), error.chunk(2)
    return PerturbationGains(
        gain=gain, gain_stderr=gain_stderr, relative_gain=relative, relative_gain_stderr=relative_stderr, num=num,
        num_sequences=int(sums.num.max()), key=key, num_products=num * start,
    )  # fmt: skip


def _growth(own: Float[Tensor, "l b"]) -> Float[Tensor, "l b"]:
    """By which a sequence's squares are divided: those of its stream, by that of the first."""
    return torch.where(own == 0, 0.0, own[0] / own)


def _direction(
    key: Key, start: int, like: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t 1"]
) -> Float[Tensor, "b t d"]:
    """Of a mean square of 1 over the tokens of a sequence, the k-th of which has the same whatever the padding."""
    made = torch.zeros_like(like)
    rows = []
    for row, there in enumerate(mask[..., 0]):
        drawn = normal(fold_in(key, start + row), like[row, : int(there.sum())])
        rows.append(made[row].index_put((there,), drawn / drawn.square().mean().sqrt()))
    return torch.stack(rows)


def _pushed(
    net: Functional, params: Params, inputs: Inputs, names: Sequence[str], direction: Float[Tensor, "b t d"]
) -> Float[Tensor, "l b t d"]:
    """The derivatives of the streams along a perturbation of the first."""

    def streams(shift: Tensor) -> Tensor:
        _, seen = apply_with(net, params, inputs, {names[0]: lambda x: x + shift}, names)
        return torch.stack([seen[name] for name in names])

    return jvp(streams, (torch.zeros_like(direction),), (direction,))[1]


def _norms(x: Float[Tensor, "l b t d"], mask: Bool[Tensor, "b t 1"]) -> Float[Tensor, "l b"]:
    """Squares of sequences, over their tokens."""
    return torch.where(mask, x.to(wide(x.device)), 0.0).square().sum((-2, -1))
