"""Whether a gradient is spread over the parameters of a block or sits in a few of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_number
from ..core.estimate import wide
from ..core.layout import By
from ..core.objective import Loss, Theta
from ..core.result import Result, derived, internal, quantity
from ..core.standard_errors import jackknife_stderr
from ..core.tables import counted
from .left_out import GroupedGradients, error_notes, forward_blocks, joined, num_entries, sampling_notes

Values = Float[Tensor, " b"]
TOP = (0.01, 0.05, 0.1, 0.25)
_AT_ONCE = 2**22


class GradientDispersion(Result):
    """How unequal the entries of the gradient are, block by block; made by `gradient_dispersion`."""

    gini: Values = quantity("Gini coefficient of the entries' sizes", per="block", stderr="gini_stderr")
    participation_ratio: Values = quantity("participation ratio", per="block", stderr="participation_stderr")
    entropy: Values = quantity("entropy over that of equal sizes", per="block", stderr="entropy_stderr")
    top_mass: Float[Tensor, "b k"] = quantity(
        "share of the largest entries in the sum of sizes", per=("block", "share"), stderr="top_mass_stderr"
    )
    size: Tensor = quantity("parameters", per="block", shown=False)
    top: tuple[float, ...]
    num_sequences: int
    num_groups: int
    num_unscored: int
    gini_stderr: Values = internal()
    participation_stderr: Values = internal()
    entropy_stderr: Values = internal()
    top_mass_stderr: Float[Tensor, "b k"] = internal()
    blocks: list[str] = internal()

    @derived("share of the largest entries of a normal vector", per="share")
    def top_mass_normal(self) -> Float[Tensor, " k"]:
        r"""$e^{-z^2 / 2}$ with $P(|x| > z)$ the share."""
        z = torch.as_tensor(scipy.stats.norm.isf([share / 2 for share in self.top]), dtype=torch.float64)
        return (-z.square() / 2).exp()

    @property
    def coords(self) -> dict[str, Sequence[object]]:
        return {"block": self.blocks, "share": list(self.top)}

    @property
    def head(self) -> str:
        return f"gradient dispersion in {counted(len(self.blocks), 'block')} over {counted(self.num_sequences, 'sequence')}"

    @property
    def notes(self) -> list[str]:
        notes = ["A normal vector has a Gini coefficient of 0.414 and a participation ratio of 0.333."]
        if none := [name for name, x in zip(self.blocks, self.gini, strict=True) if x.isnan()]:
            notes.append(f"Without a gradient, or with one that is not finite: {', '.join(none)}.")
        notes += error_notes(self.blocks, self.gini, self.gini_stderr, self.num_groups)
        return notes + sampling_notes(self.num_groups, self.num_unscored)


def gradient_dispersion(
    loss: Loss, theta: Theta, *, by: By = "layer", top: Sequence[float] = TOP, num_groups: int = 8
) -> GradientDispersion:
    r"""How unequal the n entries g of the mean gradient of a block are, beside what a normal vector has.

    With $x_{(1)} \le \dots \le x_{(n)}$ the sizes $|g_i|$ in order and $p_i = |g_i| / \sum_j |g_j|$,

    $$\mathrm{Gini} = \frac{\sum_i (2i - n - 1)\, x_{(i)}}{n \sum_i x_i}, \qquad
      \mathrm{PR} = \frac{(\sum_i g_i^2)^2}{n \sum_i g_i^4}, \qquad
      \mathrm{entropy} = \frac{-\sum_i p_i \ln p_i}{\ln n}.$$

    The Gini coefficient is 0 where all sizes are equal, $1 - 1/n$ where one entry is all, and $\sqrt 2 - 1$ for a normal
    vector; the participation ratio is 1, 1/n and 1/3; the entropy lies between 0 and 1. `top_mass` is the share of the
    largest entries, $\lceil \mathrm{share} \cdot n \rceil$ of them, in $\sum_i x_i$. Noise of the data draws all of them
    towards those of a normal vector: read them beside `gradient_noise`.

    A document adds 1e-10 to every p without dividing by the new sum and divides by the logarithm of how many are above 1e-10:
    its entropy exceeds 1.

    top: shares, above 0 and up to 1. Errors are the jackknife's over `num_groups` groups of sequences.

    Cost: a gradient of the data twice, which is six forward passes, and one more; a sort of every block for each group.
    Memory: three gradients. Blocks with no gradient, or one that is not finite, have nan.

    Raises ValueError for shares that are none, and as `gradient_flow` does.

    Gini (1912); Hurley, Rickard (2009), doi:10.1109/TIT.2009.2027527, for what each of these measures.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(2, 1, bias=False))
    >>> loss = fs.objective(net, [(torch.tensor([[3.0, 1.0]] * 2), torch.zeros(2, 1))], fs.custom(lambda out, y: out[:, 0]))
    >>> spread = gradient_dispersion(loss, torch.ones(2), by="tensor")                       # g = (3, 1)
    >>> round(float(spread.gini), 3), round(float(spread.participation_ratio), 3)
    (0.25, 0.61)
    """
    for share in top:
        check_number("top", share, least=1e-12, most=1.0)
    theta = Loss.vector(loss, theta)
    blocks = forward_blocks(loss, by)
    made = GroupedGradients(loss, theta, num_groups)
    whole = made.whole

    def columns(leaves: dict[str, Tensor]) -> Tensor:
        return torch.stack([dispersion_of(joined(leaves, names), top) for names in blocks.values()])

    values, rest = columns(whole), [columns(part.rest) for part in made.each()]
    errors = jackknife_stderr(torch.stack(rest, -1)) if rest else torch.full_like(values, math.nan)
    return GradientDispersion(
        gini=values[:, 0],
        participation_ratio=values[:, 1],
        entropy=values[:, 2],
        top_mass=values[:, 3:],
        size=num_entries(whole, blocks),
        top=tuple(top),
        num_sequences=made.num_sequences,
        num_groups=len(made.groups),
        num_unscored=made.num_unscored,
        gini_stderr=errors[:, 0],
        participation_stderr=errors[:, 1],
        entropy_stderr=errors[:, 2],
        top_mass_stderr=errors[:, 3:],
        blocks=list(blocks),
    )


def dispersion_of(values: Float[Tensor, " n"], top: Sequence[float] = ()) -> Float[Tensor, " k"]:
    """Gini coefficient, participation ratio, entropy and top masses of one vector, float64 on the CPU; nan without sizes.

    >>> dispersion_of(torch.tensor([0.0, 0.0, -2.0, 0.0]), top=(0.25,)).tolist()
    [0.75, 0.25, 0.0, 1.0]
    """
    num, sizes = len(values), values.abs().sort().values
    if not num or not bool(sizes[-1] > 0) or not bool(sizes[-1].isfinite()):
        return torch.full((3 + len(top),), math.nan, dtype=torch.float64)
    largest = sizes[-1]
    sums = torch.zeros(5, dtype=wide(values.device), device=values.device)
    for at in range(0, num, _AT_ONCE):
        x = sizes[at : at + _AT_ONCE].to(sums.dtype) / largest
        rank = torch.arange(at + 1, at + 1 + len(x), dtype=x.dtype, device=x.device)
        parts = (x, (2 * rank - num - 1) * x, x.square(), x.square().square(), torch.special.entr(x))
        sums += torch.stack([part.sum() for part in parts])
    total, ranked, square, fourth, entropy = sums.cpu().double()
    masses = [sizes[num - math.ceil(share * num - 1e-9) :].sum(dtype=sums.dtype) / largest / total for share in top]
    nats = entropy / total + total.log()  # of x / total
    made = [ranked / (num * total), square.square() / (num * fourth), nats / math.log(num) if num > 1 else math.nan]
    return torch.tensor([float(x) for x in (*made, *masses)], dtype=torch.float64)
