"""Recurrent layers step by step, in operations that have derivatives of every order and a batching rule.

The fused kernels have neither: no rule for `vmap` of values or of inputs, no forward mode on a CPU in float32 (LSTM), no
second derivative on a GPU. They go on serving plain values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten

State = tuple[Tensor, ...]
"""h, or h and c, each (rows, units)."""
Step = Callable[[Tensor, Tensor, State], State]
"""(W_ih x + b_ih, W_hh h + b_hh, state) -> the next state, h not yet projected."""


class _Weights(NamedTuple):
    """Of one layer in one direction."""

    input: Tensor
    hidden: Tensor
    input_bias: Tensor | None = None
    hidden_bias: Tensor | None = None
    projection: Tensor | None = None


def _lstm_step(x: Tensor, h: Tensor, state: State) -> State:
    i, f, g, o = (x + h).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_step(x: Tensor, h: Tensor, state: State) -> State:
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), h.chunk(3, -1)
    n = (xn + (xr + hr).sigmoid() * hn).tanh()
    return (n + (xz + hz).sigmoid() * (state[0] - n),)


def _plain_step(activation: Callable[[Tensor], Tensor]) -> Step:
    return lambda x, h, _: (activation(x + h),)


def _layers(fused: Callable, step: Step) -> Callable:
    """What takes the place of `torch.lstm` and its like, in both of their forms."""

    def layers(*args: Any) -> tuple[Tensor, ...]:
        packed = isinstance(args[3], (tuple, list))  # data, batch_sizes, hx, params, ... against input, hx, params, ...
        data, sizes, hx, params, *options = args if packed else (args[0], None, *args[1:])
        has_biases, num_layers, dropout, train, bidirectional, *rest = options
        if _plain(data, *params) or (train and dropout):
            return fused(*args)
        first = bool(rest and rest[0])
        x = data.transpose(0, 1) if first else data
        steps = list(x) if sizes is None else list(x.split(sizes.tolist()))
        states = hx if isinstance(hx, (tuple, list)) else (hx,)
        weights = _grouped(params, has_biases, num_layers * (1 + bidirectional))
        steps, ends = _run(step, steps, states, weights, bidirectional)
        out = torch.cat(steps) if sizes is not None else torch.stack(steps, 1 if first else 0)
        return (out, *(torch.stack(end) for end in zip(*ends, strict=True)))

    return layers


def _cell(fused: Callable, step: Step) -> Callable:
    """What takes the place of `torch.lstm_cell` and its like."""

    def cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
        state = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
        if _plain(input, *state, w_ih, w_hh):
            return fused(input, hx, w_ih, w_hh, b_ih, b_hh)
        out = step(F.linear(input, w_ih, b_ih), F.linear(state[0], w_hh, b_hh), state)
        return out if len(out) > 1 else out[0]

    return cell


def _run(
    step: Step, steps: list[Tensor], states: Sequence[Tensor], weights: list[_Weights], bidirectional: bool
) -> tuple[list[Tensor], list[State]]:
    """Outputs per time, and the last state per layer and direction."""
    ends: list[State] = []
    for first in range(0, len(weights), 1 + bidirectional):
        ways = []
        for backward in range(1 + bidirectional):
            start = tuple(state[first + backward] for state in states)
            outs, end = _one_way(step, steps, start, weights[first + backward], bool(backward))
            ways.append(outs)
            ends.append(end)
        steps = [torch.cat(outs, -1) for outs in zip(*ways, strict=True)] if bidirectional else ways[0]
    return steps, ends


def _one_way(
    step: Step, steps: list[Tensor], start: State, weights: _Weights, backward: bool
) -> tuple[list[Tensor], State]:
    """Rows may end early (forward) or enter late (backward): those at the end of a batch, as in a packed sequence."""
    mapped = F.linear(torch.cat(steps), weights.input, weights.input_bias).split([len(x) for x in steps])
    state = tuple(x[: len(mapped[-1])] for x in start) if backward else start
    outs: list[Tensor] = []
    ended: list[State] = []
    for x in reversed(mapped) if backward else mapped:
        if len(x) < len(state[0]):
            ended.append(tuple(s[len(x) :] for s in state))
            state = tuple(s[: len(x)] for s in state)
        elif len(x) > len(state[0]):
            state = tuple(torch.cat([s, s0[len(s) : len(x)]]) for s, s0 in zip(state, start, strict=True))
        h, *rest = step(x, F.linear(state[0], weights.hidden, weights.hidden_bias), state)
        state = (h if weights.projection is None else F.linear(h, weights.projection), *rest)
        outs.append(state[0])
    whole = [state, *reversed(ended)]
    return outs[::-1] if backward else outs, tuple(torch.cat(parts) for parts in zip(*whole, strict=True))


def _grouped(params: Sequence[Tensor], has_biases: bool, num: int) -> list[_Weights]:
    """One group per layer and direction, in torch's order; a last matrix projects the hidden state."""
    each = len(params) // num
    groups = (params[i : i + each] for i in range(0, len(params), each))
    if has_biases:
        return [_Weights(*group) for group in groups]
    return [_Weights(group[0], group[1], projection=group[2] if each > 2 else None) for group in groups]


def _plain(*tensors: Tensor) -> bool:
    """Is no derivative taken, and nothing mapped over? Then the fused kernel gives the same values sooner."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return not any(wrapped(x) or (torch.is_grad_enabled() and x.requires_grad) for x in tensors)


def _table() -> Iterator[tuple[Callable, tuple[Any, ...]]]:
    plain = {"rnn_tanh": _plain_step(torch.tanh), "rnn_relu": _plain_step(torch.relu)}
    steps: dict[str, Step] = {"lstm": _lstm_step, "gru": _gru_step, **plain}
    for name, step in steps.items():
        fused, cell = getattr(torch, name), getattr(torch, f"{name}_cell")
        packet = getattr(aten, name)
        yield _layers(fused, step), (fused, packet, packet.input, packet.data)
        yield _cell(cell, step), (cell, getattr(aten, f"{name}_cell"))


TABLE = list(_table())
