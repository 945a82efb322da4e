"""Spectrum, ranks and coupling of weighted Gram matrices, block by block: what a spectrum and each of its resamples take."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..core.keys import Key, fold_in, uniform

Grid = Float[Tensor, "b n n"]


class Statistics(NamedTuple):
    """Of b blocks and, last, of all of them together."""

    spectra: Float[Tensor, "c n"]
    """Eigenvalues in descending order."""
    numbers: dict[str, Tensor]
    """By name, one number for each."""
    coupling: dict[str, Tensor]
    jittered: list[int]
    """Which of them the solver refused as they are."""


class Data(NamedTuple):
    """Grams of samples, and what is known of them."""

    values: Grid
    groups: Int[Tensor, " n"]
    """Samples of one number are not independent of each other."""
    limits: Int[Tensor, " c"]
    """Parameters of every block and, last, of all of them."""
    centered: bool
    rounding: float
    jitter: float = 1e-10

    def floor(self) -> Float[Tensor, " c"]:
        """Below it an eigenvalue of the mean is rounding."""
        num = self.values.shape[-1]
        return self.rounding * torch.linalg.matrix_norm(with_total(self.values)) / num

    def statistics(self, weights: Float[Tensor, " n"], *, device: torch.device | None = None) -> Statistics:
        """Of the samples as often as their weights say."""
        there = weights > 0
        values, weights, groups = self.values[:, there][:, :, there], weights[there], self.groups[there]
        total = weights.sum()
        if self.centered:
            values, by = _centred(values, weights), total - 1
        else:
            by = total
        root = weights.sqrt()
        scaled = values * (root[:, None] * root)  # G' diag(w) G and this have the same non-zero eigenvalues
        spectra, jittered = eigenvalues(with_total(scaled).to(device or values.device) / by, self.jitter)
        spectra = spectra.to(values)
        numbers = _numbers(spectra, self.limits, self.floor())
        same = groups[:, None] == groups
        moments = _moments(values, scaled, weights, same, self.centered)
        coupling = _coupling(torch.einsum("aij,bij->ab", scaled, scaled), "") | _coupling(moments, "_debiased")
        numbers["participation_ratio_debiased"] = _free_ratio(scaled, weights, same, moments, self.centered)
        return Statistics(spectra, numbers, coupling, jittered)


def resamples(groups: Int[Tensor, " n"], key: Key, num: int) -> list[Float[Tensor, " n"]]:
    """Weights of `num` draws of as many groups as there are, with replacement, for every sample."""
    most = int(groups.max()) + 1
    like = torch.zeros(most, dtype=torch.float64)
    places = ((uniform(fold_in(key, i), like) * most).long() for i in range(num))
    return [torch.bincount(each, minlength=most).double().to(groups.device)[groups] for each in places]


def eigenvalues(matrices: Float[Tensor, "c n n"], jitter: float = 1e-10) -> tuple[Float[Tensor, "c n"], list[int]]:
    """In descending order; a matrix that the solver refuses is moved by a multiple of I, which is taken off again."""
    try:
        return torch.linalg.eigvalsh(matrices).flip(-1), []
    except torch.linalg.LinAlgError:
        if len(matrices) > 1:
            parts = [eigenvalues(each[None], jitter) for each in matrices]
            return torch.cat([part for part, _ in parts]), [i for i, (_, moved) in enumerate(parts) if moved]
        step = jitter * matrices.diagonal(dim1=1, dim2=2).mean(-1)
        moved = matrices + step[:, None, None] * torch.eye(matrices.shape[-1]).to(matrices)
        return torch.linalg.eigvalsh(moved).flip(-1) - step[:, None], [0]


def with_total(values: Grid) -> Float[Tensor, "c n n"]:
    """Blocks cover every coordinate once: their Grams add up to that of the whole."""
    return torch.cat([values, values.sum(0, keepdim=True)])


def _centred(values: Grid, weights: Float[Tensor, " n"]) -> Grid:
    """Inner products of deviations from the weighted mean."""
    means = values @ weights / weights.sum()
    return values - means[:, :, None] - means[:, None] + (means @ weights / weights.sum())[:, None, None]


def _numbers(spectra: Tensor, limits: Tensor, floor: Tensor) -> dict[str, Tensor]:
    places = torch.arange(spectra.shape[-1], device=spectra.device)
    there = (places < limits[:, None]) & (spectra > floor[:, None])
    known = torch.where(there, spectra, 0)
    rank = there.sum(-1)
    largest, nan = spectra[:, 0], torch.full_like(spectra[:, 0], torch.nan)
    second = (
        spectra[:, 1] if spectra.shape[-1] > 1 else torch.zeros_like(largest)
    )  # of one sample, the matrix has rank 1
    second = torch.where(limits > 1, second, nan)
    smallest = known.gather(-1, (rank - 1).clamp(min=0)[:, None])[:, 0]
    return {
        "trace": spectra.sum(-1),
        "largest_eigenvalue": largest,
        "second_eigenvalue": second,
        "spectral_gap": largest - second,
        "condition_number": torch.where(rank > 0, largest / smallest, nan),
        "effective_rank": _perplexity(known.sqrt()),
        "spectral_rank": _perplexity(known),
        "participation_ratio": known.sum(-1).square() / known.square().sum(-1),
        "numerical_rank": rank.to(spectra),
    }


def _perplexity(weights: Tensor) -> Tensor:
    return torch.special.entr(weights / weights.sum(-1, keepdim=True)).sum(-1).exp()


def _moments(values: Grid, scaled: Grid, weights: Tensor, same: Bool[Tensor, "n n"], centered: bool) -> Tensor:
    r"""Unbiased $\lVert F_{ab} \rVert_F^2$: over pairs of samples of different groups; centred, over four samples."""
    if centered:
        return _centred_moments(values, weights, same)
    apart = scaled.masked_fill(same, 0)
    return torch.einsum("aij,bij->ab", apart, apart) / _pairs(weights, same)


def _centred_moments(values: Grid, weights: Tensor, same: Bool[Tensor, "n n"]) -> Tensor:
    """Song et al. (2012), eq. 5; nan for fewer than four samples, for samples in groups and for copies."""
    n = len(weights)
    if n < 4 or int(same.sum()) > n or bool((weights != 1).any()):
        return values.new_full((len(values),) * 2, torch.nan)
    apart = values.masked_fill(same, 0)
    sums = apart.sum(-1)
    products = torch.einsum("aij,bij->ab", apart, apart)
    totals = sums.sum(-1)
    both = totals[:, None] * totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * sums @ sums.T
    return (products + both) / (n * (n - 3))


def _pairs(weights: Tensor, same: Bool[Tensor, "n n"]) -> Tensor:
    """How many pairs are of different groups; nan for none."""
    num = weights @ (~same).to(weights) @ weights
    return torch.where(num > 0, num, torch.nan)


def _free_ratio(scaled: Grid, weights: Tensor, same: Tensor, moments: Tensor, centered: bool) -> Tensor:
    """tr(F)^2 / tr(F^2), each without bias; nan where centred."""
    if centered:
        return scaled.new_full((len(scaled) + 1,), torch.nan)
    squares = torch.cat([moments.diagonal(), moments.sum()[None]])
    lengths = with_total(scaled).diagonal(dim1=1, dim2=2)
    trace_squared = torch.einsum("ci,ij,cj->c", lengths, (~same).to(lengths), lengths) / _pairs(weights, same)
    return torch.where(squares > 0, trace_squared / squares, torch.nan)


def _coupling(moments: Tensor, ending: str) -> dict[str, Tensor]:
    """Cosines between blocks, and the share of ||F||^2 that lies off them; nan where a square is not above 0."""
    own = torch.where(moments.diagonal() > 0, moments.diagonal(), torch.nan)
    whole = torch.where(moments.sum() > 0, moments.sum(), torch.nan)
    cosines = moments / (own[:, None] * own).sqrt()
    return {f"coupling{ending}": cosines, f"off_block_mass{ending}": 1 - moments.diagonal().sum() / whole}
