"""The inside of a forward pass: its sites as plain arrays, and the pass with some of them replaced.

A private copy of the module tree has hooks at every site, which do nothing but in a pass that asks for something. The
model stays as it is, and values leave by the way of function outputs: `jvp`, `vjp` and `vmap` see nothing special.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from difflib import get_close_matches
from threading import get_ident
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .anatomy import ANATOMIES, Body, body_of
from .architectures import computes_in_float32
from .doors import running
from .forward import Inputs
from .layout import Params
from .masks import with_float_mask
from .model import Functional

STREAM, HEADS, SCORES = (
    ("batch", "position", "unit"),
    ("batch", "position", "head", "unit"),
    ("batch", "head", "position", "key"),
)
AXES: dict[str, tuple[str, ...]] = {
    "tok_embed": STREAM, "pos_embed": ("position", "unit"), "resid_pre": STREAM, "attn_in": STREAM, "q": HEADS, "k": HEADS,
    "v": HEADS, "rot_q": HEADS, "rot_k": HEADS, "scores": SCORES, "pattern": SCORES, "z": HEADS, "result": HEADS,
    "attn_out": STREAM, "resid_mid": STREAM, "mlp_in": STREAM, "mlp_pre": STREAM, "mlp_post": STREAM, "mlp_out": STREAM,
    "resid_post": STREAM, "final_scale": ("batch", "position"), "final": STREAM, "logits": STREAM,
}  # fmt: skip
"""Every kind of site with its axes, in the order of a pass.

Of the whole model: `tok_embed`, `pos_embed`, `final_scale` (what the final norm divides by), `final` (its output), `logits`.
Of a layer: the residual stream before, between and behind its parts (`resid_pre`, `resid_mid`, `resid_post`), what attention
reads (`attn_in`), `q` and `k` before and `rot_q` and `rot_k` after rotation, `v`, `scores` (scaled and capped, masked to the
lowest number), `pattern`, the heads' outputs before and after the output matrix (`z`, `result`), what attention writes
(`attn_out`), what the MLP reads (`mlp_in`), its units before and after the nonlinearity (`mlp_pre`; `mlp_post`, with gate),
and what it writes (`mlp_out`).
"""
ONCE = ("tok_embed", "pos_embed", "final_scale", "final", "logits")
MADE = ("result", "final_scale")
"""Made of other sites, so that nothing reads them."""

KERNEL = "funcscope_sites"


@dataclass(frozen=True)
class Patch:
    """What stands in the place of a part of a site: of some batch rows, positions, heads or units.

    value: a tensor that can be expanded to the site, or a function of the site's value.
    """

    value: Tensor | Callable[[Tensor], Tensor]
    rows: int | Sequence[int] | None = None
    positions: int | Sequence[int] | None = None
    heads: int | Sequence[int] | None = None
    units: int | Sequence[int] | None = None

    def of(self, x: Tensor, axes: Sequence[str]) -> Tensor:
        """The site with that part replaced."""
        chosen = {"batch": self.rows, "position": self.positions, "head": self.heads, "unit": self.units}
        inside = torch.ones((1,) * x.ndim, dtype=torch.bool, device=x.device)
        for axis, places in chosen.items():
            if places is None:
                continue
            if axis not in axes:
                raise ValueError(f"the site has no {axis} to choose from: it is per {', '.join(axes)}.")
            at, size = axes.index(axis), x.shape[axes.index(axis)]
            wanted = [places] if isinstance(places, int) else list(places)
            if bad := [each for each in wanted if not -size <= each < size]:
                raise ValueError(f"there is no {axis} {bad[0]}: the site has {size}.")
            there = torch.zeros(size, dtype=torch.bool, device=x.device)
            there[wanted] = True
            inside = inside & there.view([size if i == at else 1 for i in range(x.ndim)])
        new = self.value(x) if callable(self.value) else self.value.to(x.dtype)
        return torch.where(inside, new, x)


Edit = Tensor | Callable[[Tensor], Tensor] | Patch


class Kernel(NamedTuple):
    """How a layer's scores are made of its queries and keys."""

    scaling: float
    softcap: float | None
    mask: Float[Tensor, "b #h q k"] | None


