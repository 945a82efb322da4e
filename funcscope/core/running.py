"""Running statistics: buffers of normalising layers that describe the data at the parameters that they came with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.overrides import TorchFunctionMode

from .checks import check_instance
from .layout import Params
from .model import Functional, Inputs
from .objective import Loss, Theta
from .primitives import affine, per_channel

NAMES = ("running_mean", "running_var")


def holds_statistics(name: str, buffer: Tensor) -> bool:
    """Whether a buffer is a mean or a variance that training tracked, as batch and instance norms hold them."""
    return name.rpartition(".")[2] in NAMES and buffer.is_floating_point()


def held_statistics(net: Functional) -> dict[str, Tensor]:
    """The running statistics among a net's buffers; none where norms use those of the batch, or there are no such norms."""
    return {name: buffer for name, buffer in net.buffers.items() if holds_statistics(name, buffer)}


def power_iterations(net: Functional) -> tuple[str, ...]:
    """The names of the singular vectors that spectral norms keep: buffers, too, that fit one set of weights only."""
    modules = net._skeleton.named_modules()
    owners = [name for name, module in modules if isinstance(module, _SpectralNorm)]
    return tuple(name for name in net.buffers if name.rpartition(".")[0] in owners)


def running_statistics(loss: Loss, theta: Theta) -> dict[str, Tensor]:
    r"""The running statistics that the loss's own data have at theta, for every layer that keeps such: name -> (channels,).

    One pass over the batches, in which batch norms normalise with the statistics of the batch, as in training, so that
    deeper layers see inputs that are normalised at theta. With $n_b$ values per channel in batch b,

    $$\mu = \sum_b \frac{n_b}{N}\, \mu_b, \qquad \sigma^2 = \sum_b \frac{n_b}{N}\, \frac{n_b}{n_b - 1}\, \sigma_b^2,
      \qquad N = \sum_b n_b.$$

    For batches of one size these are what `torch.optim.swa_utils.update_bn` and a pass in train mode with
    `momentum=None` leave: statistics are reset, the variance is the unbiased one, and that between batches is left out, so
    that the result depends on how the data are batched. Instance norms that track: the means over instances. Dropout is
    off. They are functions of theta, and no buffer is written to. An empty dict where nothing is tracked.
    `loss.with_buffers(running_statistics(loss, theta))` is the loss with them.

    Raises ValueError for a batch with one value per channel, and for statistics that no `F.batch_norm` or
    `F.instance_norm` reads (a layer with a kernel of its own, scripted or compiled).

    Izmailov, Podoprikhin, Garipov, Vetrov, Wilson (2018), arXiv:1803.05407, section 3.2.

    >>> from funcscope.core.criterion import classification
    >>> from funcscope.core.model import functional
    >>> from funcscope.core.objective import objective
    >>> net = functional(torch.nn.BatchNorm1d(1))
    >>> loss = objective(net, [(torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0]))], classification)
    >>> running_statistics(loss, net.theta)
    {'running_mean': tensor([2.]), 'running_var': tensor([2.])}
    """
    check_instance("loss", loss, Loss, "`objective(functional(model), batches, criterion)`")
    params, recorder = loss.params(theta), _Recorder(held_statistics(loss.net))
    if not recorder.buffers:
        return {}
    for inputs, _ in loss.batches:
        _apply(loss.net, recorder, params, inputs)
    return recorder.averages()


def batch_normalised(loss: Loss, theta: Theta) -> Float[Tensor, ""]:
    """The loss in which tracking norms use the statistics of each batch, as in training; differentiable through them."""
    params, recorder = loss.params(theta), _Recorder(held_statistics(loss.net))
    return loss._mean(lambda inputs: _apply(loss.net, recorder, params, inputs))


def _apply(net: Functional, recorder: _Recorder, params: Params, inputs: Inputs) -> Tensor:
    return net._output(net._call(_Recorded(net.whole._running, recorder), "whole.", net._values(params), inputs))


class _Recorded(nn.Module):
    """A model inside a mode: within those that replace norms while it runs."""

    def __init__(self, whole: nn.Module, mode: TorchFunctionMode):
        super().__init__()
        self.whole, self.mode = whole, mode

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.mode:
            return self.whole(*args, **kwargs)


class _Recorder(TorchFunctionMode):
    """While a model runs: norms use the statistics of their input instead of the running ones, and these are averaged."""

    def __init__(self, buffers: Mapping[str, Tensor]):
        super().__init__()
        self.buffers = buffers
        self.names = {id(buffer): name for name, buffer in buffers.items()}
        self.seen: dict[str, tuple[int, Tensor]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.batch_norm:
            return self._batch_norm(*args, **(kwargs or {}))
        if func is F.instance_norm:
            return self._instance_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def averages(self) -> dict[str, Tensor]:
        if missing := sorted(self.buffers.keys() - self.seen.keys()):
            raise ValueError(
                f"`{missing[0]}` cannot be estimated from data: no `F.batch_norm` or `F.instance_norm` that can be seen "
                'reads it (a kernel of its own, scripted or compiled). Pass `buffers="interpolate"`, or use nn.BatchNorm.'
            )
        return {name: self.seen[name][1].to(buffer.dtype) for name, buffer in self.buffers.items()}

    def _batch_norm(
        self, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
    ):
        if training or id(running_mean) not in self.names:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return self._normalised(input, running_mean, running_var, weight, bias, eps, (0, *range(2, input.ndim)))

    def _instance_norm(
        self,
        input,
        running_mean=None,
        running_var=None,
        weight=None,
        bias=None,
        use_input_stats=True,
        momentum=0.1,
        eps=1e-5,
    ):
        if use_input_stats or id(running_mean) not in self.names:
            return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
        return self._normalised(input, running_mean, running_var, weight, bias, eps, tuple(range(2, input.ndim)))

    def _normalised(
        self, x: Tensor, mean: Tensor, var: Tensor, weight: Any, bias: Any, eps: float, dims: tuple
    ) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        centre, name = wide.mean(dims, keepdim=True), self.names[id(mean)]
        num = wide.numel() // centre.numel()
        if num < 2:
            raise ValueError(
                f"`{name}` cannot be estimated from a batch with one value per channel, whose variance is undefined: "
                "make larger batches."
            )
        centred = wide - centre
        square = centred.square().mean(dims, keepdim=True)
        channels, rows = x.shape[1], tuple(range(x.ndim))
        rows = (rows[0], *rows[2:])
        self._add(name, x.numel() // channels, centre.mean(rows))
        self._add(self.names[id(var)], x.numel() // channels, square.mean(rows) * (num / (num - 1)))
        unit = centred * (square + eps).rsqrt()
        return affine(unit, per_channel(weight, x), per_channel(bias, x), x)

    def _add(self, name: str, num: int, value: Tensor) -> None:
        """The mean so far moves by the share of the new values: exactly theirs where they are the first."""
        before, mean = self.seen.get(name, (0, value))
        self.seen[name] = before + num, mean + (value - mean) * (num / (before + num))
