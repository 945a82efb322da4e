"""Sums over sequences, of fixed size and additive, from which come ratios and shares of units with their errors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..core.estimate import wide
from ..core.forward import Inputs
from ..core.standard_errors import jackknife_stderr


def batches_of(batches: Inputs | Iterable[Inputs]) -> Iterable[Inputs]:
    """One mapping or tensor is one batch."""
    return [batches] if isinstance(batches, (Mapping, Tensor)) else batches  # type: ignore[return-value]


class Ratios(NamedTuple):
    r"""What m ratios $R = \sum_s a_s / \sum_s b_s$ over sequences s need: of token means, b counts the tokens.

    $$\mathrm{SE}^2 = \tfrac{n}{n-1} \textstyle\sum_s (a_s - R\, b_s)^2 / (\sum_s b_s)^2$$

    as in `standard_errors.ratio_stderr`, from the sums of $a^2$, $a b$ and $b^2$: in float64 an error below 1e-7 of its value
    is rounding, and taken for 0.

    >>> import torch
    >>> halves = [Ratios.of(torch.tensor([x]), torch.ones(2)) for x in ([1.0, 2.0], [6.0, 3.0])]
    >>> both = halves[0].merge(halves[1])
    >>> both.value, both.stderr                                                 # sd / sqrt(4)
    (tensor([3.], dtype=torch.float64), tensor([1.0801], dtype=torch.float64))
    """

    numerators: Float[Tensor, "*m"]
    denominators: Float[Tensor, "*m"]
    squares: Float[Tensor, "3 *m"]
    num: Int[Tensor, "*m"]
    """Sequences whose b is not 0."""

    @classmethod
    def of(cls, numerators: Float[Tensor, "*m s"], denominators: Float[Tensor, "*#m s"]) -> Ratios:
        """Of s sequences. denominators: of every ratio, or the same for all."""
        a, b = torch.broadcast_tensors(*(x.to(wide(x.device)) for x in (numerators, denominators)))
        squares = torch.stack([(a * a).sum(-1), (a * b).sum(-1), (b * b).sum(-1)])
        return cls(a.sum(-1), b.sum(-1), squares, (b != 0).sum(-1))

    def merge(self, other: Ratios) -> Ratios:
        """Of the sequences of both, which must be different ones."""
        return Ratios(*(x + y for x, y in zip(self, other, strict=True)))

    @property
    def value(self) -> Float[Tensor, "*m"]:
        """nan where every b is 0."""
        return self.numerators / self.denominators

    @property
    def stderr(self) -> Float[Tensor, "*m"]:
        """Over sequences; nan below two."""
        (aa, ab, bb), ratio = self.squares, self.value
        rest, size = aa - 2 * ratio * ab + ratio.square() * bb, aa + ratio.square() * bb
        rest = torch.where(rest > 64 * torch.finfo(rest.dtype).eps * size, rest, 0.0)
        num = self.num.to(rest)
        made = (num / (num - 1) * rest).sqrt() / self.denominators.abs()
        return torch.where(self.num > 1, made, math.nan)


class Share(NamedTuple):
    value: Float[Tensor, ""]
    stderr: Float[Tensor, ""]


class Reached(NamedTuple):
    """In how many of the sequences each unit was reached by something, and in which last: a firing, a gradient."""

    num: int
    """Sequences that were looked at."""
    hits: Int[Tensor, " d"]
    """Of the sequences, those that reached it."""
    last: Int[Tensor, " d"]
    """The number of the last of them; it is the only one where that is 1."""

    @classmethod
    def of(cls, reached: Bool[Tensor, "s d"]) -> Reached:
        """Of s sequences."""
        place = torch.arange(1, len(reached) + 1, device=reached.device)[:, None]
        last = (reached * place).amax(0) - 1 if len(reached) else reached.new_zeros(reached.shape[1], dtype=torch.long)
        return cls(len(reached), reached.sum(0), last)

    def merge(self, other: Reached) -> Reached:
        """Of the sequences of both, those of the other behind."""
        last = torch.where(other.hits > 0, other.last + self.num, self.last)
        return Reached(self.num + other.num, self.hits + other.hits, last)

    @property
    def never(self) -> Share:
        """The share of units that no sequence has reached, with its jackknife error; nan below two sequences.

        Without sequence s the units that it alone has reached are among them: as many as have one hit and s for last.
        """
        units, once = len(self.hits), self.last[self.hits == 1]
        value = (self.hits == 0).cpu().double().mean()
        if self.num < 2:
            return Share(value, torch.full_like(value, math.nan))
        alone = torch.bincount(once.cpu(), minlength=self.num).double() / units
        return Share(value, jackknife_stderr(alone))

    @property
    def once(self) -> float:
        """The share of units that a single sequence has reached: of them, one more or fewer sequence decides."""
        return float((self.hits == 1).cpu().double().mean())
