"""The documents' own calls: a model and a batch in, the documented dictionary out; a few lines over the pure functions.

`from ICLRMetrics import ICLRMetrics` in the documents is `from funcscope.documented import ICLRMetrics` here.
"""

from __future__ import annotations

import dis
import functools
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from .core.criterion import Criterion, classification, criterion_of, custom
from .core.keys import key
from .core.model import functional
from .core.objective import Loss, objective
from .landscape.directional import directional_losses

LossFn = Callable[[nn.Module, Any], Tensor]


def sample_directional_losses(
    model: nn.Module,
    data_batch: Any,
    n_samples: int = 50,
    span: float = 0.5,
    loss_fn: LossFn | None = None,
    use_filter_norm: bool = True,
    relative_span: bool = False,
    seed: int | None = None,
    batch_config: Any = None,
    two_sided: bool = False,
    compute_curvature: bool = False,
    global_renorm: bool = False,
    compute_gradient: bool = False,
) -> dict[str, Any]:
    r"""The loss along random directions around the model's weights, as the documented dictionary.

    A short call of `landscape.directional_losses`, whose docstring has formulas, units and errors: `asdict()` of its
    result, that is every documented entry, the standard errors (`..._stderr`), and the samples as arrays. The model is
    not touched, whatever happens; parameters with `requires_grad` False are not perturbed.

    model: in eval mode here, whatever mode it is in.
    data_batch: what a tokenizer returns (`return_tensors="pt"`), a mapping, a tensor of token ids, or `(inputs, targets)`.
    What is scored follows from the class of the model: a causal LM on its own next tokens, padding excluded, or on
    `labels`. A class that says nothing is scored by cross-entropy on batches `(inputs, targets)`.
    loss_fn: scores the batch instead, as `loss_fn(model, data_batch)`, a scalar tensor. It must use the model that it is
    given, not one of its own, and is called by torch in the middle of derivatives: no `.item()`, no `.detach()`.
    use_filter_norm: filter normalisation, or, if False, directions of norm 1, with or without `global_renorm`.
    seed: None takes a fresh one from the operating system. `result["seed"]` says which, to repeat the call with. torch's and
    numpy's global generators are neither set nor used, so that the documented system's draws cannot be had again.
    batch_config: rows per forward pass, as an integer or as `batch_size` of a mapping or an object. The loss is the
    mean over all scored tokens, the same for every cut; a `loss_fn` cannot be cut, as its weights are its own.

    Where this differs from the document, the document is wrong. Draws are independent, with filter norms of the
    unperturbed weights (there, each draw starts from the last one's weights). `global_renorm` changes the unit of the
    step and destroys nothing; with `use_filter_norm` it warns, with the numbers. No sample is dropped and no curvature
    set to 0 for being large. Slopes need no `loss_fn`. `relative_span` moves by span x ||theta||, not by its square.
    No entry grades the minimum: the document's bounds on roughness (0.15, 0.25) mix slope, curvature and the level of
    the loss, and depend on the size of the model; and its Mann-Whitney test for two models throws away that they were
    sampled along the same directions, which `landscape.compare_directional` uses.

    Raises ValueError where the batch holds no tensors, cannot be cut, or has no known score, where `compute_curvature` lacks
    `two_sided`, and as `functional`, `objective` and `directional_losses` do; TypeError where `loss_fn` returns no scalar
    tensor. Warns where the loss is the same along every direction although a `loss_fn` was given.

    Li, Xu, Taylor, Studer, Goldstein (2018), Visualizing the loss landscape of neural nets.

    >>> import torch
    >>> result = sample_directional_losses(nn.Linear(3, 2), (torch.eye(3), torch.tensor([0, 1, 0])), n_samples=4, seed=42)
    >>> result["n_samples"], result["seed"], round(result["relative_step"], 3), sorted(result)[:2]
    (4, 42, 0.5, ['actual_span', 'baseline_loss'])
    """
    loss = _loss(model, data_batch, loss_fn, batch_config)
    result = directional_losses(
        loss,
        loss.net.params,
        key=key(secrets.randbits(53) if seed is None else seed),  # 53 bits: every reader of JSON keeps them
        n_samples=n_samples,
        span=span,
        normalize="filter" if use_filter_norm else "global",
        relative_span=relative_span,
        global_renorm=global_renorm,
        two_sided=two_sided,
        compute_gradient=compute_gradient,
        compute_curvature=compute_curvature,
    )
    if loss_fn is not None and not result.deltas.any():
        warnings.warn(
            "the loss is equal along every direction: does `loss_fn` use the model it is given?", stacklevel=2
        )
    return result.asdict()


class ICLRMetrics:
    """The documents' class, for code that makes one: its methods are the functions of this module, and it keeps nothing."""

    sample_directional_losses = staticmethod(sample_directional_losses)


def _loss(model: nn.Module, batch: Any, loss_fn: LossFn | None, batch_config: Any) -> Loss:
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
    _check_no_own_model(model, loss_fn)
    net = functional(model, attention="keep")
    scored = replace(net, _skeleton=_Scored(net._skeleton, loss_fn))
    return objective(scored, [((batch,), None)], custom(lambda out, _: out[None], "loss_fn"))


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


def _check_no_own_model(model: nn.Module, loss_fn: LossFn) -> None:
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
