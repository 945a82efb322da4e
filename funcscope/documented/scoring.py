"""From a model and a batch as the documents pass them to a loss: what is scored, and by which criterion."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..core.apart import check_apart
from ..core.batches import tensors
from ..core.captured import Watch
from ..core.checks import check_instance
from ..core.criterion import Criterion, classification, criterion_of, custom
from ..core.keys import Key, key
from ..core.model import functional
from ..core.objective import Loss, objective

LossFn = Callable[[nn.Module, Any], Any]


def loss_of(model: nn.Module, batch: Any, loss_fn: LossFn | None = None, batch_config: Any = None) -> Loss:
    """The loss of the model on one batch, cut by `batch_config`; scored by `loss_fn`, or by what the model is.

    A `loss_fn` is one number of the whole batch: of one sequence, as far as the loss knows, so that nothing made of it has
    an error over sequences.
    """
    check_instance("model", model, nn.Module, "the module itself, no name of one and no `functional(model)`")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("no parameter has `requires_grad`, so none would move: `model.requires_grad_(True)`.")
    batch = tuple(batch) if loss_fn is None and isinstance(batch, list) else batch  # what a DataLoader makes of pairs
    size = _batch_size(batch_config)
    parts = _parts(batch, size)
    if loss_fn is None:
        if not any(True for _ in tensors(batch)):
            raise ValueError('`data_batch` holds no tensors: call the tokenizer with `return_tensors="pt"`.')
        net, criterion = functional(model), _criterion(model, batch)
        if size is not None and len(parts) > 1:
            check_apart(objective(net, [batch], criterion), size)
        return objective(net, parts, criterion)
    if len(parts) > 1:
        raise ValueError(
            "`batch_config` cuts the batch, and only `loss_fn` knows how its value on the whole follows from the parts: "
            "leave out one of the two, or let `loss_fn` go through the parts."
        )
    net = functional(model, attention="keep")
    scored = replace(net, _skeleton=_Scored(net._skeleton, _Watched(model, loss_fn)))
    loss = objective(scored, [((batch,), None)], custom(lambda out, _: out[None], "loss_fn"))
    # documented: one call per evaluation; the baseline is evaluated twice, and a `loss_fn` that differs is refused there
    return replace(loss, _verdicts={"function"})


def key_of(seed: int | None) -> Key:
    """The key of a seed, or of a fresh one from the operating system: 53 bits, which every reader of JSON keeps."""
    return key(secrets.randbits(53) if seed is None else seed)


def warn_where_level(deltas: Tensor) -> None:
    """A loss that does not move in any direction says nothing about the model."""
    if not deltas.any():
        text = "the loss is equal along every direction: does `loss_fn` use the model it is given?"
        warnings.warn(text, stacklevel=3)


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
        rule = "`loss_fn` must return a scalar tensor, "
        if not isinstance(out, Tensor) or out.ndim or not out.is_floating_point():
            got = f"{out.dtype} of shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise TypeError(
                f"{rule}got {got}: reduce by `.mean()`, leave out `.item()`, and take `.loss` of a Hugging Face output."
            )
        if any(p.requires_grad for p in model.parameters()) and not out.requires_grad:
            raise TypeError(f"{rule}differentiable in the model's parameters: leave out `.detach()` and `no_grad`.")
        return out


class _Watched:
    """`loss_fn`, refused at its first call where it computes with the parameters of `model` and not of its argument."""

    def __init__(self, model: nn.Module, loss_fn: LossFn):
        self.loss_fn = loss_fn
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        with Watch(self.check) if self.names else nullcontext():
            out = self.loss_fn(model, batch)
        self.names = {}
        return out

    def check(self, tree: Any) -> None:
        for tensor in tensors(tree):
            if id(tensor) in self.names:
                raise ValueError(
                    f"`loss_fn` uses {self.names[id(tensor)]!r} of a model from outside, with weights that never move: "
                    "use its first argument, the model with the perturbed weights."
                )


def _batch_size(batch_config: Any) -> int | None:
    named = isinstance(batch_config, Mapping)
    size = batch_config.get("batch_size") if named else getattr(batch_config, "batch_size", batch_config)
    if batch_config is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ValueError(
            "`batch_config` must be None, a number of rows from 1, or have such an entry or attribute `batch_size`, "
            f"got {batch_config!r}."
        )
    return size


def _parts(batch: Any, size: int | None) -> list[Any]:
    """The batch in parts of `size` rows; a tensor of one row, or of none, serves every part."""
    lengths = [len(tensor) if tensor.ndim else 1 for tensor in tensors(batch)]
    rows = max(lengths, default=0)
    if size is None or size >= rows:
        return [batch]
    if odd := sorted(set(lengths) - {1, rows}):
        raise ValueError(
            f"`batch_config` cuts the batch by rows, so all its tensors must have as many, or one; got {odd[0]} and {rows}."
        )

    def part(tree: Any, at: int) -> Any:
        if isinstance(tree, Tensor):
            return tree[at : at + size] if tree.ndim and len(tree) == rows else tree
        if isinstance(tree, Mapping):
            return {name: part(value, at) for name, value in tree.items()}
        if isinstance(tree, (tuple, list)):
            return (tuple if isinstance(tree, tuple) else list)(part(value, at) for value in tree)
        return tree

    return [part(batch, at) for at in range(0, rows, size)]
