"""How large the inputs of every linear map and convolution are, from one forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..core.estimate import wide
from ..core.masks import tokens_there
from ..core.objective import Loss, Theta

_TRANSPOSES = (Tensor.T.__get__, Tensor.mT.__get__, Tensor.t, torch.t)  # type: ignore[attr-defined]
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)


class InputNorms(NamedTuple):
    """Of one weight matrix."""

    norms: Float[Tensor, "..."]
    r"""$\|X_j\|_2$ over all positions of all uses, (i); of a convolution those of every weight, in its shape."""
    dim: int
    """The dimension of the weight that counts inputs: 1 as torch stores it, 0 for a Hugging Face Conv1D."""

    def beside(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The norms in a shape that multiplies the weight."""
        return (self.norms if self.dim == 1 else self.norms[:, None]).to(weight.dtype)


@torch.no_grad()
def input_norms(loss: Loss, theta: Theta) -> dict[str, InputNorms]:
    r"""By the name of a weight matrix, the norm of each of its inputs over the positions of the data.

    $$\|X_j\|_2 = \Big(\textstyle\sum_u x_{uj}^2\Big)^{1/2},$$

    u over all uses of the matrix at all positions. Positions of padding do not count where the inputs have an attention mask
    and the map one input per position; those of encoder-decoders, which have two kinds of positions, all do. The inputs of a
    weight of a convolution are what it is multiplied by wherever its filter lies, with what is padded around. A weight that
    is used in another way is not in the result.

    Raises ValueError for a matrix that is used in both orientations.

    >>> import funcscope as fs
    >>> net = fs.functional(torch.nn.Linear(2, 1, bias=False))
    >>> loss = fs.objective(net, [(torch.tensor([[3.0, 1.0], [4.0, 0.0]]), torch.zeros(2, 1))], fs.mse)
    >>> input_norms(loss, net.theta)["weight"].norms.tolist()
    [5.0, 1.0]
    """
    theta = Loss.vector(loss, theta)
    params = {name: x.to(loss.net._dtypes[name]) for name, x in loss.params(theta).items()}
    seen = _Inputs(params)
    for inputs, _ in loss.batches:
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) and not _has_decoder(inputs) else None
        seen.there = None if mask is None else tokens_there(mask)
        with seen:
            loss.net.whole.apply(params, inputs)
    return {name: InputNorms(squares.sqrt(), seen.dims[name]) for name, squares in seen.squares.items()}


class _Inputs(TorchFunctionMode):
    """Adds up the squares of what parameters are multiplied by."""

    def __init__(self, params: Mapping[str, Tensor]):
        super().__init__()
        self.names = {id(value): (name, 1) for name, value in params.items()}
        self.views: list[Tensor] = []  # kept: an id is that of another tensor once its own is gone
        self.squares: dict[str, Tensor] = {}
        self.dims: dict[str, int] = {}
        self.there: Bool[Tensor, "b t"] | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in _TRANSPOSES and id(args[0]) in self.names and isinstance(out, Tensor):
            name, dim = self.names[id(args[0])]
            self.names[id(out)] = name, 1 - dim
            self.views.append(out)
            return out
        if func in _CONVOLUTIONS:
            self.convolve(func, args, kwargs or {})
            return out
        x, weight, stored = _factors(func, args, kwargs or {})
        if isinstance(weight, Tensor) and weight.ndim == 2 and id(weight) in self.names:
            name, dim = self.names[id(weight)]
            self.add(name, x, dim if stored == 1 else 1 - dim)
        return out

    def add(self, name: str, x: Tensor, dim: int) -> None:
        if self.dims.setdefault(name, dim) != dim:
            raise ValueError(f"`{name}` is multiplied from both sides, and has no inputs of one kind.")
        rows = x.detach().reshape(-1, x.shape[-1])
        if self.there is not None and len(rows) == self.there.numel():
            rows = rows[self.there.flatten()]
        self.include(name, rows.to(wide(rows.device)).square().sum(0))

    def convolve(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Squares of inputs by weight: the derivative in it of the sum of what it makes of them."""
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        x, weight = given["input"].detach(), given["weight"]
        if id(weight) not in self.names:
            return
        name, dim = self.names[id(weight)]
        kind = wide(x.device)
        settings = {key: value for key, value in kwargs.items() if key not in ("input", "weight", "bias")}
        with torch.enable_grad(), torch.DisableTorchFunction():  # type: ignore[no-untyped-call]
            filters = torch.zeros_like(weight, dtype=kind, requires_grad=True)
            total = func(x.to(kind).square(), filters, None, *args[3:], **settings).sum()
            (squares,) = torch.autograd.grad(total, filters)
        self.dims[name] = dim
        self.include(name, squares)

    def include(self, name: str, squares: Tensor) -> None:
        self.squares[name] = self.squares[name] + squares if name in self.squares else squares


def _has_decoder(inputs: Mapping[str, Any]) -> bool:
    return bool(inputs.keys() & {"labels", "decoder_input_ids"})


def _factors(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, int]:
    """What is multiplied, the matrix, and which of its dimensions counts inputs."""
    if func is F.linear:
        x, weight = (args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(("input", "weight")))
        return x, weight, 1
    if func is torch.addmm and len(args) == 3:
        return args[1], args[2], 0
    if func in _PRODUCTS and len(args) == 2:
        return args[0], args[1], 0
    return None, None, 0
