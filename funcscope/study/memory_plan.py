"""How a metric's products are to be made so that they fit: whole graphs, logits in parts, graphs made anew, layers again.

One forward pass says what a graph of one batch holds; what derivatives of it take are multiples of that, measured. No number
depends on the choice beyond rounding: all make the same products.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..core.held import saved_bytes
from ..core.imported import layer_names
from ..core.objective import Loss
from ..curvature.outputs import has_head


class Multiples(NamedTuple):
    """What a Hessian product takes: graphs of one batch without the parameters, and vectors as long as theta."""

    first: float
    """Graphs, for the first batch of a kept product."""
    further: float
    """For each further one."""
    anew: float
    """Of a product that is made anew, for its largest batch."""
    theta: float
    """Vectors, those of its check included."""
    theta_further: float
    """For each further batch of a kept product."""


LAYERS = Multiples(5.5, 3.5, 11, 12, 3.5)
"""Of models with layers of transformers, measured of GPT-2 and Llama; a Gauss-Newton product takes less."""
OTHERS = Multiples(11, 4.5, 18, 20, 3)
"""Of all others, measured of tanh, ReLU and convolutional nets: with kinks, the check of a first product takes most."""
OF_LOGITS = 14
"""Logits of one part that a product takes where the logits are made in parts.

A fifth of them is what the allocator leaves free between tensors of many sizes, more or less of it from run to run.
"""
HEAD_CHUNKS = (512, 128)
"""Tokens of a part: fewer make many small products."""
GIB = 2**30
_KNOWN: WeakKeyDictionary[Loss, int] = WeakKeyDictionary()


class Way(NamedTuple):
    """How products can be made."""

    keep: bool
    remat: bool
    head_chunk: int | None = None

    @property
    def name(self) -> str:
        graphs = "keeping the graphs of all batches" if self.keep else "making the graphs anew for every product"
        layers = ", with layers that are computed again" if self.remat else ""
        parts = "" if self.head_chunk is None else f", with the logits of {self.head_chunk} tokens at a time"
        return f"{graphs}{layers}{parts}"


class MemoryPlan(NamedTuple):
    """How to make products, and why."""

    keep: bool
    remat: bool
    gib: float
    """That they are expected to take."""
    why: str
    """What was expected of the ways that were tried; empty where the first one fits."""
    head_chunk: int | None = None

    @property
    def name(self) -> str:
        return Way(self.keep, self.remat, self.head_chunk).name


def graph_bytes(loss: Loss, theta: Tensor) -> int:
    """What reverse mode keeps of a forward pass over the largest batch: the storages that it saves, each once."""
    if loss not in _KNOWN:
        _KNOWN[loss] = saved_bytes(lambda: largest(loss)(theta.detach().clone().requires_grad_()))
    return _KNOWN[loss]


def memory_plan(
    loss: Loss, theta: Tensor, gib: float | int, *, fixed: Mapping[str, Any] | None = None, parts: bool = False
) -> MemoryPlan | None:
    """The first of the ways that fits into so much memory, by what they cost in time; the one of least where none does.

    fixed: values of `keep` and `head_chunk` that were asked for; None where nothing is left to choose. parts: whether the
    metric can make logits in parts.
    """
    expected: dict[Way, float] = {}
    for way in _ways(loss, theta, parts):
        if all(getattr(way, k) == v for k, v in (fixed or {}).items()):
            expected[way] = _need(loss, theta, way) / GIB
            if expected[way] <= gib:
                break
    if not expected:
        return None
    way = min(expected, key=lambda each: (expected[each] > gib, expected[each]))
    why = "" if [*expected] == [way] and expected[way] <= gib else _why(expected, way, gib)
    return MemoryPlan(way.keep, way.remat, expected[way], why, way.head_chunk)


def _why(expected: Mapping[Way, float], way: Way, gib: float | int) -> str:
    """What was expected of the ways that were tried, a sentence for each."""
    others = [f"{each.name} would take {need:.2g} GiB" for each, need in expected.items() if each != way]
    verdict = "too much, but the least" if expected[way] > gib else "this fits"
    return " ".join(
        f"{text[0].upper()}{text[1:]}." for text in [*others, f"{way.name} takes {expected[way]:.2g} GiB: {verdict}"]
    )


def in_remat(loss: Loss) -> Loss:
    """The same loss, its layers rematerialised."""
    return replace(loss, net=replace(loss.net, remat=layer_names(loss.net._skeleton)))


def largest(loss: Loss) -> Loss:
    """The same loss of its largest batch alone."""
    return Loss(loss.net, (max(loss.batches, key=_size),), loss.criterion)


def _ways(loss: Loss, theta: Tensor, parts: bool) -> Iterator[Way]:
    """By what a product costs in time."""
    chunks = _head_chunks(loss, theta) if parts else ()
    for remat in (False, True) if not loss.net.remat and layer_names(loss.net._skeleton) else (False,):
        yield Way(keep=True, remat=remat)
        yield from (Way(keep=True, remat=remat, head_chunk=chunk) for chunk in chunks)
        yield Way(keep=False, remat=remat)


def _head_chunks(loss: Loss, theta: Tensor) -> tuple[int, ...]:
    """Parts of the logits that are worth making: where these are most of the graph, and more than a part."""
    if not has_head(loss) or 2 * _scored(loss) * _logits(loss) < graph_bytes(loss, theta):
        return ()
    return tuple(chunk for chunk in HEAD_CHUNKS if chunk < _scored(loss))


def _need(loss: Loss, theta: Tensor, way: Way) -> float:
    """Bytes that products take."""
    multiples = LAYERS if layer_names(loss.net._skeleton) else OTHERS
    further = len(loss.batches) - 1 if way.keep else 0
    first = multiples.first if way.keep else multiples.anew
    need = (first + multiples.further * further) * _values(in_remat(loss) if way.remat else loss, theta, way)
    need += (multiples.theta + multiples.theta_further * further) * theta.nbytes
    if way.head_chunk is not None:
        need += OF_LOGITS * min(way.head_chunk, _scored(loss)) * _logits(loss)
    if way.remat:  # one layer, computed again
        need += first * _values(loss, theta, way) / len(layer_names(loss.net._skeleton))
    return need


def _values(loss: Loss, theta: Tensor, way: Way) -> int:
    """Bytes of a graph of one batch beside the parameters, which all batches share."""
    graph = graph_bytes(loss, theta) if way.head_chunk is None else _body_bytes(loss, theta)
    return max(0, graph - theta.nbytes)


def _body_bytes(loss: Loss, theta: Tensor) -> int:
    """What reverse mode keeps of a pass to what the last linear layer reads."""
    inputs, _ = largest(loss).batches[0]
    return saved_bytes(lambda: loss.net.hidden(loss.params(theta.detach().clone().requires_grad_()), inputs))


def _logits(loss: Loss) -> int:
    """Bytes of the logits of one token."""
    weight, _ = loss.net.head_values(loss.net.params)
    return len(weight) * weight.element_size()


def _scored(loss: Loss) -> int:
    """Tokens that the largest batch scores."""
    return max(int((targets.weight != 0).sum()) for _, targets in loss.batches)


def _size(batch: tuple[Any, Any]) -> int:
    return sum(x.numel() for x in torch.utils._pytree.tree_leaves(batch) if isinstance(x, Tensor))
