"""The stages of a curvature study: each makes arrays and settings, and can be kept and taken up again by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..core.keys import Key, fold_in
from ..core.objective import Loss
from ..core.vectors import norm
from ..curvature.ascent_sharpness import SamSharpness, asam_sharpness, sam_sharpness
from ..curvature.average_sharpness import average_sharpness
from ..curvature.critical import critical_sharpness
from ..curvature.data_error import eigenvalue_errors
from ..curvature.leafwise import gradient_at
from ..curvature.summary import MATRICES, Matrix, hessian_block_eigenvalues, hessian_block_traces
from ..linalg.eigen import Eigenpairs, eigenpairs
from ..linalg.matvec import Matvec
from ..linalg.quadrature import spectral_density
from ..linalg.trace import hutchinson_trace, xtrace
from .opening import DataSpec
from .spectrum import Part, of_density, of_ends, of_trace, trace_of

AVERAGE_PAIRS = 20
AVERAGE_STEP = 0.05
"""Length of the random steps of average-case sharpness, as a share of the norm of the weights."""


@dataclass(frozen=True)
class Settings(DataSpec):
    """One study: the texts that are scored, how the model computes, and what is asked of its curvature."""

    num_samples: int = 16
    matrix: Matrix = "hessian"
    num: int = 5
    tol: float = 1e-3
    probes: int = 8
    steps: int = 40
    trace_products: int = 64
    blocks: bool = True
    by: Literal["layer", "module", "tensor"] = "layer"
    block_products: int = 32
    epsilon: float = 0.01
    keep: bool = True
    memory: float = 8.0
    """GiB that the vectors of one algorithm may take, beside the model and its graph."""


@dataclass(eq=False)
class Work:
    """What the stages share."""

    settings: Settings
    loss: Loss
    theta: Float[Tensor, " p"]
    key: Key
    tick: Callable[[], object]
    """Called after every product."""

    @cached_property
    def matvec(self) -> Matvec:
        """The matrix, its graph made at first use: a call that finds every stage on disk makes none."""
        return self.watched(MATRICES[self.settings.matrix](self.loss, self.theta, keep=self.settings.keep))

    def release(self) -> None:
        """Give the graph back."""
        self.__dict__.pop("matvec", None)

    def watched(self, matvec: Matvec) -> Matvec:
        def product(v: Tensor) -> Tensor:
            out = matvec(v)
            self.tick()
            return out

        return product

    @property
    def vectors(self) -> int:
        """How many vectors of the length of theta `memory` holds."""
        return int(self.settings.memory * 2**30 / (self.theta.element_size() * len(self.theta)))

    @property
    def groups(self) -> dict[str, list[str]]:
        """The parameters of every block."""
        found: dict[str, list[str]] = {}
        for name, block in self.loss.layout.group_of(self.settings.by).items():
            found.setdefault(block, []).append(name)
        return found


Stage = Callable[[Work, Mapping[str, Part]], Part]


def check_vectors(work: Work) -> None:
    """The fewest vectors that the eigenvalues need, two more than there are, are in `memory`."""
    num, least = work.settings.num, min(2 * work.settings.num + 2, len(work.theta))
    if work.vectors < least:
        raise ValueError(
            f"`memory` = {work.settings.memory:g} GiB holds {work.vectors} vectors of {len(work.theta):,} numbers, and "
            f"`num` = {num} eigenvalues from each end need {least}: ask for fewer, or allow more."
        )


def ends(work: Work, _: Mapping[str, Part]) -> Part:
    """Eigenvalues from both ends."""
    s = work.settings
    basis = max(100, 2 * (2 * s.num + 1))
    found = eigenpairs(
        work.matvec, work.theta, key=fold_in(work.key, "ends"), num=s.num, which="both", tol=s.tol,
        max_basis=None if basis <= work.vectors else work.vectors, vectors=basis + 2 * s.num <= work.vectors,
    )  # fmt: skip
    arrays, told = of_ends(found)
    return arrays | _over_sequences(work, found, told), told


def _over_sequences(work: Work, found: Eigenpairs, told: dict[str, Any]) -> dict[str, np.ndarray]:
    """What other texts would change in the eigenvalues; why that is not known, where it is not."""
    if found.vectors is None:
        told["no_data_errors"] = "the eigenvectors that they need are not in `memory`"
        return {}
    try:
        errors = eigenvalue_errors(work.loss, work.theta, found, matrix=work.settings.matrix)
    except ValueError as err:
        told["no_data_errors"] = str(err)
        return {}
    named = {
        "stderr": errors.stderr,
        "bias": errors.bias,
        "low": errors.intervals()[:, 0],
        "high": errors.intervals()[:, 1],
    }
    return {f"end_data_{name}": x.numpy() for name, x in named.items()}


def trace(work: Work, _: Mapping[str, Part]) -> Part:
    """XTrace where its vectors are in `memory`, Hutchinson's estimate, which keeps none, otherwise."""
    method = xtrace if work.settings.trace_products // 2 <= work.vectors else hutchinson_trace
    return of_trace(method(work.matvec, work.theta, key=fold_in(work.key, "trace"), num=work.settings.trace_products))


