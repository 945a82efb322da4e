"""What is scored: from a batch to inputs and targets, and from the model's output to a loss per token.

A `Criterion` owns the shift, the mask and the weights, so that the mean, its per-sample gradients, the Gauss-Newton
and the Fisher operators can never disagree about which positions count. The second derivative of the cross-entropy:
proofs/softmax_hessian.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .forward import Inputs
from .keys import Key
from .softmax import Labels, cross_entropy_of, draw_labels, softmax_hessian

IGNORE = -100
"""The label of a position that is not scored, as everywhere in the field."""


@dataclass(frozen=True)
class Criterion:
    """Four pure functions that say what is scored.

    prepare: batch -> (inputs, targets).
    token_loss: (out, targets) -> (loss, weight), two tensors of one shape whose first dimension counts sequences. The
    objective is sum(weight * loss) / sum(weight); a loss of weight 0 is never looked at.
    output_hessian: (out, targets, v) -> the Hessian of sum(weight * loss) with respect to `out`, times `v`.
    sample: (out, targets, key) -> targets with labels drawn from the model's own predictive distribution.

    The other fields have general or refusing defaults, so that a custom criterion needs the first two only.
    """

    name: str
    prepare: Callable[[Any], tuple[Inputs, Any]]
    token_loss: Callable[[Tensor, Any], tuple[Tensor, Tensor]]
    output_hessian: Callable[[Tensor, Any, Tensor], Tensor] | None = None
    sample: Callable[[Tensor, Any, Key], Any] | None = None
    positionwise: bool = False
    """The targets are `Labels`, weighted by their `weight`, and each loss looks at the output of its own position only."""
    unit: str = "loss"
    """Of the loss, as figures and pages name it: nats for a cross-entropy."""

    def scored(self, out: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        """`token_loss` with 0 for every loss of weight 0, whatever it was, and the weights."""
        loss, weight = self.token_loss(out, targets)
        return torch.where(weight != 0, loss, torch.zeros_like(loss)), weight

    def in_dtype(self, dtype: torch.dtype) -> Criterion:
        """The same criterion with the model's output cast to `dtype` before the loss.

        In float32 the loss of a confident prediction is a multiple of 6e-8, and 0 below that; float64 resolves it.
        """
        hessian, sample = self.output_hessian, self.sample
        return replace(
            self,
            name=f"{self.name} in {dtype}",
            token_loss=lambda out, targets: self.token_loss(out.to(dtype), targets),
            output_hessian=hessian and (lambda out, targets, v: hessian(out.to(dtype), targets, v.to(dtype))),
            sample=sample and (lambda out, targets, key: sample(out.to(dtype), targets, key)),
        )

    def __repr__(self) -> str:
        return f"Criterion({self.name})"


def custom(token_loss: Callable[[Tensor, Any], Tensor | tuple[Tensor, Tensor]], name: str = "custom") -> Criterion:
    """A criterion from `token_loss(out, targets) -> loss` or `-> (loss, weight)`, for batches `(inputs, targets)`.

    The loss keeps one entry per sequence or per token: a function that returns the mean already has thrown away the
    weights that an exact mean over unequal batches needs. Weights are constants: made of the targets, not of the output.

    Raises ValueError where output and targets of other shapes were broadcast to a table of all pairs.

    >>> absolute = custom(lambda out, y: (out - y).abs())
    >>> absolute.token_loss(torch.zeros(2), torch.ones(2))
    (tensor([1., 1.]), tensor([1., 1.]))
    """

    def weighted(out: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        scored = token_loss(out, targets)
        loss, weight = scored if isinstance(scored, tuple) else (scored, torch.ones_like(scored))
        _check_no_table(loss, out, targets)
        if loss.ndim == 0 or loss.shape != weight.shape:
            raise ValueError(
                "a custom loss must keep its first dimension, one entry per sequence, and have weights of its own shape; "
                f"got a loss of shape {tuple(loss.shape)} and weights of shape {tuple(weight.shape)}. "
                "Use `reduction='none'`."
            )
        return loss, weight

    if not callable(token_loss):
        raise TypeError(
            f"`token_loss` must be a function of (output, targets) without reduction, got a {type(token_loss).__name__}."
        )
    return Criterion(name, pair, weighted)


def _check_no_table(loss: Tensor, out: Tensor, targets: Any) -> None:
    """(n, 1) against (n,) is (n, n), every output beside every target: nobody's loss."""
    if (
        isinstance(targets, Tensor)
        and isinstance(loss, Tensor)
        and loss.numel() > max(out.numel(), targets.numel())
        and _fit(out, targets)
        and loss.shape == torch.broadcast_shapes(out.shape, targets.shape)
    ):
        raise ValueError(
            f"the model's output of shape {tuple(out.shape)} and the targets of shape {tuple(targets.shape)} were broadcast "
            f"to losses of shape {tuple(loss.shape)}, every output beside every target: give both one shape, for example "
            "`targets[:, None]`."
        )


