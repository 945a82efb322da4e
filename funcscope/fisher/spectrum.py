"""The spectrum of the second moment of per-sample gradients, from their Gram matrix: n x n numbers for P x P."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.checks import check_choice, check_count, check_flag, check_positive
from ..core.estimate import Estimate
from ..core.keys import Key, check_key
from ..core.objective import Loss, Theta
from ..core.standard_errors import jackknife_stderr
from ..curvature.gram import Blocks, Grams, Unit, gram
from ..curvature.gram_errors import FreeErrors, free_errors, trace_stderr
from ..curvature.gram_statistics import Data, Statistics, left_out
from ..curvature.scored_sequences import first, scored_sequences, sequences, sizes
from .spectrum_result import GramSpectrum

Device = Literal["auto", "cpu", "cuda"]


def fisher_spectrum(
    loss: Loss,
    theta: Theta,
    *,
    key: Key,
    by: Blocks = "layer",
    unit: Unit = "sequence",
    centered: bool = False,
    n_samples: int | None = None,
    top_k: int = 10,
    folds: int = 50,
    chunk_size: int = 64,
    jitter: float = 1e-10,
    eigensolve_device: Device = "auto",
) -> GramSpectrum:
    r"""Eigenvalues, ranks and coupling of the empirical Fisher matrix of every block, exact for these samples.

    $$\hat F_b = \frac1n \sum_i g_{i,b}\, g_{i,b}^\top, \qquad g_i = \textstyle\sum_{t \in i} w_t \nabla \ell_t,$$

    at the labels of the data: the matrix of `empirical_fisher`, and no Fisher information. In squared nats per squared unit
    of theta; per sequence about T times as large as per token, and more where the tokens of a sequence agree. centered: the
    covariance of the gradients, $\frac{1}{n-1} \sum_i (g_i - \bar g)(g_i - \bar g)^\top$.

    by: blocks, as for `gram`; views by name may leave parameters out, which are then in no number.
    n_samples: the first so many sequences; all of them where None is given or there are fewer.
    chunk_size: rows that go through the model at once. Other arguments: see `gram_spectrum`. Models are evaluated in
    eval mode (`functional`), batch norm with its stored statistics.

    Raises ValueError as `gram` and `gram_spectrum` do: for a gradient that is not finite, with its sample and parameter, and
    for a covariance of one sample.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(2, 1, bias=False))
    >>> half_square = fs.custom(lambda out, y: (out - y)[:, 0] ** 2 / 2)
    >>> loss = fs.objective(net, [(torch.eye(2), torch.zeros(2, 1))], half_square)
    >>> fisher_spectrum(loss, torch.tensor([3.0, 4.0]), key=fs.key(0), folds=0).global_eigenvalues   # (3, 0), (0, 4)
    tensor([8.0000, 4.5000], dtype=torch.float64)
    """
    check_key(key)
    loss = loss if n_samples is None else first(loss, n_samples)
    loss, num_unscored = scored_sequences(loss, theta) if unit == "sequence" else (loss, 0)
    grams = gram(loss, theta, by=by, unit=unit, chunk_size=chunk_size)
    result = gram_spectrum(
        grams, key=key, centered=centered, top_k=top_k, folds=folds, jitter=jitter,
        groups=sequences(loss) if unit == "token" else None, num_parameters=sizes(loss.layout, by),
        rounding=8 * loss.net.unit_roundoff, eigensolve_device=eigensolve_device,
    )  # fmt: skip
    return replace(result, num_unscored=num_unscored)


def gram_spectrum(
    grams: Grams | Float[Tensor, "n m"],
    *,
    key: Key,
    centered: bool = False,
    top_k: int = 10,
    folds: int = 50,
    groups: Int[Tensor, " g"] | None = None,
    num_parameters: Sequence[int] | None = None,
    rounding: float = 0.0,
    jitter: float = 1e-10,
    eigensolve_device: Device = "auto",
) -> GramSpectrum:
    r"""The spectrum of $\frac1n G^\top G$ from $K = G G^\top$, which have the same non-zero eigenvalues: $\lambda(K) / n$.

    Nothing is added to K. Where the solver refuses a matrix, I times `jitter` mean eigenvalues is added and taken off the
    eigenvalues again, which the result says. centered: K is centred on both sides and divided by n - 1.
    The whole spectrum comes from the sum of the blocks' Grams. Proofs of these and of the two forms of the coupling:
    proofs/gram_spectrum.py.

    top_k: eigenvalues that are in the result; the other numbers are of all of them. At most n are not 0.
    folds: errors of eigenvalues and ranks are jackknifed: samples are left out in turn, one by one where there are no more
    than `folds`, else in so many folds of equal size; each an eigenvalue problem per block. 0 for none of these errors; those
    of traces and of numbers without bias have a closed form (gram_errors.py).
    groups: numbers from 0 on, of samples that are not independent of each other (the tokens of a sequence): they are left out
    together, and no pair of one group is in a debiased number. By themselves, samples are independent.
    num_parameters: of every block, for the bound of the rank. rounding: relative error of the entries of K, at least that of
    their dtype: eigenvalues below n times it are taken for 0 in ranks and condition numbers.
    eigensolve_device: `auto` takes the CPU up to 512 samples, where it is faster in float64 than most others.

    Raises ValueError for a matrix that is not square, symmetric, finite or positive semidefinite, for a covariance of one
    sample, and for a device that is not there.

    Goodfellow (2015), arXiv:1510.01799; Papyan (2019), arXiv:1901.08244, on spectra by blocks; Song, Smola, Gretton, Bedo,
    Borgwardt (2012), Feature selection via dependence maximization, for the debiased square of a covariance.

    >>> import funcscope as fs
    >>> spectrum = gram_spectrum(torch.diag(torch.tensor([9.0, 16.0])).double(), key=fs.key(0))
    >>> spectrum.global_eigenvalues.tolist(), float(spectrum.global_trace.value)
    ([8.0, 4.5], 12.5)
    """
    check_key(key)
    check_flag("centered", centered)
    check_count("top_k", top_k)
    check_count("folds", folds, 0)
    check_positive("jitter", jitter)
    grams = grams if isinstance(grams, Grams) else _alone(grams)
    values = grams.values
    _check_gram(values, centered)
    num, blocks = values.shape[-1], list(grams.blocks)
    limits = _limits(num_parameters, len(blocks), values)
    own = torch.arange(num, device=values.device)
    groups = own if groups is None else groups.to(values.device).unique(return_inverse=True)[1]
    if len(groups) != num:
        raise ValueError(f"`groups` must have a number for each of the {num} samples, got {len(groups)}.")
    exact = max(num * torch.finfo(values.dtype).eps, rounding)
    data = Data(values, groups, limits, centered, exact, jitter)
    device = _device(eigensolve_device, values)
    whole = data.statistics(own >= 0, device=device)
    _check_semidefinite(whole, data, blocks)
    without = left_out(groups, key, folds) if int(groups.max()) > centered else []
    rest = [data.spectrum(each, device=device)[1] for each in without]
    free = free_errors(data)
    return _result(grams, data, _resolved(whole, free), rest, free, key=key, top_k=top_k, num_parameters=num_parameters)


def _alone(gram: Tensor) -> Grams:
    if gram.ndim != 2 or not gram.is_floating_point():
        raise ValueError(f"a Gram matrix has two dimensions and real entries, got {tuple(gram.shape)} of {gram.dtype}.")
    return Grams(gram.double()[None], "sample", 0, [], ["all"])


def _check_gram(values: Tensor, centered: bool) -> None:
    _, num, other = values.shape
    if num != other or not num:
        raise ValueError(f"the Gram matrix of samples with themselves is square and has a sample, got {num} x {other}.")
    if not bool(values.isfinite().all()):
        bad = (~values.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"the Gram matrix is not finite at samples {bad[1]} and {bad[2]}: leave these samples out.")
    off = (values - values.mT).abs().amax()
    if float(off) > 1e-5 * float(values.abs().amax()):
        raise ValueError(f"the Gram matrix is not symmetric, by {float(off):.2g}: is it one of two data sets?")
    if centered and num < 2:
        raise ValueError("a covariance needs two samples at least, got 1: take more, or `centered=False`.")


def _check_semidefinite(whole: Statistics, data: Data, blocks: list[str]) -> None:
    """A matrix of inner products has no negative eigenvalue."""
    below = whole.spectra[:, -1] < -10 * len(data.groups) * data.floor().clamp(min=1e-300)
    if bool(below.any()):
        at = int(below.nonzero()[0])
        raise ValueError(
            f"the Gram matrix of {[*blocks, 'all'][at]!r} has the eigenvalue {float(whole.spectra[at, -1]):.2g}: it is none "
            "of inner products."
        )


def _limits(num_parameters: Sequence[int] | None, num_blocks: int, values: Tensor) -> Tensor:
    if num_parameters is None:
        return torch.full((num_blocks + 1,), values.shape[-1] + 1, device=values.device)
    if len(num_parameters) != num_blocks:
        raise ValueError(f"`num_parameters` must have {num_blocks} entries, one per block, got {len(num_parameters)}.")
    return torch.tensor([*num_parameters, sum(num_parameters)], device=values.device)


def _device(choice: str, values: Tensor) -> torch.device:
    check_choice("eigensolve_device", choice, ("auto", "cpu", "cuda"))
    if choice == "cuda" and not torch.cuda.is_available():
        raise ValueError("`eigensolve_device` is 'cuda', and there is none: take 'auto' or 'cpu'.")
    if choice == "auto":
        return torch.device("cpu") if values.shape[-1] <= 512 else values.device
    return torch.device(choice)


def _resolved(whole: Statistics, free: FreeErrors) -> Statistics:
    """nan for every number without bias whose denominator is not told from 0."""
    known = torch.where(free.resolved, 1.0, torch.nan).to(whole.spectra)
    name, numbers, coupling = "participation_ratio_debiased", whole.numbers, whole.coupling
    return whole._replace(
        numbers={**numbers, name: numbers[name] * known},
        coupling={
            **coupling,
            "coupling_debiased": coupling["coupling_debiased"] * known[:-1, None] * known[:-1],
            "off_block_mass_debiased": coupling["off_block_mass_debiased"] * known[-1],
        },
    )


def _result(
    grams: Grams,
    data: Data,
    whole: Statistics,
    rest: list[dict[str, Tensor]],
    free: FreeErrors,
    *,
    key: Key,
    top_k: int,
    num_parameters: Sequence[int] | None,
) -> GramSpectrum:
    num, num_groups = data.values.shape[-1], int(data.groups.max()) + 1
    spectra = whole.spectra[:, :top_k].clone()
    spectra[torch.arange(spectra.shape[1], device=spectra.device) >= data.limits[:, None]] = torch.nan
    blocks, coupling = list(grams.blocks), whole.coupling
    mass = coupling["off_block_mass_debiased"]
    return GramSpectrum(
        eigenvalues=spectra[:-1],
        global_eigenvalues=spectra[-1],
        coupling=coupling["coupling"],
        coupling_debiased=coupling["coupling_debiased"],
        coupling_debiased_stderr=_beside(free.coupling, coupling["coupling_debiased"]),
        off_block_mass=float(coupling["off_block_mass"]),
        off_block_mass_debiased=Estimate(mass, _beside(free.off_block_mass, mass), num_groups),
        num_samples=num,
        num_groups=num_groups,
        num_unscored=0,
        unit=grams.unit,
        centered=data.centered,
        folds=len(rest),
        key=key,
        **_numbers(data, whole, rest, free),
        num_parameters=[0] * len(blocks) if num_parameters is None else [*num_parameters],
        squares_resolved=free.resolved,
        jittered=[[*blocks, "all"][i] for i in whole.jittered],
        by_rows=list(grams.by_rows),
        blocks=blocks,
    )


def _beside(stderr: Tensor, value: Tensor) -> Tensor:
    """nan where the value is."""
    return torch.where(value.isnan(), torch.nan, stderr)


def _numbers(
    data: Data, whole: Statistics, rest: list[dict[str, Tensor]], free: FreeErrors
) -> dict[str, dict[str, Tensor]]:
    """Those of every block, the bias of the largest eigenvalue, how many there can be that are not 0, and all errors."""
    largest, free_ratio = (whole.numbers[name] for name in ("largest_eigenvalue", "participation_ratio_debiased"))
    bound = data.limits.clamp(max=data.values.shape[-1] - data.centered).to(whole.spectra)
    bias = torch.full_like(largest, torch.nan)
    errors = dict.fromkeys(whole.numbers, bias)
    if len(rest) > 1:
        values = {name: torch.stack([each[name] for each in rest], -1) for name in rest[0]}
        errors = {name: jackknife_stderr(each) for name, each in values.items()}
        bias = (len(rest) - 1) * (values["largest_eigenvalue"].mean(-1) - largest)
    exact = {
        "trace": trace_stderr(data),
        "participation_ratio_debiased": _beside(free.participation_ratio, free_ratio),
    }
    return {
        "numbers": {**whole.numbers, "largest_eigenvalue_bias": bias, "rank_bound": bound},
        "errors": errors | exact,
    }
