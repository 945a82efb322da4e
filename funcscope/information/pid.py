"""What two sources tell of a target: redundantly, each alone, and only together. Partial information decompositions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_number, check_positive
from ..core.keys import Key
from ..core.result import Result, internal, quantity
from ..core.tables import counted
from .broja import least_informative

ATOMS = ("unique_x", "unique_y", "redundancy", "synergy", "total", "information_x", "information_y")
ROUNDING = 1e-9
"""Nats below which a sign says nothing."""


class PID(Result):
    """A decomposition of I(X, Y; Z) into what X and Y tell of Z: `pid_min_mi`, `pid_williams_beer`, `pid_broja`, `pid`.

    Whatever the redundancy R is, the other parts follow from it and three mutual informations: that the four add up to
    the total is no check of anything (proofs/pid_min_mi.py), and there is no residual.
    """

    unique_x: float = quantity("unique information of x", unit="nats", stderr="unique_x_stderr")
    unique_y: float = quantity("unique information of y", unit="nats", stderr="unique_y_stderr")
    redundancy: float = quantity("redundancy", unit="nats", stderr="redundancy_stderr")
    synergy: float = quantity("synergy", unit="nats", stderr="synergy_stderr")
    total: float = quantity("information of both", unit="nats", stderr="total_stderr")
    information_x: float = quantity("information of x", unit="nats", stderr="information_x_stderr")
    information_y: float = quantity("information of y", unit="nats", stderr="information_y_stderr")
    method: str
    terms: str = "given"
    """Where the mutual informations are from: "distribution", "given", "none" or "miller_madow" (plug-in), "probes"."""
    gap: float | None = quantity("optimality gap", unit="nats", default=None)
    """By which the synergy may be too small and the redundancy, too, at most."""
    unique_x_stderr: float = math.nan
    unique_y_stderr: float = math.nan
    redundancy_stderr: float = math.nan
    synergy_stderr: float = math.nan
    total_stderr: float = math.nan
    information_x_stderr: float = math.nan
    information_y_stderr: float = math.nan
    num_groups: int | None = None
    num: int | None = None
    """Resamples of the groups."""
    key: Key | None = None
    remarks: tuple[str, ...] = internal(default=())

    @property
    def head(self) -> str:
        over = "" if self.num_groups is None else f" over {counted(self.num_groups, 'group')}"
        return f"partial information decomposition ({self.method}){over}"

    @property
    def notes(self) -> list[str]:
        values = [getattr(self, name) for name in ATOMS]
        if any(math.isnan(value) for value in values):
            return ["the parts are nan: a mutual information is not known (a target of one class has none to be told)."]
        made = []
        if self.num_groups is None:
            made.append("Parts of a given distribution or of given numbers have no sampling error here.")
        if self.num_groups == 1:
            made.append("One group alone gives no standard error.")
        if self.synergy < -ROUNDING:
            made.append(
                "The synergy is negative: both together tell less than one alone, so the joint estimate under-fits."
            )
        if self.redundancy < -ROUNDING:
            made.append(
                "The redundancy is below 0, where no information is: that of one source was estimated too low, and the "
                "unique part of the other is too large by as much."
            )
        if self.redundancy > min(self.information_x, self.information_y) + ROUNDING:
            made.append("The redundancy is above the smaller information: an estimate is wrong.")
        if self.gap is not None and self.gap > 1e-5:
            made.append(f"The programme was stopped {self.gap:.2g} nats from a bound at most.")
        return [*made, *self.remarks]


def pid_min_mi(i_x: float, i_y: float, i_xy: float) -> PID:
    r"""Minimum mutual information: the redundancy of two sources is the smaller of what each tells.

    $$R = \min(I_X, I_Y), \quad U_X = I_X - R, \quad U_Y = I_Y - R, \quad
      S = I_{XY} - I_X - I_Y + R = I_{XY} - \max(I_X, I_Y),$$

    in nats. One of the unique parts is always 0: this is the largest redundancy that any decomposition has, whether or not
    the two tell the same. It is exact for a scalar target and jointly normal sources; on the copy of two independent bits
    it calls a bit redundant (proofs/pid_min_mi.py). The three informations must be of the same samples, and estimated alike.

    A negative synergy, by estimates, says that the joint estimate under-fits. Raises ValueError for what is no number.

    Barrett (2015), doi:10.1103/PhysRevE.91.052802.

    >>> made = pid_min_mi(0.3, 0.5, 0.6)
    >>> [round(x, 3) for x in (made.redundancy, made.unique_x, made.unique_y, made.synergy)]
    [0.3, 0.0, 0.2, 0.1]
    """
    for name, value in (("i_x", i_x), ("i_y", i_y), ("i_xy", i_xy)):
        if not (isinstance(value, float) and math.isnan(value)):
            check_number(name, value)
    return PID(**atoms(min(i_x, i_y), i_x, i_y, i_xy), method="min_mi", terms="given")


def pid_williams_beer(p: Float[Tensor, "..."]) -> PID:
    r"""Williams and Beer's decomposition: redundancy as the expected smallest specific information.

    $$R = I_{\min} = \sum_z p(z) \min_{S \in \{X, Y\}} I(Z = z; S), \qquad
      I(Z = z; S) = \sum_s p(s \mid z) \log \frac{p(z \mid s)}{p(z)},$$

    in nats. All parts are at least 0. Redundancy compares amounts for each value of the target, not what is told: on the copy
    of two independent bits it is one bit.

    p: probabilities of (x, y, z), z the target. Raises ValueError where it is no distribution over three variables.

    Williams, Beer (2010), arXiv:1004.2515.

    >>> import torch
    >>> p = torch.zeros(2, 2, 2)
    >>> p[[0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0]] = 0.25                                     # z = x xor y
    >>> round(pid_williams_beer(p).synergy, 4)                                                 # ln 2
    0.6931
    """
    table = distribution(p)
    return PID(**williams_beer_atoms(table), method="williams_beer", terms="distribution")


def pid_broja(p: Float[Tensor, "..."], *, tolerance: float = 1e-8) -> PID:
    r"""The decomposition of Bertschinger et al. and of Griffith and Koch: what must be told by both together, at least.

    $$S = I_p(X, Y; Z) - \min_{q \in \Delta_p} I_q(X, Y; Z), \qquad
      \Delta_p = \{q : q_{XZ} = p_{XZ},\ q_{YZ} = p_{YZ}\},$$

    and $R = I_X + I_Y - \min_q I_q(X, Y; Z)$, $U_X = \min_q I_q(X; Z \mid Y)$, in nats. Redundancy and unique parts follow
    from the two pairs alone. All parts are at least 0, and on the copy of independent bits nothing is redundant.

    p: probabilities of (x, y, z), z the target; for small alphabets. tolerance: nats. `gap` bounds from above how far the
    minimum may be below the value that was reached (`least_informative`), so that R and S may be too small and the
    unique parts too large by that much.

    Raises ValueError where p is no distribution over three variables.

    Bertschinger, Rauh, Olbrich, Jost, Ay (2014), doi:10.3390/e16042161; Griffith, Koch (2014), arXiv:1205.4265.

    >>> import torch
    >>> p = torch.zeros(2, 2, 2)
    >>> p[[0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1]] = 0.25                                     # z = x and y
    >>> made = pid_broja(p)
    >>> round(made.redundancy / 0.693147, 3), round(made.synergy / 0.693147, 3)                # bits
    (0.311, 0.5)
    """
    check_positive("tolerance", tolerance)
    values, gap = broja_atoms(distribution(p), tolerance)
    return PID(**values, method="broja", terms="distribution", gap=gap)


def atoms(redundancy: float, i_x: float, i_y: float, i_xy: float) -> dict[str, Any]:
    """All parts, from one of them and three mutual informations."""
    parts = (i_x - redundancy, i_y - redundancy, redundancy, i_xy - i_x - i_y + redundancy)
    return dict(zip(ATOMS, (*parts, i_xy, i_x, i_y), strict=True))


def williams_beer_atoms(p: np.ndarray) -> dict[str, Any]:
    """All parts, the redundancy being the least of what the two say of each z, on average."""
    pz = p.sum((0, 1))

    def specific(joint: np.ndarray) -> np.ndarray:
        """Per z, times p(z)."""
        return scipy.special.rel_entr(joint, joint.sum(1, keepdims=True) * pz).sum(0)

    redundancy = float(np.minimum(specific(p.sum(1)), specific(p.sum(0))).sum())
    return atoms(redundancy, *informations(p))


def broja_atoms(p: np.ndarray, tolerance: float) -> tuple[dict[str, Any], float]:
    """All parts, the total less the synergy being the least that a distribution with these marginals has, and the gap."""
    q, gap = least_informative(p, tolerance=tolerance)
    i_x, i_y, i_xy = informations(p)
    least = mutual_information(q.reshape(-1, q.shape[2]))
    return atoms(i_x + i_y - least, i_x, i_y, i_xy), gap


def informations(p: np.ndarray) -> Sequence[float]:
    """Of x, of y and of both about z, by the table."""
    return [mutual_information(table) for table in (p.sum(1), p.sum(0), p.reshape(-1, p.shape[2]))]


def mutual_information(table: np.ndarray) -> float:
    """Of rows and columns of a table of probabilities."""
    return float(scipy.special.rel_entr(table, table.sum(1, keepdims=True) * table.sum(0)).sum())


def distribution(p: Float[Tensor, "..."]) -> np.ndarray:
    """As float64, adding up to 1; raises ValueError where p is no distribution over (x, y, z)."""
    if p.ndim != 3:
        raise ValueError(f"`p` must have three dimensions, of x, y and the target z, got the shape {tuple(p.shape)}.")
    table = p.detach().cpu().double().numpy()
    if not (np.isfinite(table).all() and (table >= 0).all() and abs(table.sum() - 1) < 1e-5):
        raise ValueError(
            f"`p` must hold probabilities that add up to 1, got a sum of {table.sum():.6g} and {table.min():.3g} at least: "
            "counts become probabilities by `counts / counts.sum()`."
        )
    return table / table.sum()
