"""`FisherSpectral(SpectralConfig(...)).compute_fisher_spectrum(...)` as documented."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core.checks import check_count, check_flag, check_instance
from ..core.keys import key
from ..core.model import functional
from ..curvature.gram import Blocks, Unit
from ..curvature.scored_sequences import sizes
from ..fisher.precomputed import Gradients, gradient_gram
from ..fisher.spectrum import Device, fisher_spectrum, gram_spectrum
from ..fisher.spectrum_result import GramSpectrum
from .scoring import loss_of

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
NORMALISED = (nn.modules.batchnorm._BatchNorm,)
PER_BLOCK = (
    "trace", "largest_eigenvalue", "second_eigenvalue", "spectral_gap", "condition_number", "effective_rank",
    "spectral_rank", "participation_ratio", "participation_ratio_debiased", "numerical_rank", "rank_bound",
    "largest_eigenvalue_bias",
)  # fmt: skip


@dataclass(frozen=True)
class SpectralConfig:
    """How `FisherSpectral` computes."""

    seed: int = 42
    """Of the folds for the standard errors: nothing else is drawn."""
    top_k_eigenvalues: int = 100
    """How many are listed, at least 1; there are as many as samples at most."""
    regularization: float = 1e-10
    """What is added where the solver fails, and there alone, in units of the mean eigenvalue; taken off again."""
    use_deterministic: bool = False
    """Deterministic algorithms of torch and a fixed cuBLAS workspace for the time of the call; both are put back. cuBLAS
    reads its workspace when it is first used: set it in the environment where it was used before."""
    eigensolve_device: Device = "auto"
    sample_unit: Unit = "sequence"
    """`token` takes every scored position for a sample."""
    folds: int = 50
    """Parts of the samples that are left out in turn for standard errors; 0 for those alone that have a closed form."""
    chunk_size: int = 64
    """Sequences that go through the model at once."""

    def __post_init__(self) -> None:
        check_count("top_k_eigenvalues", self.top_k_eigenvalues)
        check_flag("use_deterministic", self.use_deterministic)


class FisherSpectral:
    """The documents' class; it keeps its configuration and nothing else."""

    def __init__(self, config: SpectralConfig | None = None):
        self.config = SpectralConfig() if config is None else config
        check_instance("config", self.config, SpectralConfig, "`SpectralConfig(seed=42)`")

    def compute_fisher_spectrum(
        self,
        model: nn.Module,
        batch: Any = None,
        n_samples: int | None = None,
        block_structure: Blocks = "layer",
        center_gradients: bool = False,
        precomputed_gradients: Gradients | None = None,
    ) -> dict[str, Any]:
        r"""The spectrum of the empirical Fisher matrix by block, as the documented dictionary.

        `per_block`: for every block the `trace`, `largest_eigenvalue`, `second_eigenvalue`, `spectral_gap`,
        `condition_number`, ranks and `top_eigenvalues`, with `..._stderr`; `global`: the same of all parameters; `coupling`
        between blocks, raw and debiased; `metadata`; `notes`. They are those of `fs.fisher_spectrum`, whose docstring has
        formulas and units; `condition_number` is that of the non-zero eigenvalues, a property of how many samples there are.

        n_samples: the first so many; all of them where there are fewer, which `metadata` says. block_structure: none, layer,
        module, tensor, head, or views by name. precomputed_gradients: rows (n, P), or a dictionary by parameter for every
        sample; `batch` is then not looked at. center_gradients: the covariance, over n - 1, wherever gradients come from.

        Note on eval mode: the model is evaluated as in `eval()`, whatever mode it is in, so that batch norm uses its stored
        statistics; those of a training batch would couple the samples, and a gradient per sample would not exist.

        Where this differs from the document: a causal LM is scored on its next tokens (there, on the tokens themselves:
        the gradients of copying); samples are sequences, and `sample_unit` says so (there, "token"); all coordinates
        are used (there, 10,000 of each block, without P / m); all eigenvalues are eigenvalues (there, with more samples than
        P / 4, the diagonal of F); nothing is regularised, no generator is seeded, and no name is hashed.

        Raises ValueError for an empty batch, for no precomputed gradient and for those of another layout (by name), and as
        `fs.fisher_spectrum` does.

        >>> model = nn.Linear(3, 2)
        >>> spectrum = FisherSpectral().compute_fisher_spectrum(model, (torch.eye(3), torch.tensor([0, 1, 0])))
        >>> sorted(spectrum), spectrum["metadata"]["n_samples_used"], spectrum["metadata"]["sample_unit"]
        (['coupling', 'global', 'metadata', 'notes', 'per_block'], 3, 'sequence')
        """
        if n_samples is not None:
            check_count("n_samples", n_samples)
        with deterministic(self.config.use_deterministic):
            if precomputed_gradients is None:
                found = self._of_batch(model, batch, n_samples, block_structure, center_gradients)
            else:
                given = precomputed_gradients if n_samples is None else precomputed_gradients[:n_samples]
                found = self._of_gradients(model, given, block_structure, center_gradients)
        return _documented(found) | {
            "metadata": self._metadata(found, n_samples, block_structure, precomputed_gradients is not None)
            | {"batch_norm": "stored statistics (eval mode)" if _has_batch_norm(model) else "none"}
        }

    def _of_batch(self, model: nn.Module, batch: Any, num: int | None, by: Blocks, centered: bool) -> GramSpectrum:
        if batch is None:
            raise ValueError("give a `batch`, or `precomputed_gradients`: there is nothing to take a spectrum of.")
        loss, config = loss_of(model, batch), self.config
        return fisher_spectrum(
            loss, loss.net.theta, key=key(config.seed), by=by, unit=config.sample_unit, centered=centered, n_samples=num,
            top_k=config.top_k_eigenvalues, folds=config.folds, chunk_size=config.chunk_size,
            jitter=config.regularization, eigensolve_device=config.eigensolve_device,
        )  # fmt: skip

    def _of_gradients(self, model: nn.Module, given: Gradients, by: Blocks, centered: bool) -> GramSpectrum:
        layout, config = functional(model).layout, self.config
        return gram_spectrum(
            gradient_gram(given, layout, by=by, unit=config.sample_unit), key=key(config.seed), centered=centered,
            top_k=config.top_k_eigenvalues, folds=config.folds, num_parameters=sizes(layout, by),
            rounding=torch.finfo(layout.dtype).eps, jitter=config.regularization,
            eigensolve_device=config.eigensolve_device,
        )  # fmt: skip

    def _metadata(self, found: GramSpectrum, num: int | None, by: Blocks, given: bool) -> dict[str, Any]:
        config = self.config
        return {
            "n_samples_requested": num,
            "n_samples_used": found.num_samples,
            "n_samples_unscored": found.num_unscored,
            "n_independent": found.num_groups,
            "sample_unit": found.unit,
            "loss_reduction": "as given" if given else "sum over the tokens of a sample",
            "gradients": "precomputed" if given else "of the batch",
            "centered": found.centered,
            "block_structure": by if isinstance(by, str) else "given",
            "subsample_fraction": 1.0,
            "jittered_blocks": list(found.jittered),
            "seed": config.seed,
            "n_folds": found.folds,
            "use_deterministic": config.use_deterministic,
            "eigensolve_device": config.eigensolve_device,
            "eigensolve_dtype": str(found.eigenvalues.dtype).removeprefix("torch."),
        }


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Deterministic algorithms and a cuBLAS workspace, where `on`; what was set before is put back."""
    if not on:
        yield
        return
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    before = os.environ.get(WORKSPACE)
    os.environ.setdefault(WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        if before is None:
            os.environ.pop(WORKSPACE, None)


def _documented(found: GramSpectrum) -> dict[str, Any]:
    spectra = [*found.eigenvalues, found.global_eigenvalues]
    rows = [_row(found, i, spectra[i]) for i in range(len(spectra))]
    sizes_ = found.num_parameters
    for row, size in zip(rows, [*sizes_, sum(sizes_)], strict=True):
        row["n_parameters"] = size
    values = found.asdict()
    coupling: dict[str, Any] = {name: x for name, x in values.items() if name.startswith(("coupling", "off_block"))}
    return {
        "per_block": dict(zip(found.blocks, rows, strict=False)),
        "global": rows[-1],
        "coupling": coupling | {"blocks": list(found.blocks)},
        "notes": list(found.notes),
    }


def _row(found: GramSpectrum, at: int, spectrum: Sequence[Any] | torch.Tensor) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name in PER_BLOCK:
        if found.centered and name == "participation_ratio_debiased":  # a covariance has none
            continue
        value = float(found.numbers[name][at])
        row[name] = int(value) if name in ("numerical_rank", "rank_bound") else value
        if name in found.errors and name not in ("numerical_rank", "condition_number"):
            row[f"{name}_stderr"] = float(found.errors[name][at])
    known = torch.as_tensor(spectrum)
    return row | {"top_eigenvalues": known[known.isfinite()].tolist()}


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, NORMALISED) for module in model.modules())
