"""The inside of a forward pass: its sites as plain arrays, and the pass with some of them replaced.

A private copy of the module tree has hooks at every site, which do nothing but in a pass that asks for something. The
model stays as it is, and values leave by the way of function outputs: `jvp`, `vjp` and `vmap` see nothing special.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from threading import get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from . import sites as names_of
from .anatomy import body_of
from .checks import check_instance
from .doors import running
from .forward import Inputs, logits_of
from .hooks import PASS, Kernel, Pass, hook, on_output, scores_of
from .layout import Params
from .masks import tokens_there, with_float_mask
from .model import Functional
from .progress import tick
from .sites import AXES, MADE, Edit, Patch, check_known, nearest, spread

__all__ = ["AXES", "Edit", "Kernel", "Patch", "Trace", "apply_with", "pattern_blocks", "sites_of", "trace"]


@dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """What a forward pass was asked for."""

    values: dict[str, Tensor]
    """By name: `pattern.3` is that of layer 3."""
    mask: Bool[Tensor, "b t"]
    """Which positions hold a token."""
    kernels: dict[int, Kernel]
    """By layer."""
    num_layers: int

    def __getitem__(self, name: str) -> Tensor:
        """A site, or that of all layers, stacked along a first axis."""
        if name in self.values:
            return self.values[name]
        layers = [f"{name}.{i}" for i in range(self.num_layers)]
        if layers[0] not in self.values or not all(each in self.values for each in layers):
            raise KeyError(f"{name!r} was not asked for: there are {', '.join(self.values) or 'none'}.")
        return torch.stack([self.values[each] for each in layers])

    def __repr__(self) -> str:
        sizes = (f"{name} {tuple(x.shape)}" for name, x in self.values.items())
        return f"Trace({', '.join(sizes)})"

    def axes(self, name: str) -> tuple[str, ...]:
        """The names of a site's axes; none of a module's output, whose axes are not known."""
        if name.startswith("module:"):
            return ()
        kind = name.partition(".")[0]
        return AXES[kind] if name in self.values else ("layer", *AXES[kind])


def trace(net: Functional, params: Params, inputs: Inputs, sites: Iterable[str]) -> Trace:
    """One forward pass, and the sites of it that are asked for and no others.

    sites: kinds (`AXES`), which mean all layers, single layers (`pattern.3`), or `module:NAME`, the output of a module, which
    every model has. Values are those that the pass computes with; their memory is all that it takes beside its own.

    Raises ValueError for a site that the model does not have, with the nearest that it has, and for a family that is not
    described, of which modules alone can be seen.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=4, n_head=2, vocab_size=9, n_positions=8))
    >>> net = fs.functional(model)
    >>> seen = trace(net, net.params, {"input_ids": torch.tensor([[1, 2, 3]])}, ["pattern", "resid_post.1"])
    >>> seen["pattern"].shape, seen.axes("resid_post.1")
    (torch.Size([2, 1, 2, 3, 3]), ('batch', 'position', 'unit'))
    """
    return _run(net, params, inputs, {}, sites, whole=False)[1]


def apply_with(
    net: Functional, params: Params, inputs: Inputs, edits: Mapping[str, Edit], sites: Iterable[str] = ()
) -> tuple[Tensor, Trace]:
    """The output of a forward pass in which some sites are replaced, and the sites that are asked for, after that.

    edits: by site (of one layer), a tensor of its shape, a function of its value, or a `Patch` of a part of it. Everything
    behind a site sees the new value; a site's own value changes no bit. Pure and differentiable in parameters, embeddings,
    values and what functions close over; mapped by `vmap`.

    Raises ValueError as `trace` does, for a value of another shape, and for sites that are only read.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=4, n_head=2, vocab_size=9, n_positions=8))
    >>> net, tokens = fs.functional(model), {"input_ids": torch.tensor([[1, 2, 3]])}
    >>> gone, seen = apply_with(net, net.params, tokens, {"z.0": Patch(torch.zeros(()), heads=1)}, ["z.0"])
    >>> seen["z.0"][0, :, 1].abs().max()
    tensor(0.)
    """
    return _run(net, params, inputs, edits, sites)


def sites_of(net: Functional) -> list[str]:
    """All sites of a model by name, in the order of a pass; modules where its family is not described."""
    return names_of.sites_of(net._skeleton)


def pattern_blocks(
    query: Float[Tensor, "b q h d"], key: Float[Tensor, "b k g d"], kernel: Kernel, *, size: int = 64
) -> Iterator[tuple[slice, Float[Tensor, "b h n k"]]]:
    """Attention patterns a block of queries at a time, from what is rotated: no T x T matrix exists.

    query, key: the sites `rot_q` and `rot_k` (`q` and `k` where nothing is rotated). kernel: that of the layer, in a trace.
    """
    for start in range(0, query.shape[1], size):
        rows = slice(start, min(start + size, query.shape[1]))
        mask = None if kernel.mask is None else kernel.mask[:, :, rows]
        scores = scores_of(query[:, rows].transpose(1, 2), key.transpose(1, 2), kernel._replace(mask=mask))
        yield rows, torch.softmax(scores, -1)


def _run(
    net: Functional,
    params: Params,
    inputs: Inputs,
    edits: Mapping[str, Edit],
    sites: Iterable[str],
    *,
    whole: bool = True,
) -> tuple[Tensor, Trace]:
    """whole: with logits; else without them where none is asked for, the last matrix being a large part of a pass."""
    check_instance("net", net, Functional, "`functional(model)`")
    check_instance("params", params, Mapping, "`net.params`, or `net.layout.unravel(theta)`")
    body = body_of(net._skeleton)
    known = sites_of(net)
    names = set(spread(sites, known))
    for name in edits:
        check_known(name, known)
        if name.partition(".")[0] in MADE:
            raise ValueError(
                f"`{name}` is made of other sites and read by none: replace `z`, `attn_out` or `resid_post`."
            )
    headless = not whole and "logits" not in names and net._output is logits_of and body is not None
    one = Pass(names, edits, headless=headless and not any(name.startswith("module:") for name in names))
    if body is not None:  # the kernel takes the mask that it is given, and makes none
        inputs = _named(inputs)
    made = with_float_mask(net._skeleton, inputs) if isinstance(inputs, Mapping) and body is not None else inputs
    tick("forward")
    token = PASS.set(one)
    try:
        out = net._output(net._call(_copy(net, edits, names), "", net._values(params), made))
    finally:
        PASS.reset(token)
    out = one.at("logits", out)
    if lost := sorted((names | edits.keys()) - one.reached):
        raise ValueError(
            f"the pass does not come by `{lost[0]}`: a module that is not called has no output, and inputs of another kind "
            "(`inputs_embeds`) leave sites out."
        )
    num = 0 if body is None else len(body.blocks)
    size = one.stream[0] if one.headless else out
    return out, Trace(one.seen, _real(inputs, size), one.kernels, num)


def _named(inputs: Inputs) -> Mapping[str, Any]:
    """Token ids alone by their name."""
    if isinstance(inputs, Mapping):
        return inputs
    alone = inputs if isinstance(inputs, tuple) else (inputs,)
    if len(alone) != 1:
        raise ValueError(f"`inputs` must be token ids or a mapping, got a tuple of {len(alone)}: name them.")
    return {"input_ids": alone[0]}


def _real(inputs: Any, out: Tensor) -> Bool[Tensor, "b t"]:
    """Positions with a token: those that may be seen by one at least."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if mask is None:
        return torch.ones(out.shape[:2], dtype=torch.bool, device=out.device)
    return tokens_there(mask).expand(len(out), -1)


_COPIES: WeakKeyDictionary[Functional, dict[Any, tuple[tuple[str, ...], nn.Module]]] = WeakKeyDictionary()


def _copy(net: Functional, edits: Mapping[str, Edit], names: set[str]) -> nn.Module:
    """The module tree with hooks, one for each thread; with those of single modules, one for this call."""
    modules = sorted(name.removeprefix("module:") for name in {*edits, *names} if name.startswith("module:"))
    copies = _COPIES.setdefault(net, {})
    key, known = (get_ident(), bool(modules)), tuple(modules)
    if key not in copies or copies[key][0] != known:
        module = running(net._skeleton, net.buffers)
        if (body := body_of(module)) is not None:
            hook(module, body, fused=net.attention in ("math", "keep"))
        for name in modules:
            try:
                part = module.get_submodule(name)
            except AttributeError:
                raise ValueError(f"there is no module {name!r}{nearest(name, dict(module.named_modules()))}") from None
            on_output(part, lambda one, x, name=name: one.at(f"module:{name}", x))
        copies[key] = known, module
    return copies[key][1]
