"""Spectrum, ranks and coupling of Gram matrices, block by block: what a spectrum is, and what it is without some samples."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..core.keys import Key, uniform

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

    def statistics(self, there: Bool[Tensor, " n"], *, device: torch.device | None = None) -> Statistics:
        """Of these samples."""
        values, groups = self._of(there)
        spectra, numbers, jittered = self.spectrum(there, device=device)
        same = groups[:, None] == groups
        moments = _moments(values, same, self.centered)
        coupling = coupled(torch.einsum("aij,bij->ab", values, values), "") | coupled(moments, "_debiased")
        numbers = {**numbers, "participation_ratio_debiased": _free_ratio(values, same, moments, self.centered)}
        return Statistics(spectra, numbers, coupling, jittered)

    def spectrum(
        self, there: Bool[Tensor, " n"], *, device: torch.device | None = None
    ) -> tuple[Float[Tensor, "c m"], dict[str, Tensor], list[int]]:
        """Eigenvalues of these samples, the numbers that are made of them, and which the solver refused."""
        values, groups = self._of(there)
        matrices = with_total(values).to(device or values.device) / (len(groups) - self.centered)
        spectra, jittered = eigenvalues(matrices, self.jitter)
        return spectra.to(values), _numbers(spectra.to(values), self.limits, self.floor()), jittered

    def _of(self, there: Bool[Tensor, " n"]) -> tuple[Float[Tensor, "b m m"], Int[Tensor, " m"]]:
        values = self.values[:, there][:, :, there]
        return centred(values) if self.centered else values, self.groups[there]


def left_out(groups: Int[Tensor, " n"], key: Key, folds: int) -> list[Bool[Tensor, " n"]]:
    """Which samples are there without each of at most `folds` folds of groups: as large as they can be alike, drawn."""
    num = int(groups.max()) + 1
    order = uniform(key, torch.zeros(num, dtype=torch.float64)).argsort().argsort().to(groups.device)
    fold = (order if num > folds else torch.arange(num, device=groups.device)) % max(folds, 1)
    return [fold[groups] != i for i in range(min(folds, num))]


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


def with_total(values: Float[Tensor, "b n m"]) -> Float[Tensor, "c n m"]:
    """Blocks cover every coordinate once: their Grams add up to that of the whole."""
    return torch.cat([values, values.sum(0, keepdim=True)])


def centred(values: Grid) -> Grid:
    """Inner products of deviations from the mean."""
    means = values.mean(2)
    return values - means[:, :, None] - means[:, None] + means.mean(1)[:, None, None]


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


def _moments(values: Grid, same: Bool[Tensor, "n n"], centered: bool) -> Tensor:
    r"""Unbiased $\lVert F_{ab} \rVert_F^2$: over pairs of samples of different groups; centred, over four samples."""
    apart = values.masked_fill(same, 0)
    products = torch.einsum("aij,bij->ab", apart, apart)
    if not centered:
        return products / _pairs(same)
    n, sums = len(same), apart.sum(-1)
    if n < 4 or int(same.sum()) > n:  # of samples in groups there is none
        return torch.full_like(products, torch.nan)
    return of_four(products, sums @ sums.T, sums.sum(-1), n)


def of_four(products: Tensor, chains: Tensor, totals: Tensor, n: int) -> Float[Tensor, "b b"]:
    """Song et al. (2012), eq. 5, from sums over samples, without diagonals: of A_ij B_ij, of A_ij B_ik, and of A_ij."""
    return (products + totals[:, None] * totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * chains) / (n * (n - 3))


def _pairs(same: Bool[Tensor, "n n"]) -> Tensor:
    """How many pairs are of different groups; nan for none."""
    num = (~same).sum().double()
    return torch.where(num > 0, num, torch.nan)


def _free_ratio(values: Grid, same: Bool[Tensor, "n n"], moments: Tensor, centered: bool) -> Tensor:
    """tr(F)^2 / tr(F^2), each without bias; nan where centred."""
    if centered:
        return values.new_full((len(values) + 1,), torch.nan)
    squares = torch.cat([moments.diagonal(), moments.sum()[None]])
    lengths = with_total(values).diagonal(dim1=1, dim2=2)
    trace_squared = torch.einsum("ci,ij,cj->c", lengths, (~same).to(lengths), lengths) / _pairs(same)
    return torch.where(squares > 0, trace_squared / squares, torch.nan)


def coupled(moments: Tensor, ending: str) -> dict[str, Tensor]:
    """Cosines between blocks, and the share of ||F||^2 that lies off them; nan where a square is not above 0."""
    own = torch.where(moments.diagonal() > 0, moments.diagonal(), torch.nan)
    whole = torch.where(moments.sum() > 0, moments.sum(), torch.nan)
    cosines = moments / (own[:, None] * own).sqrt()
    return {f"coupling{ending}": cosines, f"off_block_mass{ending}": 1 - moments.diagonal().sum() / whole}
