"""Mutual information between two sides of the same tokens: the result of every estimator, and that for labels."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

from ..core.checks import check_choice
from ..core.result import Result, derived, internal, quantity
from ..core.tables import counted
from .entropy import Correction, occupancy
from .groups import Grouping, Groups, check_labels, check_pairs, grouping, with_second_order

SATURATED = 0.9
"""Share of its ceiling above which an estimate says that the ceiling is near, and little else."""


class MutualInformation(Result):
    r"""Mutual information in nats, as one estimator has it: 0 for independent sides, log 2 for one shared bit.

    What a deterministic network computes from a continuous input has no finite mutual information with it: an invertible
    layer keeps all of it. Only of what is noisy, discrete or read by a probe does a number mean anything.
    """

    value: Float[Tensor, ""] = quantity("mutual information", unit="nats", stderr="stderr")
    stderr: Float[Tensor, ""]
    """Over sequences."""
    num: int
    """Rows."""
    num_groups: int
    """Sequences."""
    dims: tuple[int, int]
    """Columns of each side; labels have one."""
    estimator: str
    ceiling: Float[Tensor, ""] | None = quantity(
        "largest value that this estimator can give", unit="nats", default=None
    )
    remarks: tuple[str, ...] = internal(default=())

    @derived("whether the value is within a tenth of its ceiling")
    def saturated(self) -> bool | None:
        """None for estimators without a ceiling."""
        return None if self.ceiling is None else bool(self.value > SATURATED * self.ceiling)

    @property
    def head(self) -> str:
        return (
            f"{self.estimator} mutual information of {counted(self.num, 'row')} of "
            f"{counted(self.num_groups, 'sequence')}, {self.dims[0]} + {self.dims[1]} dimensions"
        )

    @property
    def notes(self) -> Sequence[str]:
        near = f"the value is near the ceiling of {float(self.ceiling):.3g} nats" if self.ceiling is not None else ""
        return [*self.remarks, *([f"{near}: it says no more than that there is as much."] if self.saturated else [])]


def mutual_information_discrete(
    x: Int[Tensor, " n"], y: Int[Tensor, " n"], *, groups: Groups | None = None, correction: Correction = "miller-madow"
) -> MutualInformation:
    r"""Mutual information of two labels of the same tokens, in nats.

    $$\hat I = \sum_{xy} \hat p_{xy} \log \frac{\hat p_{xy}}{\hat p_x \hat p_y} - \big(b_{xy} - b_x - b_y\big), \qquad
      b = \frac{K - 1}{2N} \text{ for independent rows},$$

    the plug-in value, which is too high, less its bias to first order: that of the three entropies, over sequences as in
    `discrete_entropy`. Of several labels for one (a pair as a side), number the pairs. The error is linearised, over
    sequences, and at least $|b_{xy} - b_x - b_y| \sqrt{2 / f}$, $f = (K_x - 1)(K_y - 1)$, what is left of it at independence.

    Believed for N of at least five times the pairs that occur: there the 95 % interval covered 92 to 96 %, at independence
    all, and the bias was at most 0.02 nats (bench/information.py). Bins of continuous values belong here in two dimensions at
    most: with many, every row has a bin of its own and the plug-in value is log N whatever the data are.

    groups: the sequence of each row. correction: "plug-in" leaves the bias in.

    Raises ValueError for labels that are not whole numbers, one per row.

    Miller (1955), Note on the bias of information estimates.

    >>> import torch
    >>> x = torch.arange(400) % 2
    >>> print(mutual_information_discrete(x, x))
    miller-madow mutual information of 400 rows of 400 sequences, 1 + 1 dimensions
    <BLANKLINE>
    -----  ---------------
    value  0.6944 ± 0.0018
    -----  ---------------
    """
    check_labels("x", x)
    check_labels("y", y)
    check_pairs(x, y)
    check_choice("correction", correction, ("miller-madow", "plug-in"))
    rows, y = grouping(groups, len(x), x.device), y.to(x.device)
    x, y = (each.unique(return_inverse=True)[1] for each in (x, y))
    of_x, of_y, of_pair = (occupancy(each, rows) for each in (x, y, x * (int(y.max()) + 1) + y))
    local = of_x.surprisal + of_y.surprisal - of_pair.surprisal
    bias = of_pair.missing - of_x.missing - of_y.missing
    value = local.mean() - (bias if correction == "miller-madow" else 0.0)
    freedom = (of_x.num_labels - 1) * (of_y.num_labels - 1)
    stderr = with_second_order(rows.mean_stderr(local), bias, freedom)
    remarks = unresolved_error(rows) + one_label(of_x.num_labels, "x") + one_label(of_y.num_labels, "y")
    if len(x) < 5 * of_pair.num_labels:
        remarks += (
            f"{counted(of_pair.num_labels, 'pair')} of labels in {counted(len(x), 'row')}: each must be seen five times.",
        )
    return MutualInformation(value, stderr, len(x), rows.num, (1, 1), correction, remarks=remarks)


def undefined(
    why: str, rows: Grouping, dims: tuple[int, int], estimator: str, like: Tensor, ceiling: Tensor | None = None
) -> MutualInformation:
    """A value that cannot be had from these rows."""
    nan = like.new_tensor(math.nan)
    return MutualInformation(nan, nan, len(rows.sequence), rows.num, dims, estimator, ceiling, (why,))


def constant(rows: Grouping, dims: tuple[int, int], estimator: str, like: Tensor) -> MutualInformation:
    """The information of a side that does not vary."""
    zero, why = like.new_zeros(()), "one side is constant, and has no information about anything."
    return MutualInformation(zero, zero, len(rows.sequence), rows.num, dims, estimator, remarks=(why,))


def unresolved_error(rows: Grouping) -> tuple[str, ...]:
    """Why there is no error, where there is none."""
    return () if rows.num > 1 else ("one sequence alone gives no standard error.",)


def one_label(num: int, name: str) -> tuple[str, ...]:
    """Where one side cannot say anything."""
    return () if num > 1 else (f"`{name}` has one label only, and no information about anything.",)
