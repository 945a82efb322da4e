"""The unit of every sampled number: a value with its standard error."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from . import tables
from .result import Result, quantity

if TYPE_CHECKING:
    from pandas import DataFrame


def wide(device: torch.device) -> torch.dtype:
    """The dtype of sums: float64, or float32 where the device has no other.

    >>> wide(torch.device("cpu"))
    torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64


class Estimate(Result):
    """A mean over `num` independent samples and the standard error of that mean.

    >>> import torch
    >>> print(Estimate.of(torch.tensor([1.0, 2.0, 3.0])))
    2 ± 0.58 (n = 3)
    """

    value: Float[Tensor, ""] = quantity("value", stderr="stderr")
    stderr: Float[Tensor, ""]
    num: int

    @classmethod
    def of(cls, samples: Float[Tensor, " n"]) -> Estimate:
        """Sample mean and sd / sqrt(n); both are nan where n is too small to define them (0, 1)."""
        num = len(samples)
        wide = samples.double()
        stderr = wide.std() / num**0.5 if num > 1 else wide.new_tensor(float("nan"))
        return cls(wide.mean(), stderr, num)

    def __str__(self) -> str:
        stderr = float(self.stderr)
        return f"{float(self.value):.4g} ± {'undefined' if math.isnan(stderr) else f'{stderr:.2g}'} (n = {self.num})"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"

    def frame(self) -> DataFrame:
        """As of every result; the value has every error of it."""
        whole = (each._replace(value=self, stderr=None) if each.name == "value" else each for each in self.entries())
        return tables.frame(whole, self.coords, self.unresolved)

    def named(self, name: str) -> dict[str, float]:
        """Plain numbers: the value by that name, and every error of it by the name with an ending."""
        return {name: float(self.value), f"{name}_stderr": float(self.stderr)}


class Crossed(Estimate):
    r"""A statistic of n draws (directions), each of them a mean over the same g data (sequences): both are samples.

    `stderr` is over draws, with the data as they are; `stderr_data` over data, with the draws as they are; `stderr_total`
    over both, and holds the bias b that few data give to statistics that are no means. With $V_D, V_S$ the squares of the
    first two and $z_{ds}$ what datum s of draw d moves the statistic by,

    $$V = V_D + V_S - V_I + b^2, \qquad V_I = \tfrac{n}{n-1} \textstyle\sum_{ds} (z_{ds} - \bar z_s)^2, \qquad
      \nu = \frac{V^2}{V_D^2 / (n-1) + V_S^2 / (g-1) + V_I^2 / ((n-1)(g-1))}:$$

    both one-way errors hold the interaction of draws and data, which counts once (V is not taken below the larger of them);
    degrees of freedom by Satterthwaite, at least the smaller of n - 1 and g - 1. For statistics that are no means, to first
    order in z. nan for a single draw or datum. Of a mean, z of m < n draws will do: their mean square over data is that of
    all plus (n - m) / n of the interaction in it, which is taken off.

    Cornfield, Tukey (1956), doi:10.1214/aoms/1177728067; Satterthwaite (1946), doi:10.2307/3002019.

    >>> import torch
    >>> rows = torch.tensor([[1.0, -1.0], [1.0, -1.0]])               # what two data add to the values 0 and 2
    >>> print(Crossed.of_rows(Estimate.of(torch.tensor([0.0, 2.0])), rows / 2))
    1 ± 1 over 2 draws, ± 2 over data, ± 2.2 in all
    """

    stderr_data: Float[Tensor, ""]
    stderr_total: Float[Tensor, ""]
    dof: float

    @classmethod
    def of_rows(cls, estimate: Estimate, rows: Float[Tensor, "n g"], bias: float = 0.0) -> Crossed:
        """rows: z, centred over data, of all draws or, of a mean, of some. bias: b. The own error is over draws."""
        (num, num_data), share = rows.shape, len(rows) / max(estimate.num, len(rows))
        rows = rows.double() / share
        if num_data < 2:
            rows = torch.full_like(rows, math.nan)
        scale = num_data / max(num_data - 1, 1)
        draws, data = estimate.stderr.double().square(), scale * rows.sum(0).square().sum()
        both = scale * num / max(num - 1, 1) * (rows - rows.mean(0)).square().sum()
        over_data = torch.maximum(data - (1 - share) * both, share * data)
        total = torch.maximum(draws + data - both, torch.maximum(draws, over_data))
        parts = draws**2 / max(estimate.num - 1, 1) + (data**2 + both**2 / max(num - 1, 1)) / max(num_data - 1, 1)
        dof = max(float(total**2 / parts) if parts else 0.0, float(min(num, num_data) - 1))
        return cls(estimate.value, estimate.stderr, estimate.num, over_data.sqrt(), (total + bias**2).sqrt(), dof)

    def __str__(self) -> str:
        draws, data, total = (f"{float(x):.2g}" for x in (self.stderr, self.stderr_data, self.stderr_total))
        return f"{float(self.value):.4g} ± {draws} over {self.num} draws, ± {data} over data, ± {total} in all"

    def named(self, name: str) -> dict[str, float]:
        errors = {f"{name}_stderr_data": float(self.stderr_data), f"{name}_stderr_total": float(self.stderr_total)}
        return super().named(name) | errors | {f"{name}_dof": self.dof}


def interval(estimate: Estimate, level: float = 0.95) -> tuple[float, float]:
    """Student's t interval of an estimate, from its total error where it has one; nan where no error is defined."""
    stderr, dof = _error(estimate)
    half = float(scipy.stats.t.ppf((1 + level) / 2, dof)) * stderr if dof > 0 else math.nan
    return float(estimate.value) - half, float(estimate.value) + half


def p_value(estimate: Estimate) -> float:
    """Two-sided, of Student's t test that the truth is 0, from the total error where there is one; 1 for 0 without error."""
    stderr, dof = _error(estimate)
    value = abs(float(estimate.value))
    if not dof > 0 or math.isnan(stderr):
        return math.nan
    if stderr == 0:
        return 1.0 if value == 0 else 0.0
    return float(2 * scipy.stats.t.sf(value / stderr, dof))


def _error(estimate: Estimate) -> tuple[float, float]:
    """The error that intervals and tests take, with its degrees of freedom."""
    if isinstance(estimate, Crossed) and estimate.stderr_total.isfinite():
        return float(estimate.stderr_total), estimate.dof
    return float(estimate.stderr), estimate.num - 1.0
