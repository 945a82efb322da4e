"""The unit of every sampled number: a value with its standard error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


def wide(device: torch.device) -> torch.dtype:
    """The dtype of sums: float64, or float32 where the device has no other.

    >>> wide(torch.device("cpu"))
    torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class Estimate:
    """A mean over `num` independent samples and the standard error of that mean.

    >>> import torch
    >>> print(Estimate.of(torch.tensor([1.0, 2.0, 3.0])))
    2 ± 0.58 (n = 3)
    """

    value: Float[Tensor, ""]
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
        return f"{float(self.value):.4g} ± {float(self.stderr):.2g} (n = {self.num})"


def jackknife_stderr(left_out: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    r"""Standard error of a smooth statistic from its n leave-one-out values.

    $$\mathrm{SE}^2 = \tfrac{n-1}{n} \textstyle\sum_i (s_{(i)} - \bar s)^2.$$

    For the mean this is sd / sqrt(n) exactly. Efron and Stein (1981), doi:10.1214/aos/1176345462.

    >>> import torch
    >>> x = torch.tensor([1.0, 2.0, 6.0])
    >>> left_out = (x.sum() - x) / 2
    >>> torch.allclose(jackknife_stderr(left_out), x.std() / 3**0.5)
    True
    """
    num = len(left_out)
    return ((num - 1) / num * (left_out - left_out.mean()).square().sum()).sqrt()
