"""What a model's residual streams and outputs say of the next token: probes, their decomposition, calibration, divergence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar, cast

import torch
from jaxtyping import Int
from torch import Tensor

from ..core.checks import check_count, check_flat
from ..core.criterion import Labels
from ..core.forward import Inputs
from ..core.keys import Key, check_key, fold_in
from ..core.layout import Params
from ..core.model import Functional
from ..core.objective import Loss
from ..core.reading import Batch, Reading, one_pass
from ..core.streams import Reservoir, sampled, streams_of
from ..core.trace import sites_of
from .calibration import Calibration, calibration
from .calibration_sums import CalibrationSums, calibration_sums, equal_width_edges
from .divergence import OutputDivergence, divergence_sums, output_divergence
from .of_layers import check_finite_rows, check_loss
from .pid import PID
from .probe_pid import probe_pid
from .profile import InformationProfile, information_profile
from .sequence_sums import SequenceSums

R = TypeVar("R")


@one_pass
def usable_information_by_layer(
    loss: Loss,
    params: Params,  # noqa: ARG001
    *,
    key: Key,
    num_classes: int = 8,
    size: int = 1024,
    folds: int = 5,
    pca: int | None = 32,
) -> Reading[InformationProfile]:
    r"""What a linear probe can read of the next token in each residual stream, held out by sequences.

    `information_profile` over a uniform sample of `size` scored positions. Classes are the `num_classes` - 1 tokens that come
    next most often in the sample, and all others together. pca: components that a probe reads, at most as many as a fold has
    training rows; None for all units.

    Raises ValueError for models that are not described, activations that are not finite, targets that are no labels of
    tokens, and fewer sequences than folds.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> loss = fs.objective(net, [torch.arange(40).view(10, 4) % 9], fs.causal_lm)
    >>> usable_information_by_layer(loss, net.params, key=fs.key(0), num_classes=3, pca=None).names
    ['resid_pre.0', 'resid_post.0']
    """
    check_key(key)
    check_count("num_classes", num_classes, 2)
    check_loss(loss)
    names = streams_of(loss.net)

    def result(sample: Reservoir) -> InformationProfile:
        layers = {name: sample.rows[name] for name in names}
        return information_profile(
            layers, next_token_classes(sample, num_classes), key=key, groups=sample.sequence, folds=folds,
            pca=_components(sample, names[0], pca),
        )  # fmt: skip

    return _of_scored(names, result, key=key, size=size)


@one_pass
def pid_analysis(
    loss: Loss,
    params: Params,  # noqa: ARG001
    *,
    key: Key,
    layer: int = -1,
    num_classes: int = 8,
    size: int = 1024,
    folds: int = 5,
    pca: int | None = 16,
) -> Reading[PID]:
    r"""What attention and the MLP of a layer tell of the next token: alone, alike, and only together.

    `probe_pid` with x what attention and y what the MLP of the layer write into the residual stream, at the same positions
    of the same texts: a uniform sample of `size` scored ones. The document pairs tokens of unrelated batches, which have no
    joint distribution to decompose. Classes are the `num_classes` - 1 tokens that come next most often, and all others
    together. layer: -1 is the last. pca: components that probes of x and y read.

    Raises ValueError for models that are not described, for a layer that is not there, activations that are not finite,
    targets that are no labels of tokens, and fewer sequences than folds.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> loss = fs.objective(net, [torch.arange(40).view(10, 4) % 9], fs.causal_lm)
    >>> pid_analysis(loss, net.params, key=fs.key(0), num_classes=2, pca=None).num_groups
    10
    """
    check_key(key)
    check_count("num_classes", num_classes, 2)
    check_loss(loss)
    num = len(streams_of(loss.net)) - 1
    if not isinstance(layer, int) or not -num <= layer < num:
        raise ValueError(f"`layer` must be one of 0 to {num - 1}, or -1 for the last, got {layer!r}.")
    first, second = f"attn_out.{layer % num}", f"mlp_out.{layer % num}"

    def result(sample: Reservoir) -> PID:
        x, y = sample.rows[first], sample.rows[second]
        labels = next_token_classes(sample, num_classes)
        return probe_pid(
            x, y, labels, key=key, groups=sample.sequence, folds=folds, pca=_components(sample, first, pca)
        )

    return _of_scored((first, second), result, key=key, size=size)


@one_pass
def output_calibration(
    loss: Loss, params: Params, *, key: Key, bins: int = 15, num: int = 1000
) -> Reading[Calibration]:  # fmt: skip
    """Whether the model is right as often as it is sure: expected calibration error over bins of equal width.

    `calibration` at the scored positions, targets shifted as the criterion has them; see there for its null value, which
    says what a calibrated model has with so few positions. num: draws of that. Of a classifier, at its inputs. Any model
    serves; one that is not described has a forward pass of its own.

    Raises ValueError for targets that are no labels.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> loss = fs.objective(net, [torch.arange(40).view(10, 4) % 9], fs.causal_lm)
    >>> output_calibration(loss, net.params, key=fs.key(0)).num_sequences
    10
    """
    check_key(key)
    check_loss(loss)
    edges = equal_width_edges(bins)
    sites = ("logits",) if "logits" in sites_of(loss.net) else ()

    def of_batch(batch: Batch) -> CalibrationSums:
        _check_labels(batch.targets)
        logits = batch.seen["logits"] if sites else loss.net.apply(params, batch.inputs)
        return calibration_sums(logits, batch.targets, edges)

    return Reading(
        sites,
        of_batch,
        lambda sums: calibration(sums, key=key, num=num),
        lambda a, b: b if a is None else a.merge(b),
    )


@torch.no_grad()
def prediction_divergence(loss: Loss, start: Functional | Tensor, end: Functional | Tensor) -> OutputDivergence:
    """How much two models' predictions differ on the same texts: `output_divergence`, the first model's being p.

    start, end: networks of one vocabulary, or parameters of `loss.net`.

    Raises ValueError for targets that are no labels, and for outputs of different shapes.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> loss = fs.objective(net, [torch.arange(40).view(10, 4) % 9], fs.causal_lm)
    >>> prediction_divergence(loss, net, net).js, prediction_divergence(loss, net, 2 * net.theta).js > 0
    (0.0, True)
    """
    check_loss(loss)
    sums: SequenceSums | None = None
    for inputs, targets in loss.batches:
        _check_labels(targets)
        first, second = _outputs(loss, "start", start, inputs), _outputs(loss, "end", end, inputs)
        if first.shape != second.shape:
            raise ValueError(
                f"`end` must have outputs of the same shape as `start`, {tuple(first.shape)}, got {tuple(second.shape)}: "
                "only models of one vocabulary predict the same tokens."
            )
        part = divergence_sums(first, second, targets.weight)
        sums = part if sums is None else sums.merge(part)
    assert sums is not None  # a loss has a batch
    return output_divergence(sums)


def _of_scored(
    sites: Sequence[str], result: Callable[[Reservoir], R], *, key: Key, size: int
) -> Reading[R]:  # fmt: skip
    """A uniform sample of the positions that the loss scores, with their labels, and what is made of it."""

    def of_sample(sample: Reservoir) -> R:
        check_finite_rows(sample, sites)
        return result(sample)

    inner = sampled(sites, of_sample, key=fold_in(key, "positions"), size=size, scored=True)

    def of_batch(batch: Batch) -> Reservoir:
        _check_labels(batch.targets)
        if batch.targets.index.shape != batch.seen.mask.shape:
            raise ValueError(
                f"the loss must score a label at each token, shape {tuple(batch.seen.mask.shape)}, got labels of shape "
                f"{tuple(batch.targets.index.shape)}: of one label per sequence, give rows of your own to "
                "`funcscope.information.usable_information`."
            )
        return cast(Reservoir, inner.of_batch(batch))

    return replace(inner, of_batch=of_batch)


def _check_labels(targets: object) -> None:
    if not isinstance(targets, Labels):
        raise ValueError("the loss must score labels: `fs.objective(net, batches, fs.causal_lm)`.")


def next_token_classes(sample: Reservoir, num: int) -> Int[Tensor, " n"]:
    """The most frequent targets as classes of their own, all others as the last."""
    tokens, index, counts = sample.rows["target"].unique(return_inverse=True, return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter(0, order, torch.arange(len(tokens), device=order.device))
    return rank[index].clamp(max=num - 1)


def _components(sample: Reservoir, name: str, pca: int | None) -> int | None:
    """As many as asked for, and all units where there are no more of them."""
    return pca if pca is not None and pca < sample.rows[name].shape[1] else None


def _outputs(loss: Loss, name: str, end: Functional | Tensor, inputs: Inputs) -> Tensor:
    if isinstance(end, Functional):
        return end.apply(end.params, inputs)
    check_flat(name, end, loss.net.layout.num)
    return loss.net.apply(loss.net.layout.unravel(end), inputs)
