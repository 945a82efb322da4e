"""From a model and a batch as the documents pass them to a loss: what is scored, and by which criterion."""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from ..core.criterion import Criterion, classification, criterion_of, custom
from ..core.model import functional
from ..core.objective import Loss, objective

LossFn = Callable[[nn.Module, Any], Tensor]


def loss_of(model: nn.Module, batch: Any, loss_fn: LossFn | None = None, batch_config: Any = None) -> Loss:
    """The loss of the model on one batch, cut by `batch_config`; scored by `loss_fn`, or by what the model is."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "no parameter of the model has `requires_grad`, so none would move: `model.requires_grad_(True)`."
        )
    if loss_fn is None and isinstance(batch, list):  # what a DataLoader makes of pairs
        batch = tuple(batch)
    parts = _parts(batch, _batch_size(batch_config))
    if loss_fn is None:
        if not _lengths(batch):
            raise ValueError('`data_batch` holds no tensors: call the tokenizer with `return_tensors="pt"`.')
        return objective(functional(model), parts, _criterion(model, batch))
    if len(parts) > 1:
        raise ValueError(
            "`batch_config` cuts the batch, and only `loss_fn` knows how its value on the whole follows from the parts: "
            "leave out one of the two, or let `loss_fn` go through the parts."
        )
    check_no_own_model(model, loss_fn)
    net = functional(model, attention="keep")
    scored = replace(net, _skeleton=_Scored(net._skeleton, loss_fn))
    loss = objective(scored, [((batch,), None)], custom(lambda out, _: out[None], "loss_fn"))
    # documented: one call per evaluation; the baseline is evaluated twice, and a `loss_fn` that differs is refused there
    return replace(loss, _verdicts={"function"})


def _criterion(model: nn.Module, batch: Any) -> Criterion:
    try:
        return criterion_of(model)
    except ValueError as err:
        if isinstance(batch, tuple) and len(batch) == 2:
            return classification
        raise ValueError(
            f"the class name {type(model).__name__!r} does not say how the model is scored: pass a batch "
            "`(inputs, targets)` for classification, or a `loss_fn(model, data_batch)`."
        ) from err


class _Scored(nn.Module):
    """A model that is called with a whole batch and returns what `loss_fn` makes of it.

    Parameters, buffers and children are the model's own, not one level down: what is put in place of one is put in place
    of the other, and the same names give the same directions as without a `loss_fn`.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn):
        super().__init__()
        self._parameters, self._buffers, self._modules = model._parameters, model._buffers, model._modules
        # in a tuple, the model is no child; in a function, what `loss_fn` holds is neither a child nor copied with this
        self._model_and_loss_fn = (model, lambda *args: loss_fn(*args))

    def forward(self, batch: Any) -> Tensor:
        model, loss_fn = self._model_and_loss_fn
        out = loss_fn(model, batch)
        wanted = "`loss_fn` must return a scalar tensor, "
        if not isinstance(out, Tensor) or out.ndim or not out.is_floating_point():
            got = f"{out.dtype} of shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise TypeError(
                f"{wanted}got {got}: reduce by `.mean()`, leave out `.item()`, and take `.loss` of a Hugging Face output."
            )
        if any(p.requires_grad for p in model.parameters()) and not out.requires_grad:
            raise TypeError(f"{wanted}differentiable in the model's parameters: leave out `.detach()` and `no_grad`.")
        return out


def check_no_own_model(model: nn.Module, loss_fn: LossFn) -> None:
    """A model that comes from outside has the weights where they are, along every direction."""
    own = {id(module) for module in model.modules()} | {id(parameter) for parameter in model.parameters()}
    for name, held in _from_outside(loss_fn):
        if id(held) in own:
            raise ValueError(
                f"`loss_fn` takes {name} from outside, with weights that never move: "
                "use its first argument, the model with the perturbed weights."
            )


def _from_outside(function: Any) -> Iterator[tuple[str, Any]]:
    """What a Python function uses besides its arguments: closure, globals, what it is bound to."""
    if isinstance(function, functools.partial):
        yield from (("an argument of `partial`", held) for held in (*function.args, *function.keywords.values()))
        function = function.func
    if hasattr(function, "__self__"):
        yield "the object that it is a method of", function.__self__
    function = getattr(function, "__func__", function)
    if isinstance(function, FunctionType):
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        yield from ((f"{name!r}", cell.cell_contents) for name, cell in cells)
        loads = (step for step in dis.get_instructions(function) if step.opname == "LOAD_GLOBAL")
        yield from ((f"{step.argval!r}", function.__globals__.get(step.argval)) for step in loads)


def _batch_size(batch_config: Any) -> int | None:
    if batch_config is None:
        return None
    named = isinstance(batch_config, Mapping)
    size = batch_config.get("batch_size") if named else getattr(batch_config, "batch_size", batch_config)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(
            "`batch_config` must be None, a number of rows from 1, or have such an entry or attribute `batch_size`, "
            f"got {batch_config!r}."
        )
    return size


def _parts(batch: Any, size: int | None) -> list[Any]:
    """The batch in parts of `size` rows; a tensor of one row, or of none, serves every part."""
    lengths = _lengths(batch)
    rows = max(lengths, default=0)
    if size is None or size >= rows:
        return [batch]
    if odd := sorted(set(lengths) - {1, rows}):
        raise ValueError(
            f"`batch_config` cuts the batch by rows, so all its tensors must have as many, or one; got {odd[0]} and {rows}."
        )

    def part(at: int) -> Any:
        return _each(batch, lambda tensor: tensor[at : at + size] if tensor.ndim and len(tensor) == rows else tensor)

    return [part(at) for at in range(0, rows, size)]


def _lengths(batch: Any) -> list[int]:
    """The number of rows of every tensor in the batch."""
    lengths: list[int] = []
    _each(batch, lambda tensor: lengths.append(len(tensor) if tensor.ndim else 1))
    return lengths


def _each(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """The batch with every tensor changed."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return {name: _each(value, change) for name, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        changed = [_each(value, change) for value in tree]
        return tuple(changed) if isinstance(tree, tuple) else changed
    return tree
