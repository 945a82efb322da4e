"""Attention patterns of a model on its data: what every head looks at, beside uniform attention over the same keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.layout import Params
from ..core.objective import Loss
from ..core.reading import Batch, Reading, one_pass
from ..core.result import Derived, Result, derived, internal, quantity
from ..core.standard_errors import ratio_stderr
from ..core.tables import counted
from ..core.trace import Kernel, Trace
from .passes import blocks_of, not_finite, pattern_at, pattern_sites, token_ids, visible_to
from .scores import SCORES, Sight, queries_of, sums_of, uniform_of
from .scores import counted as num_of

EXTREMES = (0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0)
"""Of `SCORES`: that of a head that does nothing else; of the first two, one key near by."""


def _of_heads(name: str, label: str, unit: str = "") -> Derived[Tensor]:
    at = SCORES.index(name)
    return derived(label, unit=unit, per=("layer", "head"), stderr=f"{name}_stderr")(lambda self: self.values[at])


def _error_of(name: str) -> Derived[Tensor]:
    at = SCORES.index(name)
    return derived(f"standard error of {name}", per=("layer", "head"), shown=False)(lambda self: self.errors[at])


class AttentionPatterns(Result):
    """What the heads of a model look at, with errors over sequences; made by `attention_patterns`."""

    uniform: Float[Tensor, "s l"] = quantity(
        "score of uniform attention", per=("score", "layer"), stderr="uniform_stderr"
    )
    """What a head gets that looks at all visible keys alike, on the same queries."""
    uniform_stderr: Float[Tensor, "s l"] = quantity("standard error of uniform", per=("score", "layer"), shown=False)
    head_specialisation: Float[Tensor, "l h s"] = quantity(
        "share of the way from uniform attention", per=("layer", "head", "score"), shown=False,
        stderr="head_specialisation_stderr",
    )  # fmt: skip
    """0 for uniform attention and 1 for a head that does nothing else, of all scores: they can be compared."""
    head_specialisation_stderr: Float[Tensor, "l h s"] = quantity(
        "standard error of the share", per=("layer", "head", "score"), shown=False
    )
    """Paired: uniform attention is of the same queries."""
    num_queries: Float[Tensor, "s l"] = quantity("queries with the score", per=("score", "layer"), shown=False)
    num_sequences: int
    values: Float[Tensor, "s l h"] = internal()
    errors: Float[Tensor, "s l h"] = internal()

    entropy = _of_heads("entropy", "entropy over that of uniform attention")
    entropy_stderr = _error_of("entropy")
    distance = _of_heads("distance", "mean distance", unit="tokens")
    distance_stderr = _error_of("distance")
    self_attention = _of_heads("self_attention", "attention to the token itself")
    self_attention_stderr = _error_of("self_attention")
    sink = _of_heads("sink", "attention to the first token")
    sink_stderr = _error_of("sink")
    previous = _of_heads("previous", "attention to the previous token")
    previous_stderr = _error_of("previous")
    duplicate = _of_heads("duplicate", "attention to the same token before")
    duplicate_stderr = _error_of("duplicate")
    induction = _of_heads("induction", "attention to what followed the same token")
    induction_stderr = _error_of("induction")

    @property
    def coords(self) -> dict[str, Sequence[Any]]:
        _, layers, heads = self.values.shape
        return {"score": SCORES, "layer": range(layers), "head": range(heads)}

    @property
    def head(self) -> str:
        _, layers, heads = self.values.shape
        return f"attention of {layers} x {heads} heads over {counted(self.num_sequences, 'sequence')}"

    @property
    def notes(self) -> list[str]:
        none = [name for name, num in zip(SCORES, self.num_queries, strict=True) if not bool(num.all())]
        return [
            *([f"no query has such a key, in a layer at least: {', '.join(none)}."] if none else []),
            *(["one sequence: there is no error over sequences."] if self.num_sequences < 2 else []),
            *not_finite("patterns are", self.values[self.num_queries > 0]),
        ]


@one_pass
def attention_patterns(loss: Loss, params: Params) -> Reading[AttentionPatterns]:  # noqa: ARG001
    r"""What every head looks at: seven scores of its patterns A, each beside that of uniform attention over the same keys.

    Means over queries q that see two keys or more (of one alone A = 1, whatever the head does), weighted alike, of

    - `entropy`: $-\sum_k A_{qk} \log A_{qk} / \log n_q$ with $n_q$ the number of keys that q sees: 1 for uniform attention;
    - `distance`: $\sum_k A_{qk} |q - k|$, in tokens;
    - `self_attention`: $A_{qq}$; `sink`: $A_{qf}$ with f the first token of the sequence, of queries that see it;
      `previous`: $A_{q,q-1}$;
    - `duplicate`: $\sum_{k<q} A_{qk} [t_k = t_q]$ and `induction`: $\sum_{k<q} A_{qk} [t_{k-1} = t_q]$, of queries that see
      such a key. An induction head looks at what followed the token the last time (Olsson et al., 2022).

    Which keys a query sees is what the mask of its layer leaves: causal, within its window, in its own of several sequences
    that are packed into a row, or on both sides. Padding is no query and no key. `head_specialisation` has all seven in one
    unit, (score - uniform) / (extreme - uniform), the extreme being 1, or 0 for entropy and distance.

    Errors are over rows of the batches, as of a ratio of sums; nan for one row. Scores are nan, with a note, where no query
    has one. Patterns are made of queries and keys a block of queries at a time, whichever kernel the model uses: one forward
    pass, in the memory of the queries and keys of all layers.

    Raises ValueError for a model whose attention is not described, for batches without `input_ids`, and where no token sees
    another one.

    Entropies over log T, with which causal attention to all tokens is not 1, and shares of pairs, which shrink with T, are
    other numbers. Scores: Olsson et al. (2022), arXiv:2209.11895; sinks: Xiao et al. (2024), arXiv:2309.17453.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=4, n_head=2, vocab_size=9, n_positions=8))
    >>> loss = fs.objective(fs.functional(model), [{"input_ids": torch.tensor([[1, 2, 1], [3, 4, 5]])}], fs.causal_lm)
    >>> made = attention_patterns(loss, loss.net.params)
    >>> made.entropy.shape, made.uniform[:, 0].round(decimals=3).tolist()
    (torch.Size([1, 2]), [1.0, 0.75, 0.417, 0.417, 0.417, 0.333, 0.333])
    """
    return Reading(pattern_sites(loss.net), _of_batch, _summary)


class _Batch(NamedTuple):
    """Per sequence: sums over queries of what heads and uniform attention score, and how many queries have the score."""

    sums: Float[Tensor, "s b l h"]
    uniform: Float[Tensor, "s b l"]
    num: Float[Tensor, "s b l"]


def _of_batch(batch: Batch) -> _Batch:
    seen, tokens = batch.seen, token_ids(batch.inputs)
    layers: dict[int, _Batch] = {}
    for together in _by_mask(seen.kernels):
        layers |= _of_layers(seen, tokens, together)
    return _Batch(*(torch.stack(each, 2).cpu() for each in zip(*(layers[i] for i in sorted(layers)), strict=True)))


def _by_mask(kernels: Mapping[int, Kernel]) -> list[list[int]]:
    """Layers that have one mask in common."""
    groups: dict[Any, list[int]] = {}
    for layer, kernel in kernels.items():
        mask = kernel.mask
        groups.setdefault(None if mask is None else (mask.data_ptr(), mask.shape, mask.stride()), []).append(layer)
    return list(groups.values())


def _of_layers(seen: Trace, tokens: Tensor, layers: list[int]) -> dict[int, _Batch]:
    """Of layers that have one mask, without the axis of layers."""
    sight = Sight.of(visible_to(seen, layers[0]))
    sums: dict[int, Tensor | float] = dict.fromkeys(layers, 0.0)
    uniform: Tensor | float = 0.0
    num: Tensor | float = 0.0
    for rows in blocks_of(seen):
        queries = queries_of(tokens, sight, rows)
        num = num + num_of(queries)
        uniform = uniform + sums_of(uniform_of(sight, rows), queries)[:, :, 0]
        for layer in layers:
            sums[layer] = sums[layer] + sums_of(pattern_at(seen, layer, rows), queries)
    return {layer: _Batch(sums[layer], uniform, num) for layer in layers}  # type: ignore[arg-type]


def _summary(parts: list[_Batch]) -> AttentionPatterns:
    """Ratios of sums over sequences, with their errors."""
    sums, uniform, num = (torch.cat(each, 1) for each in zip(*parts, strict=True))
    if not bool(num.any()):
        raise ValueError("no token sees another one: give texts of two tokens or more, that are no padding.")
    extreme = torch.tensor(EXTREMES, dtype=num.dtype)[:, None, None] * num
    share = ratios(sums - uniform[..., None], extreme - uniform)
    values, even = ratios(sums, num), ratios(uniform[..., None], num)
    return AttentionPatterns(
        even[0][..., 0], even[1][..., 0], share[0].permute(1, 2, 0), share[1].permute(1, 2, 0), num.sum(1),
        int((num[0].sum(-1) > 0).sum()), *values,
    )  # fmt: skip


def ratios(
    sums: Float[Tensor, "s n l h"], over: Float[Tensor, "s n l"]
) -> tuple[Float[Tensor, "s l h"], Float[Tensor, "s l h"]]:
    """Ratios of sums over sequences, and their errors; nan for 0 / 0."""
    errors = [
        torch.stack([ratio_stderr(sums[i, :, j].T, over[i, :, j]) for j in range(over.shape[2])])
        for i in range(len(over))
    ]
    return sums.sum(1) / over.sum(1)[..., None], torch.stack(errors)
