"""What a Gram matrix says of the second moment of gradients: its spectrum by block, with what few samples make of it."""

from __future__ import annotations

from typing import Any, TypeVar

from jaxtyping import Bool, Float
from torch import Tensor

from ..core.estimate import Estimate
from ..core.keys import Key
from ..core.result import Derived, Result, derived, internal, quantity
from ..core.tables import counted

T = TypeVar("T")


def _of_blocks(name: str, label: str, **what: Any) -> Derived[Tensor]:
    return derived(label, per="block", **what)(lambda self: self.numbers[name][:-1])


def _error_of(name: str) -> Derived[Tensor]:
    return derived(f"standard error of {name}", per="block", shown=False)(lambda self: self.errors[name][:-1])


def _of_all(name: str, label: str) -> Derived[Estimate]:
    return derived(f"{label} of all")(
        lambda self: Estimate(self.numbers[name][-1], self.errors[name][-1], self.num_groups)
    )


def _uncentered(one: Derived[T]) -> Derived[T | None]:
    """None of a covariance."""
    made = Derived[T | None](lambda self: None if self.centered else one.func(self))
    made.quantity = one.quantity
    return made


class GramSpectrum(Result):
    r"""Spectrum, ranks and coupling of a second moment or a covariance of gradients; made by `gram_spectrum`.

    Ranks are those of the matrix of gradients, $\sigma = \sqrt\lambda$ (linalg/ranks.py): `spectral_rank` is Roy and
    Vetterli's rank of F itself, which `spectrum_summary` calls its `effective_rank`.

    `condition_number` is the largest over the smallest non-zero eigenvalue of this sample: the matrix over parameters is
    singular wherever `rank_bound` is below their number, and has none. Where samples are fewer than parameters, it and the
    ranks are properties of how many samples there are.

    Errors are over samples (their groups). Of a trace the error's square has no bias: its root mean square is what
    repetitions have, within 10 % at 5, 10 and 20 samples, while the mean error is .83 to .93 of it at 5 samples with normal
    gradients and .7 with heavy tails (Student's t of 5 degrees). Those of eigenvalues and ranks are jackknifed: at 5 to 20
    samples .8 to 1.3 of the truth where eigenvalues lie apart (gaps up to 1.5); where they are nearly equal up to 1.9 for
    eigenvalues, 2.3 for gaps and 1.75 for ranks. With heavy tails the root mean square is right within 25 %, but most errors
    are too small: the mean one of the largest eigenvalue is .36 to .76 of the truth. `largest_eigenvalue_bias`, jackknifed as
    well, says how much of the largest eigenvalue is that of few samples, $E \lambda_1(\hat F) \ge \lambda_1(F)$: its order of
    magnitude.

    Numbers without bias are ratios to an unbiased $\lVert F \rVert_F^2$. Where that is not two of its own errors above 0,
    they are nan, and said to be not resolved. Errors, over what repetitions of 15 and 40 samples have where it is resolved:
    of the participation ratio, to first order, .85 to 1.1 with normal gradients and .75 to .95 with heavy tails; of couplings
    and the share off the blocks, jackknifed, .95 to 1.15 (their root mean square) for blocks that are coupled, and too large
    where they are independent: 1.45 at 40 samples, 1.55 at 15; of a covariance up to 1.8. A covariance has no participation
    ratio without bias here.
    """

    eigenvalues: Float[Tensor, "b k"] = quantity("eigenvalue", per=("block", "rank"), shown=False)
    """In descending order; nan where a block has fewer parameters."""
    global_eigenvalues: Float[Tensor, " k"] = quantity("eigenvalue of all", per="rank")
    coupling: Float[Tensor, "b b"] = quantity("coupling of blocks", per=("block", "other block"), shown=False)
    r"""$\mathrm{tr}(K_a K_b) / \sqrt{\mathrm{tr} K_a^2\, \mathrm{tr} K_b^2}$: near 1 for few samples, whatever the blocks."""
    coupling_debiased: Float[Tensor, "b b"] = quantity(
        "coupling of blocks without bias", per=("block", "other block"), stderr="coupling_debiased_stderr", shown=False
    )
    """From pairs of different samples: near 0 for independent blocks; may leave [-1, 1]; nan if not resolved."""
    coupling_debiased_stderr: Float[Tensor, "b b"] = quantity(
        "standard error of the coupling", per=("block", "other block"), shown=False
    )
    off_block_mass: float = quantity("share of the squares off the blocks")
    off_block_mass_debiased: Estimate = quantity("share of the squares off the blocks, without bias")
    num_samples: int
    num_groups: int
    """Independent units among the samples: sequences, where tokens are the samples."""
    num_unscored: int
    """Sequences without a scored position, which are no samples."""
    unit: str
    centered: bool
    folds: int
    """Parts of the samples that were left out in turn."""
    key: Key
    numbers: dict[str, Tensor] = internal()
    errors: dict[str, Tensor] = internal()
    num_parameters: list[int] = internal()
    """Of every block, and of all; 0 where it is not known."""
    squares_resolved: Bool[Tensor, " c"] = internal()
    """Whether ||F||^2 without bias, of every block and of all, lies two of its errors above 0."""
    jittered: list[str] = internal()
    """Blocks that the solver refused as they are."""
    by_rows: list[str] = internal()
    blocks: list[str] = internal()

    trace = _of_blocks("trace", "trace", stderr="trace_stderr")
    trace_stderr = _error_of("trace")
    largest_eigenvalue = _of_blocks("largest_eigenvalue", "largest eigenvalue", stderr="largest_eigenvalue_stderr")
    largest_eigenvalue_stderr = _error_of("largest_eigenvalue")
    largest_eigenvalue_bias = _of_blocks("largest_eigenvalue_bias", "bias of the largest eigenvalue")
    second_eigenvalue = _of_blocks("second_eigenvalue", "second eigenvalue", stderr="second_eigenvalue_stderr")
    second_eigenvalue_stderr = _error_of("second_eigenvalue")
    spectral_gap = _of_blocks("spectral_gap", "spectral gap", stderr="spectral_gap_stderr")
    spectral_gap_stderr = _error_of("spectral_gap")
    condition_number = _of_blocks("condition_number", "largest over smallest non-zero eigenvalue")
    effective_rank = _of_blocks("effective_rank", "effective rank", stderr="effective_rank_stderr")
    effective_rank_stderr = _error_of("effective_rank")
    spectral_rank = _of_blocks("spectral_rank", "spectral rank", stderr="spectral_rank_stderr")
    spectral_rank_stderr = _error_of("spectral_rank")
    participation_ratio = _of_blocks("participation_ratio", "participation ratio", stderr="participation_ratio_stderr")
    participation_ratio_stderr = _error_of("participation_ratio")
    participation_ratio_debiased = _uncentered(
        _of_blocks(
            "participation_ratio_debiased", "participation ratio without bias",
            stderr="participation_ratio_debiased_stderr",
        )
    )  # fmt: skip
    participation_ratio_debiased_stderr = _uncentered(_error_of("participation_ratio_debiased"))
    numerical_rank = _of_blocks("numerical_rank", "eigenvalues above rounding")
    rank_bound = _of_blocks("rank_bound", "most non-zero eigenvalues that there can be")
    global_trace = _of_all("trace", "trace")
    global_largest_eigenvalue = _of_all("largest_eigenvalue", "largest eigenvalue")
    global_second_eigenvalue = _of_all("second_eigenvalue", "second eigenvalue")
    global_spectral_gap = _of_all("spectral_gap", "spectral gap")
    global_effective_rank = _of_all("effective_rank", "effective rank")
    global_spectral_rank = _of_all("spectral_rank", "spectral rank")
    global_participation_ratio = _of_all("participation_ratio", "participation ratio")
    global_participation_ratio_debiased = _uncentered(
        _of_all("participation_ratio_debiased", "participation ratio without bias")
    )

    @derived("bias of the largest eigenvalue of all")
    def global_largest_eigenvalue_bias(self) -> float:
        return float(self.numbers["largest_eigenvalue_bias"][-1])

    @derived("largest over smallest non-zero eigenvalue of all")
    def global_condition_number(self) -> float:
        return float(self.numbers["condition_number"][-1])

    @derived("eigenvalues of all above rounding")
    def global_numerical_rank(self) -> int:
        return int(self.numbers["numerical_rank"][-1])

    @derived("most non-zero eigenvalues of all that there can be")
    def global_rank_bound(self) -> int:
        return int(self.numbers["rank_bound"][-1])

    @property
    def coords(self) -> dict[str, Any]:
        num = len(self.global_eigenvalues)
        return {"block": self.blocks, "other block": self.blocks, "rank": range(1, num + 1)}

    @property
    def head(self) -> str:
        what = "covariance" if self.centered else "second moment"
        where = counted(len(self.blocks), "block")
        return f"{what} of the gradients of {counted(self.num_samples, self.unit)}, in {where}"

    @property
    def unresolved(self) -> list[str]:
        names = ["off_block_mass_debiased", *([] if self.centered else ["global_participation_ratio_debiased"])]
        return [] if bool(self.squares_resolved[-1]) else names

    @property
    def notes(self) -> list[str]:
        return [text for text, holds in self._remarks() if holds]

    def _remarks(self) -> list[tuple[str, bool]]:
        known = [num for num in self.num_parameters if num]
        zero = [name for name, rank in zip(self.blocks, self.numerical_rank.tolist(), strict=True) if not rank]
        told = self.squares_resolved.tolist()
        lost = [name for name, there in zip([*self.blocks, "all"], told, strict=True) if not there]
        same = "equal, up to rounding" if self.centered else "0"
        return [
            (
                f"{counted(self.num_samples, self.unit)} for {max(known, default=0):,} parameters: smallest eigenvalues, "
                "condition numbers and ranks are properties of how many samples there are.",
                self.num_samples < max(known, default=0),
            ),
            (
                f"squares, and so numbers without bias, are not resolved by these samples: {', '.join(lost)}.",
                bool(lost),
            ),
            ("one sample: there is no error over samples.", self.num_groups < 2),
            (f"all gradients are {same}, so that there is no spectrum: {', '.join(zero)}.", bool(zero)),
            (f"{counted(self.num_unscored, 'sequence')} without a scored position left out.", self.num_unscored > 0),
            (f"solved with a multiple of I, taken off again: {', '.join(self.jittered)}.", bool(self.jittered)),
            (
                f"gradients multiplied out, as their use is not known: {', '.join(self.by_rows)}.",
                bool(self.by_rows),
            ),
        ]
