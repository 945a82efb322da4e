"""What is spread over and shared between the layers of a model on its data: entropies and mutual information."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_choice, check_count, check_instance
from ..core.estimate import Estimate
from ..core.keys import Key, check_key, fold_in
from ..core.layout import Params
from ..core.objective import Loss
from ..core.reading import Batch, Reading, one_pass
from ..core.result import Result, internal, quantity
from ..core.streams import Reservoir, sampled, streams_of
from ..core.tables import counted
from .entropy import entropy_sums, output_entropy
from .gaussian_information import mutual_information_gaussian
from .groups import centred_columns
from .infonce import mutual_information_infonce
from .mutual_information import MutualInformation
from .neighbor_information import mutual_information_ksg
from .sequence_sums import SequenceSums
from .spectral_entropy import spectral_entropy

Estimator = Literal["gaussian", "ksg", "infonce"]


class LayerEntropy(Result):
    """Over how many directions each residual stream is spread, and how undecided the outputs are."""

    spectral_entropy: Float[Tensor, " l"] = quantity(
        "spectral entropy", unit="nats", per="layer", stderr="spectral_entropy_stderr"
    )
    spectral_entropy_stderr: Float[Tensor, " l"]
    spectral_rank: Float[Tensor, " l"] = quantity(
        "spectral rank", unit="dimensions", per="layer", stderr="spectral_rank_stderr"
    )
    """exp of the entropy."""
    spectral_rank_stderr: Float[Tensor, " l"]
    output_entropy: Estimate = quantity("mean entropy of the outputs", unit="nats")
    num_rows: int
    """Positions that spectra are of."""
    num_tokens: int
    """Positions whose outputs are counted."""
    num_sequences: int
    remarks: tuple[str, ...] = internal(default=())

    @property
    def coords(self) -> dict[str, Sequence[Any]]:
        return {"layer": range(len(self.spectral_entropy))}

    @property
    def head(self) -> str:
        return (
            f"entropies over {counted(self.num_tokens, 'output')} of {counted(self.num_sequences, 'sequence')}, spectra over "
            f"{counted(self.num_rows, 'token')}"
        )

    @property
    def notes(self) -> list[str]:
        return list(self.remarks)


class LayerInformation(Result):
    """Mutual information of each residual stream with the next one, and with the first."""

    with_next: Float[Tensor, " l"] = quantity(
        "mutual information with the next stream", unit="nats", per="layer", stderr="with_next_stderr"
    )
    """nan for the last."""
    with_next_stderr: Float[Tensor, " l"]
    with_first: Float[Tensor, " l"] = quantity(
        "mutual information with the first stream", unit="nats", per="layer", stderr="with_first_stderr"
    )
    """nan for the first."""
    with_first_stderr: Float[Tensor, " l"]
    variance_kept: Float[Tensor, " l"] = quantity("share of the variance in the directions kept", per="layer")
    ceiling: float | None = quantity("largest value that the estimator can give", unit="nats")
    num_saturated: int | None = quantity("values within a tenth of the ceiling")
    """None for estimators without one."""
    estimator: str
    dims: int
    num_rows: int
    num_sequences: int
    key: Key
    remarks: tuple[str, ...] = internal(default=())

    @property
    def coords(self) -> dict[str, Sequence[Any]]:
        return {"layer": range(len(self.with_next))}

    @property
    def head(self) -> str:
        return (
            f"{self.estimator} mutual information of {self.dims} directions of each stream, {self.num_rows} positions of "
            f"{counted(self.num_sequences, 'sequence')}"
        )

    @property
    def notes(self) -> list[str]:
        return [
            "A network is a function: between layers as they are the information is infinite, or that of the input. These "
            "are numbers of the leading directions, under the estimator's assumptions.",
            *self.remarks,
        ]


@one_pass
def layer_entropy(loss: Loss, params: Params, *, key: Key, size: int = 2048) -> Reading[LayerEntropy]:  # noqa: ARG001
    r"""Entropy by layer: of the spectrum of each residual stream, and of the outputs.

    Of each stream $H = -\sum_j p_j \log p_j$ with p the eigenvalues of its centred covariance over their sum
    (`spectral_entropy`), over a uniform sample of `size` positions, and exp H as a number of directions; of the outputs the
    mean of $-\sum_v p_v \log p_v$ over all tokens, or over sequences where each has one output (`output_entropy`). Nats, with
    errors over sequences. Layer l is the stream before block l, the last is that behind all. Of fewer rows than ten times the
    directions a spectrum is too wide, and its entropy too low. For entropies of attention see `attention_patterns`.

    Raises ValueError for models that are not described, for activations that are not finite, and where there is no token.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> loss = fs.objective(net, [torch.tensor([[1, 2, 3], [4, 5, 6]])], fs.causal_lm)
    >>> found = layer_entropy(loss, net.params, key=fs.key(0))
    >>> found.spectral_entropy.shape, found.num_tokens
    (torch.Size([3]), 6)
    """
    check_key(key)
    check_loss(loss)
    names = streams_of(loss.net)

    def result(kept: tuple[Reservoir, SequenceSums]) -> LayerEntropy:
        sample, sums = kept
        check_finite_rows(sample, names)
        spectra = [spectral_entropy(sample.rows[name], groups=sample.sequence) for name in names]
        out, rows = output_entropy(sums), sample.sequence
        remarks = dict.fromkeys([*out.notes, *(note for each in spectra for note in each.notes)])
        return LayerEntropy(
            spectral_entropy=_column([each.entropy for each in spectra]),
            spectral_entropy_stderr=_column([each.stderr for each in spectra]),
            spectral_rank=_column([each.spectral_rank for each in spectra]),
            spectral_rank_stderr=_column([each.spectral_rank_stderr for each in spectra]),
            output_entropy=Estimate(out.entropy, out.stderr, out.num_groups), num_rows=len(rows), num_tokens=out.num,
            num_sequences=out.num_groups, remarks=tuple(remarks),
        )  # fmt: skip

    inner = sampled(names, lambda kept: kept, key=key, size=size)

    def of_batch(batch: Batch) -> tuple[Reservoir, SequenceSums]:
        return inner.of_batch(batch), _entropies(batch.seen["logits"], batch.seen.mask)

    def merge(
        before: tuple[Reservoir, SequenceSums] | None, part: tuple[Reservoir, SequenceSums]
    ) -> tuple[Reservoir, SequenceSums]:
        return part if before is None else (before[0].merge(part[0]), before[1].merge(part[1]))

    return Reading((*names, "logits"), of_batch, result, merge)


@one_pass
def layer_information(
    loss: Loss,
    params: Params,  # noqa: ARG001
    *,
    key: Key,
    estimator: Estimator = "gaussian",
    dims: int = 4,
    size: int = 1024,
) -> Reading[LayerInformation]:
    r"""Mutual information between layers: of each residual stream with the next, and with the first.

    Of the `dims` leading principal directions of each stream, over a uniform sample of `size` positions, in nats, with errors
    over sequences: "gaussian" by canonical correlations (`mutual_information_gaussian`, the information of linear relations),
    "ksg" by nearest neighbours (believed in few dimensions), "infonce" by critics on held-out pairs, with a ceiling. Values
    near the ceiling say that there is as much, and their differences are those of critics.

    A deterministic network has no finite information between layers as they are: what is said is said of these directions
    under the estimator's assumptions. See `usable_information` for what a probe can read.

    Raises ValueError for models that are not described, for activations that are not finite, for more directions than a
    stream or the sample has, and as the estimators do.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> loss = fs.objective(net, [torch.arange(40).view(10, 4) % 9], fs.causal_lm)
    >>> found = layer_information(loss, net.params, key=fs.key(0), dims=2)
    >>> found.with_next.shape, bool(found.with_next[:-1].isfinite().all())
    (torch.Size([3]), True)
    """
    check_key(key)
    check_choice("estimator", estimator, tuple(_ESTIMATORS))
    check_count("dims", dims)
    check_loss(loss)
    names = streams_of(loss.net)

    def result(sample: Reservoir) -> LayerInformation:
        check_finite_rows(sample, names)
        kept = [_leading(sample.rows[name], dims) for name in names]
        streams, last = [scores for scores, _ in kept], len(names) - 1

        def between(i: int, j: int) -> MutualInformation:
            about = fold_in(key, f"{i} {j}")
            return _ESTIMATORS[estimator](streams[i], streams[j], key=about, groups=sample.sequence)

        following = [between(i, i + 1) for i in range(last)]
        first = [following[0], *(between(0, i) for i in range(2, last + 1))]
        values = [[float(each.value) for each in part] for part in (following, first)]
        errors = [[float(each.stderr) for each in part] for part in (following, first)]
        every = [*following, *first[1:]]
        ceilings = [float(each.ceiling) for each in every if each.ceiling is not None]
        nan = float("nan")
        return LayerInformation(
            with_next=_column([*values[0], nan]), with_next_stderr=_column([*errors[0], nan]),
            with_first=_column([nan, *values[1]]), with_first_stderr=_column([nan, *errors[1]]),
            variance_kept=_column([share for _, share in kept]), ceiling=max(ceilings) if ceilings else None,
            num_saturated=sum(bool(each.saturated) for each in every) if ceilings else None, estimator=estimator, dims=dims,
            num_rows=len(sample.sequence), num_sequences=len(sample.sequence.unique()), key=key,
            remarks=tuple(dict.fromkeys(note for each in every for note in each.notes)),
        )  # fmt: skip

    return sampled(names, result, key=key, size=size)


_ESTIMATORS: dict[str, Callable[..., MutualInformation]] = {
    "gaussian": lambda x, y, *, key, groups: mutual_information_gaussian(x, y, groups=groups),  # noqa: ARG005
    "ksg": mutual_information_ksg,
    "infonce": mutual_information_infonce,
}


def check_loss(loss: object) -> None:
    """Raises TypeError for a model or a function in its place."""
    check_instance("loss", loss, Loss, "`fs.objective(fs.functional(model), batches, criterion)`")


def check_finite_rows(sample: Reservoir, names: Sequence[str]) -> None:
    """Raises ValueError for activations that are nan or infinite: nothing can be said of what is around them."""
    for name in names:
        if num := int((~sample.rows[name].isfinite().all(-1)).sum()):
            raise ValueError(
                f"activations at `{name}` must be finite, and those of {counted(num, 'position')} are not: look at the "
                "weights, and at the dtype, since float16 overflows beyond 65,504."
            )


def _entropies(logits: Tensor, mask: Tensor) -> SequenceSums:
    """A classifier has one output per sequence."""
    return entropy_sums(logits, mask) if logits.ndim == 3 else entropy_sums(logits[:, None], mask.any(1, keepdim=True))


def _column(values: Sequence[Tensor | float]) -> Float[Tensor, " l"]:
    return torch.tensor([float(each) for each in values], dtype=torch.float64)


def _leading(x: Float[Tensor, "n d"], dims: int) -> tuple[Float[Tensor, "n k"], float]:
    """Scores of rows in their leading principal directions, and the share of the variance that these have."""
    if dims > min(x.shape):
        raise ValueError(f"`dims` must be at most the {min(x.shape)} that {len(x)} rows of {x.shape[1]} units have.")
    wide = x.double() if x.device.type != "mps" else x.float()
    u, s, _ = torch.linalg.svd(centred_columns(wide), full_matrices=False)
    return (u * s)[:, :dims], float(s[:dims].square().sum() / s.square().sum())
