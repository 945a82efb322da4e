"""The units of a model on its data: which fire, how sparse they are, how the stream grows; from one forward pass."""

from __future__ import annotations

from typing import Any, Literal

import torch

from ..core.checks import check_choice, check_number, check_positive
from ..core.keys import Key
from ..core.layout import Params
from ..core.model import Functional
from ..core.objective import Loss
from ..core.reading import Batch, Reading, one_pass, read
from ..core.streams import streams_of
from .gains import GainSums, PerturbationGains, ResidualGains, gain_sums, gains_of, perturbation_gains
from .sparsity import Sparsity, SparsitySums, sparsity_of, sparsity_sums
from .superposition import Superposition, feature_matrices, superposition
from .units import SITE, Rule, UnitActivity, UnitSums, activity_of, mlp_sites, relative_thresholds, unit_sums

RECTIFIED = ("relu", "relu2", "relu6")
"""Nonlinearities that are 0 for all below 0."""


@one_pass
def dead_neurons(
    loss: Loss, params: Params, *, rule: Literal["auto", "positive", "relative"] = "auto", tau: float = 1e-2
) -> Reading[UnitActivity]:
    r"""Which units of the MLPs are never active on the data, and how often the others are.

    `unit_activity` of the texts of a loss. rule "auto" is "positive" (a > 0) for ReLU without a gate, else "relative"
    ($|a| > \tau\, \mathrm{rms}$ of the layer), which takes a pass of its own before.

    A unit that was never active is below 3 / tokens with 95 % if tokens were independent, below 3 / sequences in any case.
    The document's "zero activation" is taken behind the nonlinearity: before it a dead ReLU unit has large values.

    Raises ValueError for models whose parts are not described, where there is no token, and by the relative rule for
    activations that are not finite.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> found = dead_neurons(fs.objective(net, [torch.tensor([[1, 2, 3], [4, 5, 6]])], fs.causal_lm), net.params)
    >>> found.rule, found.num_dead
    ('relative', tensor([0, 0]))
    """
    check_choice("rule", rule, ("auto", "positive", "relative"))
    check_positive("tau", tau)
    names = mlp_sites(loss.net)
    chosen: Rule = rule if rule != "auto" else "positive" if _is_rectified(loss.net) else "relative"
    thresholds = dict.fromkeys(names, 0.0)
    if chosen == "relative":
        first = read(loss, params, {"rms": _of_layers(names, lambda _, x, mask: unit_sums(x, mask))})["rms"]
        thresholds = relative_thresholds(first, tau)
    made = _of_layers(names, lambda name, x, mask: unit_sums(x, mask, rule=chosen, threshold=thresholds[name]))
    return Reading(made.sites, made.of_batch, lambda sums: activity_of(sums, rule=chosen, tau=tau), made.merge)


@one_pass
def activation_sparsity(loss: Loss, params: Params, *, tau: float = 1e-2) -> Reading[Sparsity]:  # noqa: ARG001
    """How few units of each MLP carry the activations of a token: Hoyer, Gini, and L0 / d, beside a Gaussian's.

    `sparsity` of the texts of a loss, behind the nonlinearity.

    Raises ValueError for models whose parts are not described, and where there is no token.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> loss = fs.objective(net, [torch.tensor([[1, 2, 3], [4, 5, 6]])], fs.causal_lm)
    >>> activation_sparsity(loss, net.params).hoyer.shape
    torch.Size([2])
    """
    check_number("tau", tau, 0.0)
    made = _of_layers(mlp_sites(loss.net), lambda _, x, mask: sparsity_sums(x, mask, tau=tau))
    return Reading(made.sites, made.of_batch, lambda sums: sparsity_of(sums, tau=tau), made.merge)


@one_pass
def stream_gains(loss: Loss, params: Params) -> Reading[ResidualGains]:  # noqa: ARG001
    """How the residual stream's norm changes from layer to layer on the texts of a loss: `residual_gains`.

    Raises ValueError for models that are not described, and without a token.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> stream_gains(fs.objective(net, [torch.tensor([[1, 2, 3], [4, 5, 6]])], fs.causal_lm), net.params).gain.shape
    torch.Size([2])
    """
    names = streams_of(loss.net)

    def of_batch(batch: Batch) -> GainSums:
        return gain_sums(torch.stack([batch.seen[name] for name in names]), batch.seen.mask)

    return Reading(tuple(names), of_batch, gains_of, lambda a, b: b if a is None else a.merge(b))


def perturbation_growth(loss: Loss, params: Params, *, key: Key, num: int = 4) -> PerturbationGains:
    """How much a small random perturbation of the first residual stream has grown at every layer, on the texts of a loss.

    `perturbation_gains`: `num` directions for each sequence, by jvp.

    Raises ValueError for models that are not described, and without a token.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> loss = fs.objective(net, [torch.tensor([[1, 2, 3], [4, 5, 6]])], fs.causal_lm)
    >>> perturbation_growth(loss, net.params, key=fs.key(0)).gain.shape
    torch.Size([3])
    """
    return perturbation_gains(loss.net, params, [inputs for inputs, _ in loss.batches], key=key, num=num)


def weight_superposition(net: Functional, params: Params, *, chunk: int = 4096) -> Superposition:
    """Whether a model's matrices hold more features than they have dimensions, and how these share them.

    `superposition` of `feature_matrices`: the embedding, the unembedding where it is another matrix, and what the units of
    each MLP write.

    Raises ValueError for models whose parts are not described, and for weights that are not finite.

    >>> import funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> weight_superposition(net, net.params).rank
    tensor([4, 4])
    """
    return superposition(feature_matrices(net, params), chunk=chunk)


def _of_layers(names: list[str], sums: Any) -> Reading[dict[str, UnitSums | SparsitySums]]:
    """Sums of every layer by name."""

    def of_batch(batch: Batch) -> dict[str, Any]:
        return {name: sums(name, batch.seen[name], batch.seen.mask) for name in names}

    def merge(before: dict[str, Any] | None, part: dict[str, Any]) -> dict[str, Any]:
        return part if before is None else {name: before[name].merge(each) for name, each in part.items()}

    return Reading((SITE,), of_batch, lambda made: made, merge)


def _is_rectified(net: Functional) -> bool:
    """Whether the MLPs are ReLU's without a gate."""
    config = net.config
    kinds = [getattr(config, name, None) for name in ("activation_function", "hidden_act", "hidden_activation")]
    gated = hasattr(config, "rms_norm_eps")
    return not gated and next((kind in RECTIFIED for kind in kinds if isinstance(kind, str)), False)