@dataclass(frozen=True, eq=False)
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
            raise KeyError(f"{name!r}{_nearest(name, self.values)}")
        return torch.stack([self.values[each] for each in layers])

    def axes(self, name: str) -> tuple[str, ...]:
        """The names of a site's axes."""
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
    return _run(net, params, inputs, {}, sites)[1]


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
    body = body_of(net._skeleton)
    if body is None:
        return [f"module:{name}" for name, _ in net._skeleton.named_modules() if name]
    rotated, a = bool(body.anatomy.query), body.anatomy
    absent = {
        "pos_embed": not a.positions, "rot_q": not rotated, "rot_k": not rotated, "final": not a.final, "attn_in": not a.attn_in,
        "final_scale": not a.final, "mlp_in": not a.mlp_in, "resid_mid": body.norm == "parallel",
    }  # fmt: skip
    there = [name for name in AXES if not absent.get(name)]
    of_layers = [f"{name}.{i}" for i in range(len(body.blocks)) for name in there if name not in ONCE]
    first = [name for name in there if name in ("tok_embed", "pos_embed")]
    return [*first, *of_layers, *(name for name in there if name in ONCE and name not in first)]


def pattern_blocks(
    query: Float[Tensor, "b q h d"], key: Float[Tensor, "b k g d"], kernel: Kernel, *, size: int = 64
) -> Iterator[tuple[slice, Float[Tensor, "b h n k"]]]:
    """Attention patterns a block of queries at a time, from what is rotated: no T x T matrix exists.

    query, key: the sites `rot_q` and `rot_k` (`q` and `k` where nothing is rotated). kernel: that of the layer, in a trace.
    """
    for start in range(0, query.shape[1], size):
        rows = slice(start, min(start + size, query.shape[1]))
        mask = None if kernel.mask is None else kernel.mask[:, :, rows]
        scores = _scores(query[:, rows].transpose(1, 2), key.transpose(1, 2), kernel._replace(mask=mask))
        yield rows, torch.softmax(scores, -1)


class _Pass:
    """What one forward pass replaces and shows."""

    def __init__(self, wanted: set[str], edits: Mapping[str, Edit]):
        self.wanted, self.edits = wanted, edits
        self.seen: dict[str, Tensor] = {}
        self.kernels: dict[int, Kernel] = {}
        self.stream: dict[int, Tensor] = {}

    def needs(self, *names: str) -> bool:
        return any(name in self.wanted or name in self.edits for name in names)

    def at(self, name: str, value: Tensor) -> Tensor:
        """The value that the pass goes on with."""
        if name in self.edits:
            value = _edited(name, value, self.edits[name])
        if name in self.wanted:
            self.seen[name] = value
        return value


_PASS: ContextVar[_Pass | None] = ContextVar("pass", default=None)


def _edited(name: str, value: Tensor, edit: Edit) -> Tensor:
    axes = AXES.get(name.partition(".")[0], ())
    if isinstance(edit, Patch):
        new = edit.of(value, axes)
    else:
        new = edit(value) if callable(edit) else edit
    if new.shape != value.shape:
        raise ValueError(f"what replaces `{name}` must have its shape {tuple(value.shape)}, got {tuple(new.shape)}.")
    return new.to(value.dtype)


def _run(
    net: Functional, params: Params, inputs: Inputs, edits: Mapping[str, Edit], sites: Iterable[str]
) -> tuple[Tensor, Trace]:
    body = body_of(net._skeleton)
    known = sites_of(net)
    names = set(_spread(sites, known, body))
    for name in edits:
        _check_known(name, known, body)
        if name.partition(".")[0] in MADE:
            raise ValueError(
                f"`{name}` is made of other sites and read by none: replace `z`, `attn_out` or `resid_post`."
            )
    one = _Pass(names, edits)
    if body is not None and isinstance(inputs, Tensor):  # the kernel takes the mask that it is given, and makes none
        inputs = {"input_ids": inputs}
    made = with_float_mask(net._skeleton, inputs) if body is not None and isinstance(inputs, Mapping) else inputs
    token = _PASS.set(one)
    try:
        out = net._output(net._call(_copy(net, edits, names), "", net._values(params), made))
    finally:
        _PASS.reset(token)
    out = one.at("logits", out)
    num = 0 if body is None else len(body.blocks)
    return out, Trace(one.seen, _real(inputs, out), one.kernels, num)


def _spread(sites: Iterable[str], known: Sequence[str], body: Body | None) -> Iterator[str]:
    """Single sites; a kind is that of all layers."""
    if isinstance(sites, str):
        raise ValueError(f"`sites` must be a list of names, got the text {sites!r}: [{sites!r}].")
    for name in sites:
        layers = [each for each in known if each.rpartition(".")[0] == name and not each.startswith("module:")]
        if not layers:
            _check_known(name, known, body)
        yield from layers or [name]


