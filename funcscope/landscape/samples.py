"""What `directional_losses` returns: the samples, the settings, and the statistics computed from them."""

from __future__ import annotations

import html
import math
import textwrap
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from jaxtyping import Float
from tabulate import tabulate
from torch import Tensor

from ..core.estimate import Estimate
from ..core.keys import Key
from . import statistics
from .notes import half_precision, low_correlation, undecided_signs
from .precision import Realised

HEADERS = ("", "value", "stderr")


class Plan(NamedTuple):
    """How the samples were evaluated. The same plan on the same machine gives the same bits."""

    lazy: bool
    chunk: int
    threads: int


@dataclass(frozen=True, eq=False, repr=False)
class DirectionalLosses:
    r"""Losses along random directions; made by `directional_losses`, whose docstring has the formulas.

    Samples are float64 tensors of shape (n,) on the CPU, one entry per direction, non-finite ones included. Statistics
    are over the finite ones: an `Estimate` each, nan where too few samples define it. sd is the sample value (n - 1).
    Direction norms are those by construction: 1, or that of the parameters that move.
    `asdict()` gives the documented dictionary.
    """

    baseline_loss: float
    losses: Float[Tensor, " n"]
    losses_negative: Float[Tensor, " n"] | None
    slopes: Float[Tensor, " n"] | None
    exact_curvatures: Float[Tensor, " n"] | None
    direction_norms: Float[Tensor, " n"]
    param_norm: float
    span: float
    actual_span: float
    normalize: str
    distribution: str
    relative_span: bool
    global_renorm: bool
    compute_curvature: bool
    unit_roundoff: float
    homogeneous_dtype: bool
    realised: Realised | None
    """What rounding to half precision makes of the step, measured on the first direction; None in full precision."""
    key: Key
    plan: Plan
    num_forwards: int
    num_gradients: int
    num_jvps: int
    num_second_jvps: int

    @property
    def n_samples(self) -> int:
        """The number of valid samples: finite losses at +span."""
        return int(self.losses.isfinite().sum())

    @property
    def n_nonfinite_pos(self) -> int:
        return len(self.losses) - self.n_samples

    @property
    def n_nonfinite_neg(self) -> int:
        return 0 if self.losses_negative is None else int((~self.losses_negative.isfinite()).sum())

    @property
    def deltas(self) -> Float[Tensor, " n"]:
        """Loss change at +span."""
        return self.losses - self.baseline_loss

    @property
    def curvatures(self) -> Float[Tensor, " n"] | None:
        """Second derivative along each direction per unit of the coefficient: exact, or the two-sided difference."""
        if not self.compute_curvature:
            return None
        if self.exact_curvatures is not None:
            return self.exact_curvatures
        assert self.losses_negative is not None
        return central_second_difference(self.losses, self.losses_negative, self.baseline_loss, self.actual_span)

    @property
    def rayleigh_quotients(self) -> Float[Tensor, " n"] | None:
        """Curvature per unit of distance, c / ||d||^2: comparable between modes, spans and models."""
        return None if self.curvatures is None else self.curvatures / self.direction_norms.square()

    @property
    def curvature_noise_floor(self) -> float:
        r"""How much rounding alone can move a curvature, an order of magnitude; 0 for exact ones in full precision.

        In full precision `rounding_bound`. In half precision it is measured: $\sqrt6\,\epsilon / h^2$ for an error
        $\epsilon$ of each loss (`realised.loss_error`), and rms(s) a / h for two steps that are not quite opposite, which
        let the slope s in (a is `realised.asymmetry`, s the two-sided slopes). nan for exact curvatures in half
        precision: rounding inside the model moves them too, by an amount that is not measured.
        """
        if self.exact_curvatures is not None:
            return 0.0 if self.realised is None else math.nan
        if self.realised is not None and self.losses_negative is not None and math.isfinite(self.realised.loss_error):
            h = self.actual_span
            slopes = _finite(self.losses - self.losses_negative) / (2 * h)
            steps = float(slopes.square().mean().sqrt()) * self.realised.asymmetry / h
            return math.sqrt(6) * self.realised.loss_error / h**2 + steps
        sides = [self.losses] if self.losses_negative is None else [self.losses, self.losses_negative]
        level = max(abs(self.baseline_loss), *(abs(x) for side in sides for x in _finite(side).tolist()), 0.0)
        return rounding_bound(level, self.actual_span, self.unit_roundoff)

    @property
    def n_curvatures_undecided(self) -> int:
        """Directions whose curvature has a sign that rounding may have decided: |c| below the noise floor."""
        return (
            0 if self.curvatures is None else int((_finite(self.curvatures).abs() < self.curvature_noise_floor).sum())
        )

    @property
    def precision_note(self) -> str | None:
        """That rounding may decide signs of curvatures here, and what to do; None where it does not."""
        if not (few := self.n_curvatures_undecided) or self.curvatures is None:
            return None
        half = self.realised is not None
        return undecided_signs(few, len(self.curvatures), self.curvature_noise_floor, half=half)

    @property
    def displacement(self) -> float:
        """Distance travelled in parameter space, span x ||d||."""
        return self.actual_span * float(self.direction_norms.mean())

    @property
    def relative_step(self) -> float:
        """Displacement over ||theta||; the document's span / ||theta|| where ||d|| = 1."""
        return self.displacement / self.param_norm if self.param_norm else math.nan

    @property
    def n_samples_for_corr(self) -> int:
        """Directions where both the slope and the loss are finite."""
        return 0 if self.slopes is None else int((self.slopes.isfinite() & self.losses.isfinite()).sum())

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """Every sampled statistic by its documented name, with its standard error over directions."""
        losses = _finite(self.losses)
        found = {
            "loss_mean": statistics.mean(losses),
            "loss_std": statistics.spread(losses),
            "delta_mean": statistics.mean(losses - self.baseline_loss),
            "delta_std": statistics.spread(losses - self.baseline_loss),
            "landscape_roughness": statistics.variation(losses),
        }
        if self.slopes is not None:
            both = self.slopes.isfinite() & self.losses.isfinite()
            found["dir_grad_mean"] = statistics.mean(_finite(self.slopes))
            found["dir_grad_std"] = statistics.spread(_finite(self.slopes))
            found["dir_grad_delta_corr"] = statistics.correlation(self.slopes[both], self.deltas[both])
        if (curvatures := self.curvatures) is not None and self.rayleigh_quotients is not None:
            finite = _finite(curvatures)
            found["curvature_mean"] = statistics.mean(finite)
            found["curvature_std"] = statistics.spread(finite)
            found |= {f"curvature_p{p}": statistics.quantile(finite, p / 100) for p in (10, 50, 90)}
            found["rayleigh_mean"] = statistics.mean(_finite(self.rayleigh_quotients))
        if self.losses_negative is not None:
            found["loss_mean_negative"] = statistics.mean(_finite(self.losses_negative))
            found["loss_std_negative"] = statistics.spread(_finite(self.losses_negative))
        return found

    @property
    def note(self) -> str | None:
        """Why slopes do not predict the loss changes here, from the numbers; None where they do, or were not asked for."""
        if self.slopes is None:
            return None
        corr = float(self.estimates["dir_grad_delta_corr"].value)
        return low_correlation(corr, self.deltas, self.slopes, self.actual_span)

    def asdict(self) -> dict[str, Any]:
        """The documented dictionary, then standard errors (`..._stderr`), settings, costs and per-direction arrays.

        Plain numbers, strings and numpy arrays; keys of what was not asked for are absent, as documented.
        """
        finite = _finite(self.losses)
        values: dict[str, Any] = {"baseline_loss": self.baseline_loss}
        values["loss_max"] = float(finite.max()) if len(finite) else math.nan
        values["loss_min"] = float(finite.min()) if len(finite) else math.nan
        values |= {name: float(estimate.value) for name, estimate in self.estimates.items()}
        values |= {f"{name}_stderr": float(estimate.stderr) for name, estimate in self.estimates.items()}
        if self.slopes is not None:
            values["n_samples_for_corr"] = self.n_samples_for_corr
        if self.compute_curvature:
            values["curvature_noise_floor"] = self.curvature_noise_floor
            values["n_curvatures_undecided"] = self.n_curvatures_undecided
            values["precision_note"] = self.precision_note
        if self.realised is not None:
            values |= {f"realised_{name}": value for name, value in self.realised._asdict().items()}
        return values | self._settings() | self._arrays()

    def _settings(self) -> dict[str, Any]:
        return {
            "n_samples": self.n_samples,
            "n_nonfinite_pos": self.n_nonfinite_pos,
            "n_nonfinite_neg": self.n_nonfinite_neg,
            "actual_span": self.actual_span,
            "displacement": self.displacement,
            "param_norm": self.param_norm,
            "relative_step": self.relative_step,
            "use_filter_norm": self.normalize == "filter",
            "global_renorm": self.global_renorm or self.normalize == "global",
            "normalize": self.normalize,
            "distribution": self.distribution,
            "relative_span": self.relative_span,
            "seed": self.key.seed,
            "key": f"{self.key.bits:032x}",
            "homogeneous_dtype": self.homogeneous_dtype,
            "fast_vec_path": not self.plan.lazy,
            "chunk": self.plan.chunk,
            "threads": self.plan.threads,
            "num_forwards": self.num_forwards,
            "num_gradients": self.num_gradients,
            "num_jvps": self.num_jvps,
            "num_second_jvps": self.num_second_jvps,
            "note": self.note,
        }

    def _arrays(self) -> dict[str, Any]:
        arrays = {
            "losses": self.losses,
            "losses_negative": self.losses_negative,
            "slopes": self.slopes,
            "curvatures": self.curvatures,
            "rayleigh_quotients": self.rayleigh_quotients,
            "direction_norms": self.direction_norms,
        }
        return {name: array.numpy() for name, array in arrays.items() if array is not None}

    def __str__(self) -> str:
        table = tabulate(self._rows(), headers=HEADERS, disable_numparse=True)
        return "\n".join([self._head(), table, *(textwrap.fill(text, 100) for text in self._tail())])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The same table, for notebooks."""
        table = tabulate(self._rows(), headers=HEADERS, tablefmt="html", disable_numparse=True)
        paragraphs = [f"<p>{html.escape(text)}</p>" for text in (self._head(), *self._tail())]
        return "\n".join([paragraphs[0], str(table), *paragraphs[1:]])

    def _head(self) -> str:
        return (
            f"{len(self.losses)} {self.normalize}-normalised {self.distribution} directions at span {self.actual_span:g} "
            f"(relative step {self.relative_step:.3g}), {self.key!r}"
        )

    def _rows(self) -> list[tuple[str, str, str]]:
        rows = [("baseline_loss", f"{self.baseline_loss:.6g}", "")]
        return rows + [(name, f"{float(e.value):.5g}", f"{float(e.stderr):.2g}") for name, e in self.estimates.items()]

    def _tail(self) -> list[str]:
        """What the table does not say: lost samples, what half precision does, and notes."""
        tail = []
        if self.n_nonfinite_pos + self.n_nonfinite_neg:
            tail += [f"non-finite losses: {self.n_nonfinite_pos} at +span, {self.n_nonfinite_neg} at -span"]
        if self.realised is not None:
            tail += [half_precision(self.displacement, self.realised)]
        return tail + [note for note in (self.note, self.precision_note) if note]


def central_second_difference(
    positive: Float[Tensor, " n"], negative: Float[Tensor, " n"], centre: float, step: float
) -> Float[Tensor, " n"]:
    r"""$(L^+ + L^- - 2 L_0) / h^2$, the second derivative up to $h^2 L^{(4)} / 12$; float64.

    Truncation, rounding and the best step: proofs/central_difference.py.

    >>> import torch
    >>> central_second_difference(torch.tensor([4.0]), torch.tensor([0.0]), 1.0, 1.0)       # (1 + a)^2
    tensor([2.], dtype=torch.float64)
    """
    return (positive.double() + negative.double() - 2 * centre) / step**2


def rounding_bound(level: float, step: float, unit_roundoff: float) -> float:
    r"""The most that relative errors of `unit_roundoff` in three losses of size `level` do to the second difference.

    $4 u |L| / h^2$. A float32 network rounds at every layer, so that its losses may be off by a few u more; averaging
    over tokens works the other way. Take it as the order of magnitude. proofs/central_difference.py.

    >>> rounding_bound(2.0, 0.5, 2.0**-24) == 8 * 2.0**-24 / 0.25
    True
    """
    return 4 * unit_roundoff * abs(level) / step**2


def _finite(x: Tensor) -> Tensor:
    return x[x.isfinite()]
