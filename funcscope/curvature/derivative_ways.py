"""Ways to the derivatives of a function of one vector by torch's transforms, and the functions of torch that it calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import _C, Tensor
from torch.func import grad, jvp, vjp
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ..core.directions import dot
from ..linalg.matvec import Matvec

Scalar = Callable[[Tensor], Tensor]

PRODUCTS: dict[str, Callable[[Scalar, Tensor], Matvec]] = {
    "jvp of grad": lambda f, x: lambda v: jvp(grad(f), (x,), (v,))[1],
    "vjp of grad": lambda f, x: lambda v: vjp(grad(f), x)[1](v)[0],
}
"""Of the Hessian of f at x with a vector, differentiated anew for each."""


def norm(x: Tensor) -> float:
    """The Euclidean norm."""
    return dot(x, x) ** 0.5


def slope(f: Scalar, x: Tensor, d: Tensor) -> Callable[[Tensor], Tensor]:
    """a -> the slope of f along d at x + a d, in forward mode."""
    return lambda a: jvp(lambda b: f(x + b * d), (a,), (x.new_ones(()),))[1]


def nested(f: Scalar, x: Tensor, d: Tensor) -> Tensor:
    """d'Hd at x by forward mode over forward mode."""
    return jvp(slope(f, x, d), (x.new_zeros(()),), (x.new_ones(()),))[1]


class Calls(TorchFunctionMode):
    """The functions of torch that are called: their names, and outside of transforms their arguments where asked for."""

    def __init__(self, arguments: bool = False) -> None:
        super().__init__()
        self.arguments = arguments
        self.names: list[str] = []
        self.calls: list[tuple[str, Callable, tuple, dict]] = []

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name == "custom_function_call":
            name = f"autograd.Function {args[0].__name__}"
        if name != "__get__":
            self.names.append(name)
            if self.arguments and not _C._functorch.peek_interpreter_stack():
                self.calls.append((name, func, *tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}))))
        return func(*args, **(kwargs or {}))

    @property
    def kinks(self) -> bool:
        """Is one of them smooth in pieces only?"""
        return any(name.strip("_") in KINKED for name in self.names)


KINKED = frozenset(
    {
        "abs", "adaptive_max_pool1d", "adaptive_max_pool2d", "amax", "amin", "aminmax", "argmax", "argmin", "argsort",
        "ceil", "clamp", "clamp_max", "clamp_min", "clip", "cummax", "cummin", "floor", "frac", "ge", "gt",
        "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "huber_loss", "kthvalue", "l1_loss", "le", "leaky_relu",
        "lt", "max", "max_pool1d", "max_pool2d", "max_pool3d", "maximum", "median", "min", "minimum", "mode",
        "multi_margin_loss", "nonzero", "one_hot", "prelu", "quantile", "relu", "relu6", "round", "searchsorted", "sgn",
        "sign", "smooth_l1_loss", "softshrink", "sort", "threshold", "topk", "trunc",
    }
)  # fmt: skip
"""Functions with a kink or a jump, or that choose one."""