def _check_known(name: str, known: Sequence[str], body: Body | None) -> None:
    if name in known or name.startswith("module:"):
        return
    if body is None:
        raise ValueError(
            f"there is no site {name!r}: the parts of this model are not described (those of {', '.join(sorted(ANATOMIES))} "
            "are). The outputs of its modules can be seen and replaced, `module:NAME`."
        )
    raise ValueError(f"there is no site {name!r}{_nearest(name, known)}")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(known), 3)
    return (
        f": did you mean {' or '.join(map(repr, near))}?" if near else ": `sites_of(net)` names those that are there."
    )


def _real(inputs: Any, out: Tensor) -> Bool[Tensor, "b t"]:
    """Positions with a token: those that may be seen by one at least."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if isinstance(mask, Mapping):
        mask = next(iter(mask.values()))
    if mask is None:
        return torch.ones(out.shape[:2], dtype=torch.bool, device=out.device)
    return mask.bool() if mask.ndim == 2 else (mask == 0).any(-2).any(1).expand(len(out), -1)


def _copy(net: Functional, edits: Mapping[str, Edit], names: set[str]) -> nn.Module:
    """The module tree with hooks, one for each thread; with those of single modules, one for this call."""
    modules = sorted(name.removeprefix("module:") for name in {*edits, *names} if name.startswith("module:"))
    copies = net.__dict__.setdefault("_with_sites", {})
    key = (get_ident(), *modules)
    if key not in copies:
        module = running(net._skeleton, net.buffers)
        if (body := body_of(module)) is not None:
            _hook(module, body, fused=net.attention != "eager")
        for name in modules:
            try:
                part = module.get_submodule(name)
            except AttributeError:
                raise ValueError(f"there is no module {name!r}{_nearest(name, dict(module.named_modules()))}") from None
            _on_output(part, lambda one, x, name=name: one.at(f"module:{name}", x))
        copies[key] = module
    return copies[key]


Seen = Callable[[_Pass, Tensor], Tensor]


def _on_output(module: nn.Module, seen: Seen) -> None:
    def hook(_: nn.Module, __: Any, out: Any) -> Any:
        one = _PASS.get()
        if one is None:
            return None
        return (seen(one, out[0]), *out[1:]) if isinstance(out, tuple) else seen(one, out)

    module.register_forward_hook(hook)


def _on_input(module: nn.Module, seen: Callable[[_Pass, Tensor, nn.Module], Tensor]) -> None:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        one = _PASS.get()
        if one is None:
            return None
        if args:
            return (seen(one, args[0], module), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": seen(one, kwargs["hidden_states"], module)}

    module.register_forward_pre_hook(hook, with_kwargs=True)


def _hook(module: Any, body: Body, *, fused: bool) -> None:
    """Every site of the described parts."""
    from transformers import AttentionInterface  # whoever has a model of it has it imported

    AttentionInterface.register(KERNEL, _attention)
    for part in module.modules():
        if hasattr(part, "config"):
            part.config._attn_implementation = KERNEL
    a, model = body.anatomy, body.model
    for name, path in (("tok_embed", a.tokens), ("pos_embed", a.positions), ("final", a.final)):
        if path:
            _on_output(model.get_submodule(path), lambda one, x, name=name: one.at(name, x))
    if a.final:
        _on_input(model.get_submodule(a.final), _scale)
    for layer, block in enumerate(body.blocks):
        _hook_block(layer, block, body)
        attention = block.get_submodule(a.attention)
        attention._sites = layer, fused, computes_in_float32(model.config), "rot_" if a.query else ""


def _hook_block(layer: int, block: Any, body: Body) -> None:
    a = body.anatomy

    def shown(kind: str) -> Seen:
        return lambda one, x: one.at(f"{kind}.{layer}", x)

    def before(one: _Pass, x: Tensor, _: nn.Module) -> Tensor:
        one.stream[layer] = one.at(f"resid_pre.{layer}", x)
        return one.stream[layer]

    def written(one: _Pass, x: Tensor) -> Tensor:
        x = one.at(f"attn_out.{layer}", x)
        name = f"resid_mid.{layer}"
        if body.norm != "pre" or not one.needs(name):
            return x
        mid = one.stream[layer] + x
        new = one.at(name, mid)
        return x if new is mid else torch.where(new == mid, x, new - one.stream[layer])

    def heads(one: _Pass, x: Tensor, module: nn.Module) -> Tensor:
        if one.needs(f"result.{layer}"):
            one.at(f"result.{layer}", _result(x, module, body.model.config))
        return x

    _on_input(block, before)
    for kind, path in (("attn_in", a.attn_in), ("mlp_in", a.mlp_in), ("mlp_pre", a.mlp_pre), ("mlp_out", a.mlp_out)):
        if path:
            _on_output(block.get_submodule(path), shown(kind))
    _on_output(block.get_submodule(a.attn_out), written)
    _on_input(block.get_submodule(a.output), heads)
    _on_input(block.get_submodule(a.mlp_post), lambda one, x, _: one.at(f"mlp_post.{layer}", x))
    if a.mid:
        _on_output(block.get_submodule(a.mid), shown("resid_mid"))
    _on_output(block, shown("resid_post"))
    if a.query and a.query == a.key:
        _on_output(block.get_submodule(a.query), lambda one, x: _fused(one, layer, x, body.model.config))
    elif a.query:
        size = block.get_submodule(a.attention).head_dim
        for kind, path in (("q", a.query), ("k", a.key)):
            _on_output(block.get_submodule(path), lambda one, x, kind=kind: _of_heads(one, f"{kind}.{layer}", x, size))


def _of_heads(one: _Pass, name: str, x: Tensor, size: int) -> Tensor:
    return one.at(name, x.unflatten(-1, (-1, size)) if x.ndim == 3 else x).reshape(x.shape) if one.needs(name) else x


def _fused(one: _Pass, layer: int, x: Tensor, config: Any) -> Tensor:
    """Of one matrix, head by head a query, a key and a value."""
    if not one.needs(f"q.{layer}", f"k.{layer}"):
        return x
    q, k, v = x.unflatten(-1, (config.num_attention_heads, -1)).chunk(3, dim=-1)
    new = one.at(f"q.{layer}", q), one.at(f"k.{layer}", k)
    return x if new[0] is q and new[1] is k else torch.cat([*new, v], -1).flatten(-2)


def _result(z: Tensor, module: nn.Module, config: Any) -> Tensor:
    """What each head writes: its part of the output matrix on its output, without the bias, which is of no head."""
    weight = module.weight if isinstance(module, nn.Linear) else module.weight.T  # type: ignore[union-attr]
    num = config.num_attention_heads
    return torch.einsum("bthd,ohd->btho", z.unflatten(-1, (num, -1)), weight.unflatten(-1, (num, -1)))  # type: ignore[operator]


def _scale(one: _Pass, x: Tensor, module: Any) -> Tensor:
    if "final_scale" in one.wanted:
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", 0.0))
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        square = wide.var(-1, correction=0) if isinstance(module, nn.LayerNorm) else wide.square().mean(-1)
        one.at("final_scale", (square + eps).sqrt())
    return x


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    softcap: float | None = None, **_: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The kernel: that of the model's own eager attention, or the fused one where no score is asked for."""
    layer, fused, wide, rotated = module._sites
    one = _PASS.get() or _Pass(set(), {})
    mask = attention_mask
    kernel = Kernel(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, mask)
    one.kernels[layer] = kernel
    query, key = (
        one.at(f"{rotated}{kind}.{layer}", x.transpose(1, 2)).transpose(1, 2) for kind, x in (("q", query), ("k", key))
    )
    value = one.at(f"v.{layer}", value.transpose(1, 2)).transpose(1, 2)
    if fused and softcap is None and not one.needs(f"scores.{layer}", f"pattern.{layer}"):
        pattern = None
        z = nn.functional.scaled_dot_product_attention(
            query, _repeated(key, query), _repeated(value, query), attn_mask=mask, scale=kernel.scaling
        )
    else:
        scores = one.at(f"scores.{layer}", _scores(query, key, kernel))
        soft = torch.softmax(scores, -1, dtype=torch.float32 if wide and scores.dtype != torch.float64 else None)
        pattern = one.at(f"pattern.{layer}", soft.to(query.dtype))
        z = torch.matmul(pattern, _repeated(value, query))
    return one.at(f"z.{layer}", z.transpose(1, 2)), pattern


def _scores(query: Float[Tensor, "b h q d"], key: Float[Tensor, "b g k d"], kernel: Kernel) -> Float[Tensor, "b h q k"]:
    scores = torch.matmul(query, _repeated(key, query).transpose(2, 3)) * kernel.scaling
    if kernel.softcap is not None:
        scores = torch.tanh(scores / kernel.softcap) * kernel.softcap
    return scores if kernel.mask is None else scores + kernel.mask


def _repeated(x: Float[Tensor, "b g k d"], query: Tensor) -> Float[Tensor, "b h k d"]:
    """Keys and values of the heads that share them."""
    times = query.shape[1] // x.shape[1]
    return x if times == 1 else x.repeat_interleave(times, 1)