def _fit(a: Tensor, b: Tensor) -> bool:
    return all(m == n or 1 in (m, n) for m, n in zip(reversed(a.shape), reversed(b.shape), strict=False))


def pair(batch: Any) -> tuple[Inputs, Any]:
    """(inputs, targets) of a tuple, or of a mapping whose targets are its `labels`."""
    if isinstance(batch, Mapping) and "labels" in batch:
        return {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
    if isinstance(batch, tuple) and len(batch) == 2:
        return batch
    raise ValueError(
        f"a batch must be a tuple `(inputs, targets)` or a mapping with an entry `labels`, got a {type(batch).__name__}: "
        "`batches` is a list of those, `[(inputs, targets)]`, or a `DataLoader`."
    )


def _causal(batch: Any) -> tuple[Inputs, Labels]:
    """Output position t is scored against token t + 1, where both are real tokens; the last position never is."""
    inputs, ids, labels, real = _language(batch)
    if ids.shape[1] < 2:
        raise ValueError(
            f"causal_lm scores token t + 1 at position t, so sequences need at least 2 tokens; got shape {tuple(ids.shape)}."
        )
    both = real.clone()
    both[:, :-1] &= real[:, 1:]
    both[:, -1] = False
    ahead = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORE)], dim=1)
    return inputs, _labels(ahead, both)


def _masked(batch: Any) -> tuple[Inputs, Labels]:
    """Output position t is scored against its own label; labels are given, and -100 where the token was not masked."""
    inputs, _, _, real = _language(batch)
    if not isinstance(batch, Mapping) or batch.get("labels") is None:
        raise ValueError(
            "masked_lm needs a batch with `labels`: the original token where one was masked, -100 elsewhere. "
            "Without them every token would be scored at its own visible position."
        )
    return inputs, _labels(batch["labels"], real)


def _translated(batch: Any) -> tuple[Inputs, Labels]:
    """Decoder position t is scored against label t: the decoder's inputs are the labels moved one step to the right."""
    if not isinstance(batch, Mapping) or "labels" not in batch or not {"input_ids", "input_features"} & batch.keys():
        raise ValueError(
            "seq2seq_lm needs a batch with `input_ids` (`input_features` for speech) for the encoder and `labels` for the "
            "decoder."
        )
    given = batch.get("decoder_input_ids") is not None
    inputs = {name: x for name, x in batch.items() if x is not None and not (given and name == "labels")}
    return inputs, _labels(batch["labels"], torch.ones_like(batch["labels"], dtype=torch.bool))


def classes(batch: Any) -> tuple[Inputs, Labels]:
    """(inputs, labels) of a batch with one class per row of the output."""
    inputs, labels = pair(batch)
    return inputs, _labels(labels, torch.tensor(True))


