"""Jumps of a mixture of experts: how many tokens a step in theta sends to other experts."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..core.experts import recorded_routing
from ..core.layout import Params
from ..core.masks import tokens_there
from ..core.model import Functional, Inputs
from ..core.objective import Loss
from ..core.result import Result, derived, quantity
from ..core.tables import counted


class RoutingChanges(Result):
    """Choices of experts that differ between theta and theta + step; made by `routing_changes`.

    A choice is what the router of one layer does with one token, padding left out.
    """

    changed: Int[Tensor, " n"] = quantity("choices that change", per="direction")
    """Those whose set of experts is another one; order and shares do not count."""
    num: int = quantity("choices")
    """Tokens of all batches times layers with a router."""

    @derived("share of choices that change", per="direction")
    def share(self) -> Float[Tensor, " n"]:
        return self.changed.double() / self.num

    @property
    def head(self) -> str:
        return f"changes of routing: {counted(self.num, 'choice')} of experts, {counted(len(self.changed), 'step')}"


def routing_changes(loss: Loss, theta: Float[Tensor, " p"], steps: Float[Tensor, "..."]) -> RoutingChanges:
    r"""How many choices of experts a step changes: jumps of the loss, which no derivative at theta sees.

    A router sends a token to the k experts of highest score, a choice $S_{t,l}(\theta)$ for token t and layer l which is
    piecewise constant. Within a piece the loss is smooth, and gradients, Hessian products and Fisher matrices are those of
    the piece at theta. Differences of losses over a step, such as directional losses, flatness and planes, are across pieces
    where the number here is not 0:

    $$\#\{(t, l) : S_{t,l}(\theta + d_i) \neq S_{t,l}(\theta)\}.$$

    steps: (n, P), such as `span * d` for directions d. The count is exact for these tokens and steps. A change in one layer
    moves the inputs of those after it, whose changes count as well. It is 0 at a step of 0, and may be 0 at a longer one
    that crosses a border and comes back.

    Cost: n + 1 forward passes over all batches. Raises ValueError where the model is no mixture of experts that is known
    here, and for one made with `attention="keep"`, whose kernels say nothing.

    >>> import torch, transformers, funcscope as fs
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    >>> config = transformers.MixtralConfig(vocab_size=9, num_local_experts=4, num_experts_per_tok=1, **sizes)
    >>> _ = torch.manual_seed(0)
    >>> net = fs.functional(transformers.MixtralForCausalLM(config))
    >>> loss = fs.objective(net, [{"input_ids": torch.arange(1, 7)[None]}], fs.causal_lm)
    >>> step = net.layout.ravel({name: -2 * x * (".gate." in name) for name, x in net.params.items()})
    >>> result = routing_changes(loss, net.theta, torch.stack([0 * step, step]))           # -w: each token's last is first
    >>> result.num, result.changed.tolist()
    (6, [0, 6])
    """
    _check(loss, theta, steps)
    with torch.no_grad():
        base = _routing(loss, loss.layout.unravel(theta))
        changed = [_num_changes(base, _routing(loss, loss.layout.unravel(theta + step))) for step in steps]
    return RoutingChanges(torch.tensor(changed, dtype=torch.long), sum(layer.shape[0] for layer in base))


def _num_changes(base: list[Tensor], moved: list[Tensor]) -> int:
    return sum(int((one != other).any(-1).sum()) for one, other in zip(base, moved, strict=True))


def _routing(loss: Loss, params: Params) -> list[Int[Tensor, "t k"]]:
    """The chosen experts of every token, in rising order, by batch and layer."""
    found = []
    for inputs, _ in loss.batches:
        with recorded_routing() as layers:
            loss.net.whole.apply(params, inputs)
        there = _there(loss.net, inputs).reshape(-1)
        found += [index.sort(-1).values[there] for index in layers]
    return found


def _there(net: Functional, inputs: Inputs) -> Bool[Tensor, "b t"]:
    given: Any = net.prepare(inputs)
    return tokens_there(given["attention_mask"])


def _check(loss: Loss, theta: Tensor, steps: Tensor) -> None:
    if not loss.net.routed:
        raise ValueError(
            "`loss` must be that of a mixture of experts of a known family (`funcscope.core.architectures`): the model of "
            "this one has no router that is known here; `audit` finds the jumps of any model by differences of its values."
        )
    if loss.net.attention == "keep":
        raise ValueError(
            'a model with `attention="keep"` keeps its own kernels, which do not say where tokens go: make the functional '
            "with another `attention`."
        )
    if steps.ndim != 2 or steps.shape[1:] != theta.shape or not len(steps):
        raise ValueError(
            f"`steps` must have shape (n, {theta.numel()}) with n of 1 at least, a step of theta in each row, "
            f"got {tuple(steps.shape)}: stack them with `torch.stack`."
        )
