"""What a merge needs to know of each model's data, made once and written to a file: Fisher diagonals, Grams of inputs.

Both are as large as the model or larger. They are added up in the file itself, so that memory holds the model, one batch and
the largest single parameter, however many there are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.checks import check_count
from ..core.keys import Key, check_key, fold_in
from ..core.memory import hand_back
from ..core.objective import Loss
from ..curvature.fisher import check_roots, label_draws
from ..curvature.leafwise import terms_at
from .tensor_file import NewTensorFile, Shape

TRANSPOSED = "transposed"
"""In a file of Grams, the names of the weights that are stored (in, out)."""
Add = Callable[[str, Tensor], None]
"""Adds to the sum of one name."""


def write_fisher(loss: Loss, out: Path, *, key: Key, num: int = 1, metadata: Mapping[str, str] | None = None) -> None:
    r"""The Fisher diagonal at `loss.net.params` as a file of the parameters' names, float32.

    The estimator is that of `fisher_diagonal_mc`, with the same draws under the same key: scores of `num` labels per token
    drawn from the model, summed over a batch and squared, so that smaller batches have less noise. Every gradient is squared,
    added to the file and freed as soon as the backward pass has it: all together never exist.

    Sums are taken in float32: of squares, which do not cancel, n of them are right to n times 6e-8.

    Raises ValueError where the criterion has no predictive distribution, and for weights below 0.
    """
    check_key(key)
    check_count("num", num)
    loss.check_function()
    terms = terms_at(loss, loss.net.params)
    check_roots(terms.weights)
    scale = float(terms.weights.sum()) * num
    shapes = {leaf.name: Shape(torch.float32, leaf.shape) for leaf in loss.layout.leaves}
    with NewTensorFile(out, shapes, metadata) as file:
        for i in range(num):
            _add_squares(loss, fold_in(key, i), lambda name, g: _add_square(file, name, g, scale))


def write_input_grams(
    model: nn.Module, batches: list[dict[str, Tensor]], out: Path, *, metadata: Mapping[str, str] | None = None
) -> None:
    r"""$G = \sum_t x_t x_t^\top$ over the inputs of every linear layer at the tokens that are there, by the weight's name.

    A layer is an `nn.Linear`, or Hugging Face's Conv1D, which stores its weight (in, out); G is (in, in) for both. A weight
    that something else uses, too, as an embedding that is also the head, has none; neither has a layer that no batch reaches
    or whose inputs are not one per token or per text. float32.

    batches: what the model takes, with an `attention_mask` where there is padding.
    """
    layers = linear_layers(model)
    widths = {name: layer.weight.shape[0 if is_transposed(layer) else 1] for name, layer in layers.items()}
    shapes = {name: Shape(torch.float32, (width, width)) for name, width in widths.items()}
    turned = json.dumps(sorted(name for name, layer in layers.items() if is_transposed(layer)))
    with NewTensorFile(out, shapes, {**(metadata or {}), TRANSPOSED: turned}) as file, torch.no_grad():
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            there = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()

            def take(name: str, x: Tensor, there: Tensor = there) -> None:
                rows = _tokens(name, x, there).float()
                file.add(name, rows.T @ rows)

            with _inputs(layers, take):
                model(**inputs)


def linear_layers(model: nn.Module) -> dict[str, Any]:
    """The linear layers whose weight is theirs alone, by its name."""
    owners: dict[int, set[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(f"{path}.{name}".lstrip("."))
    layers = {f"{path}.weight".lstrip("."): module for path, module in model.named_modules() if _is_linear(module)}
    return {name: layer for name, layer in layers.items() if len(owners[id(layer.weight)]) == 1}


def is_transposed(layer: nn.Module) -> bool:
    """Whether the weight is stored (in, out)."""
    return not isinstance(layer, nn.Linear)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # that of transformers; torch's is Conv1d


@contextmanager
def _inputs(layers: Mapping[str, nn.Module], take: Add) -> Iterator[None]:
    """Hands over what goes into each layer."""
    handles: list[RemovableHandle] = []
    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(lambda _, args, name=name: take(name, args[0].detach())))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tokens(name: str, x: Tensor, there: Tensor) -> Tensor:
    """(n, in): the rows of tokens that are there; all of them where the layer sees one row per text."""
    if x.shape[:-1] == there.shape:
        return x[there]
    if x.shape[:-1] == (there.numel(),):
        return x[there.flatten()]
    if x.shape[:-1] == there.shape[:1]:
        return x
    raise ValueError(
        f"the inputs of `{name}` have the shape {tuple(x.shape)}, and there are {tuple(there.shape)} tokens: which of them "
        "are padding is not known. RegMean takes decoders and encoders; merge this model by another method."
    )


def _add_square(file: NewTensorFile, name: str, g: Tensor, scale: float) -> None:
    """A gradient's squares, of a table's rows where only those are there."""
    if not g.is_sparse:
        file.add(name, g.float().square_().div_(scale))
        return
    g = g.coalesce()
    for row, values in zip(g.indices()[0].tolist(), g.values(), strict=True):
        file.add(name, values.float().square().div(scale), start=row * values.numel())


def _add_squares(loss: Loss, key: Key, add: Add) -> None:
    """Takes the score of every batch, leaf by leaf."""
    drawn, net = label_draws(loss, loss.net.params, key, 1), loss.net.whole
    for batch, labels in zip(loss.batches, drawn, strict=True):
        hand_back()  # logits leave holes in the heap, some hundred MiB
        leaves = {name: value.detach().requires_grad_() for name, value in net.params.items()}
        with _gradients(leaves, add), _sparse_tables(net._running), torch.enable_grad():
            losses, weight = loss.criterion.scored(net.apply(leaves, batch[0]), labels[0])
            (losses * weight.sqrt()).sum().backward()


@contextmanager
def _sparse_tables(module: nn.Module) -> Iterator[None]:
    """Gradients of embeddings have the rows that were looked up alone."""
    tables = [each for each in module.modules() if isinstance(each, nn.Embedding) and not each.sparse]
    for table in tables:
        table.sparse = True
    try:
        yield
    finally:
        for table in tables:
            table.sparse = False


@contextmanager
def _gradients(leaves: Mapping[str, Tensor], take: Add) -> Iterator[None]:
    """Hands over each leaf's gradient when all its uses have added to it, and lets go of it."""

    def hook(name: str) -> Callable[[Tensor], None]:
        def taken(leaf: Tensor) -> None:
            grad, leaf.grad = leaf.grad, None
            assert grad is not None
            take(name, grad)

        return taken

    handles = [leaf.register_post_accumulate_grad_hook(hook(name)) for name, leaf in leaves.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
