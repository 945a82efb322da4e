"""What is made of a corpus in one forward pass over it: sites of each batch, what is kept of them, and the result of all."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, cast, runtime_checkable

import torch

from .checks import check_instance
from .forward import Inputs
from .layout import Params
from .objective import Loss
from .trace import Trace, trace

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


@dataclass(frozen=True)
class Batch:
    """What a reading is shown of a batch."""

    seen: Trace
    """Holds the sites that the reading asks for, and those of others."""
    inputs: Inputs
    targets: Any
    start: int
    """The number of its first sequence in the corpus."""


def appended(before: Any, part: Any) -> list[Any]:
    """The parts of all batches, in their order."""
    return [*(before or ()), part]


@dataclass(frozen=True)
class Reading(Generic[R]):
    """What a metric asks of a forward pass and makes of it: sites, what is kept of each batch, the result of all.

    Sites are not `scores` or `pattern`: a model that runs fused attention computes these in another way, and what one
    reading sees must not depend on what others ask for.
    """

    sites: tuple[str, ...]
    of_batch: Callable[[Batch], Any]
    """Something small: sums per sequence, Grams, a sample of rows."""
    result: Callable[[Any], R]
    """Of what `merge` has made of all batches."""
    merge: Callable[[Any, Any], Any] = appended
    """What was kept before (None at first) with the part of one more batch."""


@dataclass
class Passed:
    """One reading after the pass."""

    kept: Any = None
    seconds: float = 0.0
    """Of its own: without the forward pass."""
    error: Exception | None = None


@torch.no_grad()
def passed(loss: Loss, params: Params, readings: Mapping[str, Reading[Any]]) -> dict[str, Passed]:
    """One pass over the data for several readings; one that fails is left out of what follows, with its error."""
    check_instance("loss", loss, Loss, "`objective(functional(model), batches, criterion)`")
    made, start = {name: Passed() for name in readings}, 0
    sites = list(dict.fromkeys(site for each in readings.values() for site in each.sites))
    for inputs, targets in loss.batches:
        batch = Batch(trace(loss.net, params, inputs, sites), inputs, targets, start)
        for name, each in readings.items():
            _one_more(made[name], each, batch)
        start += len(batch.seen.mask)
        del batch  # before the next one is made
    return made


def _one_more(one: Passed, reading: Reading[Any], batch: Batch) -> None:
    if one.error is not None:
        return
    began = time.perf_counter()
    try:
        one.kept = reading.merge(one.kept, reading.of_batch(batch))
    except Exception as err:  # the others go on  # noqa: BLE001
        one.error, one.kept = err, None
    one.seconds += time.perf_counter() - began


def read(loss: Loss, params: Params, readings: Mapping[str, Reading[Any]]) -> dict[str, Any]:
    """The results of several readings of one model on one corpus, from a single forward pass over it.

    readings: by names of your own, made by `METRIC.reading(loss, params, ...)` of metrics that need one pass. Each result
    is the same as that of its metric alone.

    Raises ValueError where there is none, TypeError for what is no reading, and what a reading raises.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> loss, m = fs.objective(net, [torch.tensor([[1, 2, 3], [4, 5, 6]])], fs.causal_lm), fs.mechanistic
    >>> both = read(loss, net.params, {
    ...     "lens": m.logit_lens.reading(loss, net.params), "heads": m.attention_patterns.reading(loss, net.params)
    ... })
    >>> both["lens"] == m.logit_lens(loss, net.params), both["heads"].entropy.shape
    (True, torch.Size([2, 2]))
    """
    if not readings:
        raise ValueError("`readings` must have one at least: `metric.reading(loss, params)` makes it.")
    for name, each in readings.items():
        check_instance(f"readings[{name!r}]", each, Reading, "`metric.reading(loss, params)` makes it")
    made = passed(loss, params, readings)
    for one in made.values():
        if one.error is not None:
            raise one.error
    return {name: each.result(made[name].kept) for name, each in readings.items()}


@runtime_checkable
class OnePass(Protocol[P, R_co]):
    """A metric of one forward pass over the data: called, it makes that; its `reading` can share it with others."""

    __name__: str

    def __call__(self, loss: Loss, params: Params, *args: P.args, **kwargs: P.kwargs) -> R_co: ...

    def reading(self, loss: Loss, params: Params, *args: P.args, **kwargs: P.kwargs) -> Reading[R_co]:
        """What it asks of the pass."""
        ...


def one_pass(make: Callable[Concatenate[Loss, Params, P], Reading[R]]) -> OnePass[P, R]:
    """The metric of a function that makes its reading."""

    @functools.wraps(make)
    def call(loss: Loss, params: Params, *args: P.args, **kwargs: P.kwargs) -> R:
        one = make(loss, params, *args, **kwargs)
        return cast(R, read(loss, params, {make.__name__: one})[make.__name__])

    call.reading = make  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]