def _language(batch: Any) -> tuple[Inputs, Tensor, Tensor, Tensor]:
    """(model inputs, token ids, labels, which tokens are real) of a tokenised batch or a bare tensor of ids."""
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
        inputs: Inputs = batch["input_ids"]
    elif isinstance(batch, Mapping) and "input_ids" in batch:
        inputs = {name: value for name, value in batch.items() if name != "labels" and value is not None}
    else:
        raise ValueError("a language-model batch must be a tensor of token ids or a mapping with an entry `input_ids`.")
    ids = batch["input_ids"]
    if ids.ndim != 2 or ids.is_floating_point():
        raise ValueError(f"`input_ids` must be integers of shape (batch, tokens), got {ids.dtype} {tuple(ids.shape)}.")
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim != 2 and batch.get("labels") is None:
        raise ValueError(
            f"an attention mask of shape {tuple(mask.shape)} does not say which tokens are padding: "
            "pass `labels` with -100 there."
        )
    real = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else torch.ones_like(ids, dtype=torch.bool)
    labels = batch.get("labels")
    return inputs, ids, ids if labels is None else labels, real


def _labels(labels: Tensor, scored: Tensor) -> Labels:
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"labels must be a tensor of integers, got a {type(labels).__name__}: `torch.as_tensor(labels)`."
        )
    if labels.is_floating_point():
        raise ValueError(f"labels must be integer classes, got {labels.dtype}; use `custom` or `mse` for real targets.")
    labels = labels.long()
    if bool(((labels < 0) & (labels != IGNORE)).any()):
        least = int(labels[labels != IGNORE].min())
        raise ValueError(f"labels must be classes from 0, or {IGNORE} where nothing is scored; got {least}.")
    scored = scored & (labels != IGNORE)
    return Labels(labels.masked_fill(~scored, 0), scored.to(torch.float32))


causal_lm = Criterion(
    "causal_lm", _causal, cross_entropy_of, softmax_hessian, draw_labels, positionwise=True, unit="nats"
)
"""Next-token cross-entropy: position t against token t + 1; padding, `labels == -100` and the last position weigh 0.

Why the shift: proofs/causal_shift.py.
"""

masked_lm = Criterion(
    "masked_lm", _masked, cross_entropy_of, softmax_hessian, draw_labels, positionwise=True, unit="nats"
)
"""Cross-entropy of the masked tokens at their own positions; `labels` are -100 where nothing was masked."""

classification = Criterion(
    "classification", classes, cross_entropy_of, softmax_hessian, draw_labels, positionwise=True, unit="nats"
)
"""Cross-entropy of one class per output row, for batches `(inputs, labels)` or mappings with `labels`."""

seq2seq_lm = Criterion(
    "seq2seq_lm", _translated, cross_entropy_of, softmax_hessian, draw_labels, positionwise=True, unit="nats"
)
"""Cross-entropy of an encoder-decoder's labels (-100: not scored), each at the decoder position that predicts it.

Without `decoder_input_ids`, the labels stay among the inputs, and the model's door makes the decoder's inputs of them.
"""

_BY_CLASS = (
    ("ForMaskedLM", masked_lm),
    ("ForSequenceClassification", classification),
    ("ForImageClassification", classification),
    ("ForConditionalGeneration", seq2seq_lm),
    ("ForCausalLM", causal_lm),
    ("LMHeadModel", causal_lm),
)


def criterion_of(model: nn.Module) -> Criterion:
    """The criterion that the class name of a Hugging Face model stands for, `...ForMaskedLM` for example.

    Raises ValueError where the name says nothing: pass a criterion by hand then.

    >>> class TinyForCausalLM(nn.Module): ...
    >>> criterion_of(TinyForCausalLM())
    Criterion(causal_lm)
    """
    name = type(model).__name__
    for ending, criterion in _BY_CLASS:
        if name.endswith(ending):
            return criterion
    raise ValueError(
        f"the class name {name!r} does not say what the model is trained for; choose a criterion: "
        "causal_lm, masked_lm, seq2seq_lm, classification or custom."
    )
