"""A model becomes a pure function: `functional(model).apply(params, inputs)`; the caller's model stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from threading import get_ident
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from .architectures import computes_in_float32, is_routed
from .attention_blocks import LONG
from .checks import check_choice, check_device, check_params
from .doors import Remat, Trainable, check_parameters, remat_names, running, selector, skeleton_of, unwrapped
from .forward import WRITES, Inputs, arguments, logits_of, named_errors
from .imported import is_pretrained
from .kernels import check_asked, takes_blocks
from .layout import Layout, Params
from .masks import with_float_mask
from .positions import check_positions
from .readout import Body, Head, head_of
from .skeleton import TrueDerivatives, make_skeleton
from .substitute import LeafFn, RowsFn, Substitute

Attention = Literal["auto", "blocks", "eager", "math", "keep"]


@dataclass(frozen=True, eq=False, repr=False)
class Functional:
    """A model as a pure function of its parameters. Made by `functional`.

    `params` share storage with the model they came from (no weight is copied): after more training of that model, call
    `functional` again. `buffers` are private copies. `theta` is a new flat vector at each access.
    """

    params: Params
    buffers: Params
    layout: Layout
    attention: str
    frozen: Params
    """The parameters outside theta."""
    _skeleton: nn.Module
    _output: Callable[[Any], Tensor]
    remat: tuple[str, ...] = ()
    """The modules of which graphs keep the inputs alone; see `functional`."""

    def __repr__(self) -> str:
        return (
            f"Functional({type(self._skeleton).__name__}, {self.layout.num:,} parameters in {len(self.params)} leaves)"
        )

    @property
    def theta(self) -> Float[Tensor, " p"]:
        """The trainable parameters as one new flat vector of shape (P,), in float32 at least."""
        return self.layout.ravel(self.params, torch.promote_types(self.layout.dtype, torch.float32))

    @property
    def _running(self) -> nn.Module:
        """The module that is called: a copy of the skeleton, which stays as it was made, on these buffers.

        A copy for each thread: `functional_call` sets the parameters of its module while that runs.
        """
        thread = get_ident()
        if thread not in self._copies:
            self._copies[thread] = running(self._skeleton, self.buffers, self.remat)
        return self._copies[thread]

    @cached_property
    def _copies(self) -> dict[int, nn.Module]:
        return {}

    @cached_property
    def _dtypes(self) -> dict[str, torch.dtype]:
        """The dtype that each parameter is used in, frozen ones included."""
        return {name: param.dtype for name, param in self._skeleton.named_parameters()}

    @property
    def unit_roundoff(self) -> float:
        """The relative error of one rounding: half the spacing of the coarsest dtype that the model computes in.

        That of float32 at best for a Hugging Face model that takes norms or softmax in float32 whatever its dtype.
        """
        dtypes = {leaf.dtype for leaf in self.layout.leaves}
        if is_pretrained(self._skeleton) and computes_in_float32(self._skeleton.config):
            dtypes.add(torch.float32)
        return max(torch.finfo(dtype).eps for dtype in dtypes) / 2

    @property
    def whole(self) -> Functional:
        """The same function with all that it computes within reach of modes and hooks: nothing is rematerialised."""
        return replace(self, remat=()) if self.remat else self

    @property
    def config(self) -> Any:
        """The configuration of a Hugging Face model; None of another."""
        return self._skeleton.config if is_pretrained(self._skeleton) else None

    @property
    def routed(self) -> bool:
        """Is this known to be a mixture of experts? Then derivatives are those within the routing at theta.

        Which experts a token is sent to is piecewise constant in the parameters: the loss jumps where that changes, and no
        derivative sees it. `routing_changes` counts how often a step does so.
        """
        return self.config is not None and is_routed(self.config)

    @property
    def device(self) -> torch.device:
        return next(iter(self.params.values())).device

    def apply(self, params: Params, inputs: Inputs) -> Tensor:
        """The model's output at these parameters: logits, never a loss. Differentiable, mappable.

        The caller's model is never written to. A forward pass that writes to a buffer writes to the private copy.
        """
        return self._output(self._call(self._running, "", self._values(params), inputs))

    @cached_property
    def head(self) -> Head | None:
        """The names of the last linear layer's parameters, where the output is known to be that layer and nothing else.

        Then `apply(params, inputs)` is `readout(params, hidden(params, inputs))`, and the logits of a large vocabulary
        can be made a few tokens at a time. None for other models: their output exists as a whole only.
        """
        return head_of(self._skeleton, self._output)

    def hidden(self, params: Params, inputs: Inputs) -> Tensor:
        """What the last linear layer reads; for models with a `head`."""
        self._check_head()
        return self._call(Body(self._running), "whole.", self._values(params), inputs)

    def readout(self, params: Params, hidden: Tensor) -> Tensor:
        """The output from what the last linear layer reads; for models with a `head`."""
        return F.linear(hidden, *self.head_values(params))

    def head_values(self, params: Params) -> tuple[Tensor, Tensor | None]:
        """Weight (V, D) and bias (V,) or None of the last linear layer."""
        head = self._check_head()
        values = {**params, **self.frozen}

        def value(name: str) -> Tensor:
            return values[name].to(self._dtypes[name])

        return value(head.weight), None if head.bias is None else value(head.bias)

    def _check_head(self) -> Head:
        if self.head is None:
            raise ValueError(
                f"body and head of {type(self._skeleton).__name__} are not known apart: its output exists as a whole only."
            )
        return self.head

    def _values(self, params: Params) -> Params:
        check_params(params, self.layout.shapes, "params")
        return {name: value.to(self._dtypes[name]) for name, value in {**params, **self.frozen}.items()}

    def _call(self, module: nn.Module, prefix: str, values: Params, inputs: Inputs) -> Any:
        args, kwargs = arguments(self.prepare(inputs))
        replacing = {f"{prefix}{name}": value for name, value in {**values, **self.buffers}.items()}
        true = nullcontext() if self.attention == "keep" else TrueDerivatives()
        with self._named(inputs), true:
            out = functional_call(module, replacing, args, kwargs)
        for name, buffer in self.buffers.items():
            if replacing[f"{prefix}{name}"] is not buffer:  # functional_call writes back what the module has afterwards
                raise ValueError(
                    f"the forward pass assigns the buffer `{name}` anew, and is no function of theta. {WRITES}"
                )
        return out

    def _named(self, inputs: Inputs) -> AbstractContextManager[None]:
        return named_errors(inputs, set(self._dtypes.values()))

    def apply_leaves(self, leaf: LeafFn, inputs: Inputs, rows: RowsFn | None = None) -> Tensor:
        """The output with each parameter replaced by `leaf(name, value)` at the moment it is used.

        No second set of weights exists at any time: the memory is that of the largest leaf. A tied parameter is made
        once per call. Bit for bit equal to `apply` with a dict of the same values.

        rows: the same some rows at a time, `RowsFn`. Large matrices (`substitute.LARGE`) that a linear layer or an embedding
        uses are then made so, once for each use, and never exist as a whole; the output is equal to rounding.

        Raises ValueError where a parameter belongs to a scripted module, which takes no other value in its place.
        """
        args, kwargs = arguments(self.prepare(inputs))
        fused = self.attention == "keep"
        substitute = Substitute(self._running, self.params, self.frozen, self._dtypes, leaf, rows, fused=fused)
        with self._named(inputs), substitute:
            return self._output(self._running(*args, **kwargs))

    def in_dtype(self, dtype: torch.dtype) -> Functional:
        """The same function computed in another dtype; see `functional`. `params` are the same tensors."""
        skeleton = make_skeleton(self._skeleton, self.attention, dtype)
        layout = replace(self.layout, leaves=tuple(leaf._replace(dtype=dtype) for leaf in self.layout.leaves))
        buffers = {name: self.buffers[name].to(buffer.dtype) for name, buffer in skeleton.named_buffers()}
        return replace(self, layout=layout, buffers=buffers, _skeleton=skeleton)

    def with_buffers(self, buffers: Params) -> Functional:
        """The same function with copies of these buffers, of the shapes that they have; those not named stay.

        For parameters whose running statistics (BatchNorm) are not those of this net: `net.with_buffers(other.buffers)`.
        """
        check_params({**self.buffers, **buffers}, {name: tuple(x.shape) for name, x in self.buffers.items()}, "buffers")
        for name, value in buffers.items():
            check_device(f"`buffers[{name!r}]`", value.device, "the model", self.device)
        copies = {name: value.detach().to(self.buffers[name].dtype, copy=True) for name, value in buffers.items()}
        return replace(self, buffers={**self.buffers, **copies})

    def only(self, names: Collection[str], params: Params) -> Functional:
        """The same function of some of the parameters, the others constants at `params`."""
        check_params(params, self.layout.shapes, "params")
        if unknown := sorted(set(names) - set(self.layout.names)):
            raise ValueError(f"`names` holds parameters that are not among `net.layout.names`: {unknown[:3]}.")
        leaves, offset = [], 0
        for leaf in self.layout.leaves:
            if leaf.name in names:
                leaves.append(leaf._replace(offset=offset))
                offset += leaf.numel
        return replace(
            self,
            params={leaf.name: params[leaf.name] for leaf in leaves},
            layout=replace(self.layout, leaves=tuple(leaves)),
            frozen={**self.frozen, **{name: value for name, value in params.items() if name not in names}},
        )

    def prepare(self, inputs: Inputs) -> Inputs:
        """The inputs as the transforms need them: a Hugging Face model's attention mask made float and 4-D.

        Idempotent. Boolean masks are added, not applied, by eager attention, and the 2-D ones are inspected by value
        on the way, which `vmap` refuses.
        """
        if is_pretrained(self._skeleton):
            check_positions(self._skeleton, inputs)
            check_asked(inputs, self.attention)
        if is_pretrained(self._skeleton) and self.attention != "keep" and isinstance(inputs, Mapping):
            above = {"blocks": 0, "auto": LONG}.get(self.attention)
            return with_float_mask(self._skeleton, inputs, brief_above=above)
        return inputs


def functional(
    model: nn.Module,
    *,
    attention: Attention = "auto",
    output: Literal["logits"] | Callable[[Any], Tensor] = "logits",
    trainable: Trainable = None,
    dtype: torch.dtype | None = None,
    remat: Remat = "none",
) -> Functional:
    """The model as a pure function of `(params, inputs)`; the model itself is not touched, now or later.

    A private skeleton of the module tree is made on the meta device: no weight is copied, buffers and configuration
    are private, ties survive. The skeleton is in eval mode, whatever the model is in: no dropout, and BatchNorm uses
    its running statistics. Forward hooks are copied with the tree and run in it.

    attention: the kernel of a Hugging Face model. `eager` has the scores of all queries and keys at once; `blocks` those of
    some queries at a time, rematerialised in derivatives: the same function at a memory that is linear in the length
    (core/attention_blocks.py); `auto` is `eager` up to 1,024 tokens and `blocks` beyond, where the model can; `math` is
    torch's. With all of these, attention has derivatives of every order, and layer, batch and instance norms are computed
    from primitives, as the fused ones have wrong nested derivatives (core/skeleton.py). `keep` leaves all the model's own
    kernels, for values and first derivatives only.
    output: how the model's return value becomes a tensor; `logits` takes `.logits`, or the tensor itself.
    trainable: which parameters make up theta. None: those with `requires_grad`; "all"; names; or a predicate on
    names. The others are constants outside theta.
    dtype: compute in this one, each parameter cast where it is used, while `params` stay as they are stored: float32 for
    the exact function of bfloat16 weights, at the memory of one leaf where it is perturbed leaf by leaf. None: as stored.
    remat: `layer` keeps in the graphs of derivatives the inputs of each layer alone, which is computed again where it is
    needed (core/remat.py): deep models at the memory of one layer and some twice the time. Names of modules do so for these,
    a list of modules for its members; where the layers are not those of transformers they are needed.

    Raises ValueError where two parameters share memory without being one object, where a parameter lies on the meta
    device, or where nothing is trainable, for pruned modules and for hooks that hold a parameter; TypeError where a
    parameter is not floating-point, and for what is no Python module (a scripted one, a class, a state dict).

    >>> net = functional(nn.Linear(3, 2))
    >>> net.apply(net.params, torch.ones(5, 3)).shape
    torch.Size([5, 2])
    """
    check_choice("attention", attention, get_args(Attention))
    model = unwrapped(model)
    if attention == "auto" and not (is_pretrained(model) and takes_blocks(model)):
        attention = "eager"
    keep = selector(model, trainable)
    check_parameters(model, keep, explicit=trainable is not None)
    layout = Layout.of(model, keep, dtype)
    values = {name: param.detach() for name, param in model.named_parameters()}
    if isinstance(output, str):
        check_choice("output", output, ("logits",))
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"`dtype` must be a floating-point dtype, got {dtype}.")
    skeleton = skeleton_of(model, attention, dtype)
    return Functional(
        params={name: values[name] for name in layout.names},
        buffers=dict(skeleton.named_buffers()),
        layout=layout,
        attention=attention,
        frozen={name: value for name, value in values.items() if not keep(name)},
        _skeleton=skeleton,
        _output=logits_of if output == "logits" else output,  # type: ignore[arg-type]
        remat=remat_names(skeleton, remat),
    )