def density(work: Work, _: Mapping[str, Part]) -> Part:
    """The quadrature; without orthogonalisation where its vectors are not in `memory`."""
    s = work.settings
    found = spectral_density(
        work.matvec, work.theta, key=fold_in(work.key, "density"), num_probes=s.probes, steps=s.steps,
        reorthogonalize=s.steps <= work.vectors,
    )  # fmt: skip
    return of_density(found)


def block_traces(work: Work, _: Mapping[str, Part]) -> Part:
    """The traces of all blocks from one sweep, and that of the whole from the same products."""
    s = work.settings
    found = hessian_block_traces(
        work.loss, work.theta, key=fold_in(work.key, "block traces"), by=s.by, num=s.block_products, matvec=work.matvec
    )
    shapes = {leaf.name: leaf.numel for leaf in work.loss.layout.leaves}
    sizes = [sum(shapes[name] for name in names) for names in work.groups.values()]
    rows = torch.stack([found.samples[block] for block in work.groups])
    arrays = {"block_trace_samples": rows.numpy(), "hutchinson_samples": found.total.samples.numpy()}
    return arrays | {"block_sizes": np.array(sizes)}, {"names": list(work.groups), "num_matvecs": s.block_products}


def block_eigenvalues(work: Work, _: Mapping[str, Part]) -> Part:
    """The largest eigenvalue of every diagonal block."""
    s = work.settings
    work.release()
    blocks = hessian_block_eigenvalues(
        work.loss, work.theta, key=fold_in(work.key, "block eigenvalues"), by=s.by, which="largest", matrix=s.matrix,
        keep=s.keep, watch=work.watched, tol=s.tol, max_basis=None if work.vectors >= 100 else max(3, work.vectors),
    ).values()  # fmt: skip
    arrays = {
        f"block_{plural}": np.array([getattr(one, name)[0] for one in blocks])
        for plural, name in (("eigenvalues", "values"), ("residuals", "residuals"), ("converged", "converged"))
    }
    return arrays, {"num_matvecs": sum(one.num_matvecs for one in blocks)}


def sharpness(work: Work, parts: Mapping[str, Part]) -> Part:
    """Four measures of sharpness, each with its numbers or with the reason why it has none."""
    loss, theta, s = work.loss, work.theta, work.settings
    at = loss.wide_leaves(theta)
    gradient = norm(gradient_at(loss, at)[0])
    length = AVERAGE_STEP * norm(at)
    of_hessian = trace_of(*parts["trace"]) if s.matrix == "hessian" else None
    told = {
        "gradient_norm": gradient,
        "sam": _told(lambda: _sam(sam_sharpness(loss, theta, epsilon=s.epsilon))),
        "asam": _told(lambda: _sam(asam_sharpness(loss, theta))),
        "average": _told(lambda: _average(work, length, None if of_hessian is None else float(of_hessian.value))),
        "critical": _told(lambda: _critical(loss, theta)),
    }
    return {}, told


STAGES: dict[str, Stage] = {
    "ends": ends,
    "trace": trace,
    "density": density,
    "block_traces": block_traces,
    "block_eigenvalues": block_eigenvalues,
    "sharpness": sharpness,
}


def expected(settings: Settings, num_blocks: int) -> dict[str, int]:
    """Products by stage; for the eigenvalues what they often take, until it is known."""
    found = {
        "ends": 40 + 6 * settings.num,
        "trace": settings.trace_products,
        "density": settings.probes * settings.steps,
        "block_traces": settings.block_products,
        "block_eigenvalues": 12 * num_blocks,
        "sharpness": 0,
    }
    return found if settings.blocks else {k: v for k, v in found.items() if not k.startswith("block")}


def _told(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A measure that is undefined here says why, and leaves the others alone."""
    try:
        return measure()
    except ValueError as err:
        return {"undefined": str(err)}


def _sam(found: SamSharpness) -> dict[str, Any]:
    names = (
        "epsilon", "displacement", "absolute", "stderr", "relative", "relative_stderr", "first_order", "second_order",
        "remainder", "curvature", "rounding",
    )  # fmt: skip
    low, high = found.relative_interval
    share = {"relative_low": low, "relative_high": high, "relative_note": found.relative_note}
    return {name: getattr(found, name) for name in names} | {"num": len(found.sums)} | share


def _average(work: Work, length: float, of_hessian: float | None) -> dict[str, Any]:
    found = average_sharpness(
        work.loss, work.theta, key=fold_in(work.key, "average"), num=AVERAGE_PAIRS, epsilon=length, trace=of_hessian
    )
    told = {"epsilon": length, "num": AVERAGE_PAIRS, "num_nonfinite": found.num_nonfinite, "rounding": found.rounding}
    told |= {"absolute": float(found.estimate.value), "stderr": float(found.estimate.stderr)}
    told |= {"stderr_sequences": float(found.errors.stderr_data), "stderr_joint": float(found.errors.stderr_total)}
    return told | {"second_order": None if found.predicted is None else float(found.predicted.value)}


def _critical(loss: Loss, theta: Tensor) -> dict[str, Any]:
    found = critical_sharpness(loss, theta)
    names = ("value", "stderr", "status", "learning_rate", "slope", "rounding", "num_forwards")
    low, high = found.interval
    small, large = found.learning_rate_interval
    ends = {"low": low, "high": high, "learning_rate_low": small, "learning_rate_high": large}
    return {name: getattr(found, name) for name in names} | ends
