"""The spectra of weight matrices: power laws in their tails, their ranks, and whether they differ from random ones."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_count, check_finite_params, check_positive
from ..core.keys import Key, check_key, fold_in
from ..core.layout import Params
from ..core.result import Result, internal, quantity
from ..core.statistics import q_values
from ..core.tables import counted
from ..linalg.ranks import matrix_ranks
from .marchenko_pastur import Null, distance, null_of
from .power_law import LikelihoodRatio, PowerLaw, bootstrap_alpha, fit_power_law, log_normal_ratio

LEVEL = 0.05
"""q values above this do not tell a matrix from a random one."""
PerMatrix = Float[Tensor, " w"]
NO_FIT = PowerLaw(math.nan, math.nan, math.nan, math.nan, 0)


class LayerSpectra(Result):
    """Power-law fits, ranks and distances from random matrices of the eigenvalues of W'W, a matrix each."""

    alpha: PerMatrix = quantity("exponent of the tail", per="matrix", stderr="alpha_stderr")
    """nan where the matrix is not told from a random one, and where there are too few eigenvalues."""
    alpha_stderr: PerMatrix
    """Of the exponent where xmin is known; `alpha_low` to `alpha_high` has its choice in it."""
    alpha_low: PerMatrix = quantity("lower end of the 95 % interval of the exponent", per="matrix", shown=False)
    alpha_high: PerMatrix = quantity("upper end of the 95 % interval of the exponent", per="matrix", shown=False)
    xmin: PerMatrix = quantity("where the tail begins", per="matrix")
    num_tail: PerMatrix = quantity("eigenvalues in the tail", per="matrix")
    ks: PerMatrix = quantity("distance of the tail from a power law", per="matrix")
    log_normal_ratio: PerMatrix = quantity("log-likelihood of a power law over a log-normal", unit="nats", per="matrix")
    log_normal_z: PerMatrix = quantity("z of the likelihood ratio", per="matrix")
    log_normal_p: PerMatrix = quantity("p value of the likelihood ratio", per="matrix")
    random_distance: PerMatrix = quantity("distance from a random matrix's spectrum", per="matrix")
    random_p: PerMatrix = quantity("p value of a random matrix", per="matrix")
    random_q: PerMatrix = quantity("q value of a random matrix", per="matrix")
    num_spikes: PerMatrix = quantity("eigenvalues above those of random matrices", per="matrix")
    stable_rank: PerMatrix = quantity("stable rank", per="matrix")
    effective_rank: PerMatrix = quantity("effective rank", per="matrix")
    spectral_rank: PerMatrix = quantity("spectral rank", per="matrix")
    participation_ratio: PerMatrix = quantity("participation ratio", per="matrix")
    spectral_norm: PerMatrix = quantity("spectral norm", per="matrix")
    num_eigenvalues: PerMatrix = quantity("eigenvalues above rounding", per="matrix")
    num_cut: PerMatrix = quantity("eigenvalues above xmax", per="matrix", shown=False)
    matrices: list[str] = internal()
    num_bootstrap: int
    num_null: int
    key: Key

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"matrix": self.matrices}

    @property
    def head(self) -> str:
        return f"spectra of {counted(len(self.matrices), 'weight matrix', 'weight matrices')}"

    @property
    def notes(self) -> list[str]:
        random = self.random_q > LEVEL
        named = [name for name, each in zip(self.matrices, random, strict=True) if each]
        few = [n for n, a, r in zip(self.matrices, self.alpha, random, strict=True) if math.isnan(a) and not r]
        made = []
        if named:
            made.append(
                f"not told from a random matrix of the same shape and variance: {', '.join(named)}. An exponent of the tail "
                "means nothing there, and none is given."
            )
        if few:
            made.append(f"too few eigenvalues for a tail: {', '.join(few)}.")
        return made


class _Spectrum(NamedTuple):
    """Of one matrix: eigenvalues above rounding, all of them, and its shape with rows >= columns."""

    positive: np.ndarray
    every: np.ndarray
    rows: int
    columns: int


