"""How similar the layers of one model are to each other, or to those of another, on the same samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_choice, check_count
from ..core.keys import Key
from ..core.result import Result, derived, internal, quantity
from ..core.tables import counted
from .calibration import above_null, above_null_stderr, calibrate, calibration_notes, null_p_value, null_point
from .measures import LinearKernels, Measure, Neighbours, Projections, Rotations
from .sequences import check_layers
from .similarity import check_share

MEASURES = ("debiased_cka", "cka", "cca", "procrustes", "neighbours")


class LayerSimilarity(Result):
    """Similarities of every layer to every other one, each beside its own null of permuted pairings.

    Numbers as of `Similarity`. The largest one of all pairs (of different layers, where both sides are one model) is compared
    with the largest one of each permutation: the p value of a maximum, whatever the number of pairs.
    """

    similarity: Float[Tensor, "a b"] = quantity("similarity", per=("layer", "other layer"), stderr="similarity_stderr")
    similarity_stderr: Float[Tensor, "a b"]
    null_mean: Float[Tensor, "a b"] = quantity("mean of the null", per=("layer", "other layer"))
    null_quantile: Float[Tensor, "a b"] = quantity("95 % point of the null", per=("layer", "other layer"))
    p_value: Float[Tensor, "a b"] = quantity("p value", per=("layer", "other layer"))
    calibrated: Float[Tensor, "a b"] = quantity(
        "similarity above the null", per=("layer", "other layer"), stderr="calibrated_stderr"
    )
    calibrated_stderr: Float[Tensor, "a b"]
    largest: Float[Tensor, ""] = quantity("largest similarity")
    largest_null: Float[Tensor, " r"] = quantity("largest of permuted pairs", per="permutation", shown=False)
    layers: tuple[str, ...]
    other_layers: tuple[str, ...]
    measure: str
    per_sequence: int
    """Rows of each sequence."""
    num_sequences: int
    num_left_out: int = internal()
    key: Key

    @derived("95 % point of the null of the largest")
    def largest_null_quantile(self) -> float:
        return float(null_point(self.largest_null))

    @derived("p value of the largest")
    def largest_p_value(self) -> float:
        return float(null_p_value(self.largest_null, self.largest))

    @derived("largest similarity above the null")
    def largest_calibrated(self) -> float:
        return float(above_null(self.largest, null_point(self.largest_null)))

    @property
    def coords(self) -> dict[str, tuple[str, ...]]:
        return {"layer": self.layers, "other layer": self.other_layers}

    @property
    def head(self) -> str:
        return f"{self.measure} of layers, over {counted(self.num_sequences, 'sequence')}"

    @property
    def notes(self) -> list[str]:
        undefined = not bool(self.similarity.isfinite().all())
        return calibration_notes(self.num_sequences, self.per_sequence, self.num_left_out, undefined)


def layer_similarity(
    layers: Mapping[str, Tensor],
    others: Mapping[str, Tensor] | None = None,
    groups: Tensor | None = None,
    *,
    key: Key,
    measure: Literal["debiased_cka", "cka", "cca", "procrustes", "neighbours"] = "debiased_cka",
    k: int = 10,
    variance: float = 0.99,
    num: int = 199,
    per_sequence: int | None = None,
) -> LayerSimilarity:
    r"""Similarity of every pair of layers, of one model or of two, each beside the null of permuted sequences.

    layers, others: by name, values (n, d) of the same n samples; without others, layers beside themselves. measure: as of
    `cka` (debiased or not), `canonical_correlation` (`variance`), `procrustes` and `mutual_neighbours` (`k`), where the other
    arguments are explained, too.

    Of every layer its kernel of samples is made once, and a permutation moves the entries of that: n^2 numbers for each
    layer are in memory, and n^2 multiplications are made for each pair and permutation, whatever the width is (n d^2 in the
    space of units where n > d^2). `procrustes` has no kernel, and decomposes a matrix for each pair and permutation. All
    pairs share the permutations, so that the largest similarity of all has a null, too.

    Raises ValueError where rows, groups and numbers are not as said.

    Kornblith et al. (2019), arXiv:1905.00414; arXiv:2602.14486 for the null.

    >>> import torch, funcscope as fs
    >>> x = fs.normal(fs.key(0), torch.zeros(40, 3))
    >>> found = layer_similarity({"0": x, "1": x.exp(), "2": fs.normal(fs.key(1), x)}, key=fs.key(2))
    >>> found.p_value[0, 1] < 0.05, found.p_value[0, 2] < 0.05
    (tensor(True), tensor(False))
    """
    check_choice("measure", measure, MEASURES)
    check_count("k", k)
    check_share("variance", variance)
    first = check_layers("layers", layers)
    like = next(iter(first.values()))
    second = (
        None if others is None else {name: x.to(like) for name, x in check_layers("others", others, len(like)).items()}
    )
    ys = None if second is None else list(second.values())
    kinds: dict[str, Measure] = {
        "debiased_cka": LinearKernels(True), "cka": LinearKernels(False), "cca": Projections(variance),
        "procrustes": Rotations(), "neighbours": Neighbours(k),
    }  # fmt: skip
    made = calibrate(kinds[measure], list(first.values()), ys, groups, key=key, num=num, per_sequence=per_sequence)
    values, null = made.values.cpu(), made.null.cpu()
    pairs = torch.ones_like(values, dtype=torch.bool)
    pairs = pairs.triu(1) if second is None else pairs
    point = null_point(null)
    return LayerSimilarity(
        similarity=values, similarity_stderr=made.stderr.cpu(), null_mean=null.mean(0), null_quantile=point,
        p_value=null_p_value(null, values), calibrated=above_null(values, point),
        calibrated_stderr=above_null_stderr(values, made.stderr.cpu(), point),
        largest=_largest(values, pairs), largest_null=_largest(null, pairs), layers=tuple(first),
        other_layers=tuple(second or first), measure=measure, per_sequence=made.num_rows // made.num_sequences,
        num_sequences=made.num_sequences, num_left_out=made.num_left_out, key=key,
    )  # fmt: skip


def _largest(values: Float[Tensor, "*r a b"], pairs: Tensor) -> Float[Tensor, "*r"]:
    """nan where there is no pair of layers, or one is undefined."""
    among = values[..., pairs]
    return among.amax(-1) if among.shape[-1] else among.sum(-1).fill_(torch.nan)
