"""How much two masks have in common, beside what chance gives them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import scipy
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..core.checks import check_instance, check_mask
from ..core.layout import Layout
from ..core.result import Result, derived, internal, quantity
from .gram import Blocks, block_views
from .pruning_masks import places_of

Counts = Float[Tensor, " b"]


class MaskOverlap(Result):
    """Parameters that two masks keep, by block, and what random masks of the same densities would have in common."""

    sizes: Counts = quantity("parameters", per="block")
    num_first: Counts = quantity("kept by the first", per="block", shown=False)
    num_second: Counts = quantity("kept by the second", per="block", shown=False)
    num_both: Counts = quantity("kept by both", per="block")
    blocks: list[str] = internal()

    @derived("Jaccard index", per="block")
    def jaccard(self) -> Counts:
        return self.num_both / (self.num_first + self.num_second - self.num_both)

    @derived("Jaccard index by chance", per="block")
    def chance_jaccard(self) -> Counts:
        return self._expected / (self.num_first + self.num_second - self._expected)

    @derived("Dice index", per="block", shown=False)
    def dice(self) -> Counts:
        return 2 * self.num_both / (self.num_first + self.num_second)

    @derived("overlap above chance", per="block")
    def kappa(self) -> Counts:
        """0 by chance, 1 where one mask holds the other; nan where chance gives that already."""
        room = torch.minimum(self.num_first, self.num_second) - self._expected
        return torch.where(room > 0, (self.num_both - self._expected) / room, math.nan)

    @derived("z of the overlap", per="block")
    def z(self) -> Counts:
        return torch.where(self._variance > 0, (self.num_both - self._expected) / self._variance.sqrt(), math.nan)

    @derived("p of as large an overlap", per="block", shown=False)
    def p_value(self) -> Counts:
        """Exact, hypergeometric, one-sided."""
        both, size, first, second = (
            x.cpu().numpy() for x in (self.num_both, self.sizes, self.num_first, self.num_second)
        )
        return torch.as_tensor(scipy.stats.hypergeom.sf(both - 1, size, first, second))

    @derived("Jaccard index of all blocks")
    def total_jaccard(self) -> float:
        both = float(self.num_both.sum())
        return _ratio(both, float((self.num_first + self.num_second).sum()) - both)

    @derived("Jaccard index of all blocks by chance")
    def total_chance_jaccard(self) -> float:
        both = float(self._expected.sum())
        return _ratio(both, float((self.num_first + self.num_second).sum()) - both)

    @derived("overlap of all blocks above chance")
    def total_kappa(self) -> float:
        expected = self._expected.sum()
        room = float(torch.minimum(self.num_first, self.num_second).sum() - expected)
        return _ratio(float(self.num_both.sum() - expected), room)

    @derived("z of the overlap of all blocks")
    def total_z(self) -> float:
        return _ratio(float((self.num_both - self._expected).sum()), float(self._variance.sum().sqrt()))

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"block": self.blocks}

    @property
    def head(self) -> str:
        return f"two masks of {int(self.sizes.sum()):,} parameters in {len(self.blocks)} blocks"

    @property
    def _expected(self) -> Tensor:
        return self.num_first * self.num_second / self.sizes

    @property
    def _variance(self) -> Tensor:
        """Of the hypergeometric distribution."""
        rest = (self.sizes - self.num_first) * (self.sizes - self.num_second)
        return self._expected * rest / (self.sizes * (self.sizes - 1).clamp(min=1))


def mask_overlap(
    first: Bool[Tensor, " p"], second: Bool[Tensor, " p"], layout: Layout, *, by: Blocks = "tensor"
) -> MaskOverlap:
    r"""What two masks share, and what two random ones with as many parameters in every block would.

    With densities a, b of a block of n and o = |A & B| / n,

    $$J = \frac{|A \cap B|}{|A \cup B|}, \qquad J_0 = \frac{ab}{a + b - ab}, \qquad
      \kappa = \frac{o - ab}{\min(a, b) - ab}, \qquad z = \frac{n (o - ab)}{\sqrt{n\,ab (1 - a)(1 - b)\, n / (n - 1)}}.$$

    $J_0$ is a ratio of expectations. $\kappa$ is 0 by chance and 1 for masks one of which holds the other; it and z are nan
    where a mask is empty or full. Totals are over blocks, with chance inside each: that two masks keep much of the same
    blocks is not counted as overlap. `by="none"` counts that, too. Scores of neighbours go together, so
    that z of real masks is larger than it would be for parameters that are exchangeable within blocks.

    A document divides by n, so that identical masks of density .1 overlap by .1, and its thresholds of .4 and .7 call
    everything safe to merge.

    Raises ValueError for masks of another length, and for numbers in the place of True and False.

    >>> layout = Layout.of(torch.nn.Linear(4, 1, bias=False))
    >>> mask = torch.tensor([True, True, False, False])
    >>> overlap = mask_overlap(mask, mask, layout)
    >>> float(overlap.jaccard), round(float(overlap.chance_jaccard), 4), float(overlap.kappa)
    (1.0, 0.3333, 1.0)
    """
    check_instance("layout", layout, Layout, "`net.layout`")
    check_mask("first", first, layout.num)
    check_mask("second", second, layout.num)
    return overlaps([(first, second)], layout, by)[0]


def overlaps(pairs: Sequence[tuple[Tensor, Tensor]], layout: Layout, by: Blocks) -> list[MaskOverlap]:
    """Of pairs of masks, in the same blocks."""
    views = block_views(layout, by)
    rows = []
    for each in views.values():
        places = places_of(layout, each)
        inside = [(first[places], second[places]) for first, second in pairs]
        rows.append([[len(places), int(a.sum()), int(b.sum()), int((a & b).sum())] for a, b in inside])
    counts = torch.tensor(rows, dtype=torch.float64).permute(1, 2, 0)
    return [MaskOverlap(*each.contiguous(), blocks=list(views)) for each in counts]


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else math.nan