def layer_spectra(
    params: Params,
    *,
    key: Key,
    xmax: float | None = None,
    least: int = 10,
    num_bootstrap: int = 100,
    num_null: int = 99,
) -> LayerSpectra:
    r"""Whether the eigenvalues of W'W of each weight matrix have a heavy tail, and with which exponent.

    Of every parameter of two dimensions or more, kernels of convolutions as (filters, the rest), with x the squares of its
    singular values (the same for both orientations): the exponent $\alpha$ of a power law $x^{-\alpha}$ from `xmin` on
    (`fit_power_law`), its error where xmin is known, its 95 % bootstrap interval that chooses xmin each time, and the
    likelihood ratio over a log-normal tail (`log_normal_ratio`). Eigenvalues of one matrix repel one another and are no
    independent draws: error, interval and p value are those of the field, and hold for independent ones. Of 300 draws from a
    Pareto law with exponent 3 the interval held it in 94 of 100 repetitions.

    A matrix of independent entries has no tail to have an exponent. `random_distance` is the Kolmogorov-Smirnov distance
    of the spectrum, over its mean, from Marchenko and Pastur's law for the shape; its p value is the share of `num_null`
    Gaussian matrices of the shape at least as far away (itself counted in), `random_q` that over all matrices by
    Benjamini and Hochberg. Above 0.05 exponent and tail are nan. `num_spikes` counts eigenvalues above the 95 % point of
    the largest one of Gaussian matrices.

    xmax: eigenvalues above are left out of the tail, which is fitted as if they had never been there (so that the exponent
    comes out larger); they stay in the ranks. least: eigenvalues of a tail. Ranks as `matrix_ranks`; the stable rank is
    $\|W\|_F^2 / \sigma_1^2$. nan for a matrix of zeros.

    Raises ValueError where no parameter has two dimensions, and for weights that are not finite.

    Martin, Mahoney (2021), arXiv:1810.01075; Clauset, Shalizi, Newman (2009), arXiv:0706.1062.

    >>> import torch, funcscope as fs
    >>> w = fs.normal(fs.key(0), torch.zeros(60, 40))
    >>> found = layer_spectra({"w": w}, key=fs.key(1), num_bootstrap=10)
    >>> found.alpha, bool(found.random_q > 0.05)                          # random: no exponent
    (tensor([nan], dtype=torch.float64), True)
    """
    check_key(key)
    check_count("least", least, 2)
    check_count("num_bootstrap", num_bootstrap, 2)
    check_count("num_null", num_null, 19)
    if xmax is not None:
        check_positive("xmax", xmax)
    matrices = {name: value.detach() for name, value in params.items() if value.ndim >= 2 and value.numel()}
    if not matrices:
        raise ValueError("`params` has no weight matrix: none of its parameters has two dimensions.")
    check_finite_params(matrices, "its spectrum is")
    spectra = {name: _spectrum(value.flatten(1)) for name, value in matrices.items()}
    nulls: dict[tuple[int, int], Null] = {}
    for each in spectra.values():
        shape = (each.rows, each.columns)
        if shape not in nulls:
            nulls[shape] = null_of(*shape, key=fold_in(key, f"{each.rows} x {each.columns}"), num=num_null)
    against = [_against(each, nulls[each.rows, each.columns]) for each in spectra.values()]
    q = q_values([each["random_p"] for each in against])
    rows = []
    for (name, each), far, own_q in zip(spectra.items(), against, q, strict=True):
        at = None if own_q > LEVEL else fold_in(key, name)
        rows.append(
            _fitted(each, xmax, least, at, num_bootstrap) | far | {"random_q": own_q} | _sizes(matrices[name], each)
        )
    columns = {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}
    return LayerSpectra(**columns, matrices=[*spectra], num_bootstrap=num_bootstrap, num_null=num_null, key=key)


def _spectrum(matrix: Tensor) -> _Spectrum:
    sigma = torch.linalg.svdvals(matrix.cpu().double()).numpy()
    rows, columns = max(matrix.shape), min(matrix.shape)
    floor = rows * torch.finfo(matrix.dtype).eps * sigma[0]
    return _Spectrum(np.square(sigma[sigma > floor]), np.square(sigma), rows, columns)


def _against(spectrum: _Spectrum, null: Null) -> dict[str, float]:
    """Beside random matrices of the shape."""
    if not spectrum.every.any():
        return dict.fromkeys(("random_distance", "random_p", "num_spikes"), math.nan)
    far = distance(spectrum.every, spectrum.columns / spectrum.rows)
    p = (1 + int((null.distances >= far).sum())) / (1 + len(null.distances))
    spikes = int((spectrum.every / spectrum.every.mean() > np.quantile(null.largest, 0.95)).sum())
    return {"random_distance": far, "random_p": p, "num_spikes": spikes}


def _fitted(spectrum: _Spectrum, xmax: float | None, least: int, key: Key | None, num: int) -> dict[str, float]:
    """The tail; nan without a key."""
    x = spectrum.positive if xmax is None else spectrum.positive[spectrum.positive <= xmax]
    fit, ends, ratio = NO_FIT, (math.nan, math.nan), LikelihoodRatio(math.nan, math.nan, math.nan)
    if key is not None:
        fit = fit_power_law(x, least=least)
        ratio = log_normal_ratio(x, fit)
        ends = bootstrap_alpha(x, key=key, num=num, least=least) if fit.num_tail else ends
    return {
        "alpha": fit.alpha, "alpha_stderr": fit.stderr, "alpha_low": ends[0], "alpha_high": ends[1], "xmin": fit.xmin,
        "num_tail": fit.num_tail or math.nan, "ks": fit.ks, "log_normal_ratio": ratio.log_ratio, "log_normal_z": ratio.z,
        "log_normal_p": ratio.p_value, "num_eigenvalues": len(spectrum.positive),
        "num_cut": len(spectrum.positive) - len(x),
    }  # fmt: skip


def _sizes(matrix: Tensor, spectrum: _Spectrum) -> dict[str, Any]:
    largest = float(spectrum.every.max())
    ranks = matrix_ranks(matrix.flatten(1))._asdict()
    stable = float(spectrum.every.sum()) / largest if largest > 0 else math.nan
    return {"stable_rank": stable, "spectral_norm": math.sqrt(largest), **ranks}
