"""A module tree that shows and replaces what passes at its sites, in a pass that asks for it and in no other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .anatomy import Body
from .architectures import computes_in_float32
from .imported import register_attention
from .sites import Edit, edited

KERNEL = "funcscope_sites"


class Kernel(NamedTuple):
    """How a layer's scores are made of its queries and keys."""

    scaling: float
    softcap: float | None
    mask: Float[Tensor, "b #h q k"] | None


class Pass:
    """What one forward pass replaces and shows."""

    def __init__(self, wanted: set[str], edits: Mapping[str, Edit], *, headless: bool = False):
        self.wanted, self.edits, self.headless = wanted, edits, headless
        self.reached: set[str] = set()
        self.seen: dict[str, Tensor] = {}
        self.kernels: dict[int, Kernel] = {}
        self.stream: dict[int, Tensor] = {}

    def needs(self, *names: str) -> bool:
        return any(name in self.wanted or name in self.edits for name in names)

    def at(self, name: str, value: Tensor) -> Tensor:
        """The value that the pass goes on with."""
        self.reached.add(name)
        if name in self.edits:
            value = edited(name, value, self.edits[name])
        if (
            name in self.wanted
        ):  # what a module gives may be written over by what comes behind it, an activation in place
            self.seen[name] = value.clone() if name.startswith("module:") else value
        return value


PASS: ContextVar[Pass | None] = ContextVar("pass", default=None)
"""That which runs in this thread."""
Seen = Callable[[Pass, Tensor], Tensor]


def on_output(module: nn.Module, seen: Seen) -> None:
    """What a module gives, the first of several, goes through `seen`."""

    def show(_: nn.Module, __: Any, out: Any) -> Any:
        one = PASS.get()
        if one is None:
            return None
        return (seen(one, out[0]), *out[1:]) if isinstance(out, tuple) else seen(one, out)

    module.register_forward_hook(show)


def _on_input(module: nn.Module, seen: Callable[[Pass, Tensor, nn.Module], Tensor]) -> None:
    def show(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        one = PASS.get()
        if one is None:
            return None
        if args:
            return (seen(one, args[0], module), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": seen(one, kwargs["hidden_states"], module)}

    module.register_forward_pre_hook(show, with_kwargs=True)


def hook(module: Any, body: Body, *, fused: bool) -> None:
    """Every site of the described parts."""
    register_attention(KERNEL, _attention)
    for part in module.modules():
        if hasattr(part, "config"):
            part.config._attn_implementation = KERNEL
    a, model = body.anatomy, body.model
    for name, path in (("tok_embed", a.tokens), ("pos_embed", a.positions), ("final", a.final)):
        if path:
            on_output(model.get_submodule(path), lambda one, x, name=name: one.at(name, x))
    if a.final:
        _on_input(model.get_submodule(a.final), _scale)
    if isinstance(last := module.get_output_embeddings(), nn.Linear):
        _on_input(last, lambda one, x, _: x[:, :0] if one.headless else x)
    for layer, block in enumerate(body.blocks):
        _hook_block(layer, block, body)
        attention = block.get_submodule(a.attention)
        attention._sites = layer, fused, computes_in_float32(model.config), "rot_" if a.query else ""


def _hook_block(layer: int, block: Any, body: Body) -> None:
    a = body.anatomy

    def shown(kind: str) -> Seen:
        return lambda one, x: one.at(f"{kind}.{layer}", x)

    def before(one: Pass, x: Tensor, _: nn.Module) -> Tensor:
        one.stream[layer] = one.at(f"resid_pre.{layer}", x)
        return one.stream[layer]

    def written(one: Pass, x: Tensor) -> Tensor:
        x = one.at(f"attn_out.{layer}", x)
        name = f"resid_mid.{layer}"
        if body.norm != "pre" or not one.needs(name):
            return x
        mid = one.stream[layer] + x
        new = one.at(name, mid)
        return x if new is mid else x + (new - mid)  # its own value, with its derivative, changes no bit

    def heads(one: Pass, x: Tensor, module: nn.Module) -> Tensor:
        if one.needs(f"result.{layer}"):
            one.at(f"result.{layer}", _result(x, module, body.model.config))
        return x

    _on_input(block, before)
    for kind, path in (("attn_in", a.attn_in), ("mlp_in", a.mlp_in), ("mlp_pre", a.mlp_pre), ("mlp_out", a.mlp_out)):
        if path:
            on_output(block.get_submodule(path), shown(kind))
    on_output(block.get_submodule(a.attn_out), written)
    _on_input(block.get_submodule(a.output), heads)
    _on_input(block.get_submodule(a.mlp_post), lambda one, x, _: one.at(f"mlp_post.{layer}", x))
    if a.mid:
        on_output(block.get_submodule(a.mid), shown("resid_mid"))
    on_output(block, shown("resid_post"))
    if a.query and a.query == a.key:
        on_output(block.get_submodule(a.query), lambda one, x: _fused(one, layer, x, body.model.config))
    elif a.query:
        size = block.get_submodule(a.attention).head_dim
        for kind, path in (("q", a.query), ("k", a.key)):
            on_output(block.get_submodule(path), lambda one, x, kind=kind: _of_heads(one, f"{kind}.{layer}", x, size))


def _of_heads(one: Pass, name: str, x: Tensor, size: int) -> Tensor:
    return one.at(name, x.unflatten(-1, (-1, size)) if x.ndim == 3 else x).reshape(x.shape) if one.needs(name) else x


def _fused(one: Pass, layer: int, x: Tensor, config: Any) -> Tensor:
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


def _scale(one: Pass, x: Tensor, module: Any) -> Tensor:
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
    one = PASS.get() or Pass(set(), {})
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
        scores = one.at(f"scores.{layer}", scores_of(query, key, kernel))
        soft = torch.softmax(scores, -1, dtype=torch.float32 if wide else None)
        pattern = one.at(f"pattern.{layer}", soft.to(query.dtype))
        z = torch.matmul(pattern, _repeated(value, query))
    return one.at(f"z.{layer}", z.transpose(1, 2)), pattern


def scores_of(
    query: Float[Tensor, "b h q d"], key: Float[Tensor, "b g k d"], kernel: Kernel
) -> Float[Tensor, "b h q k"]:
    """Scaled, capped and masked, as the softmax takes them."""
    scores = torch.matmul(query, _repeated(key, query).transpose(2, 3)) * kernel.scaling
    if kernel.softcap is not None:
        scores = torch.tanh(scores / kernel.softcap) * kernel.softcap
    return scores if kernel.mask is None else scores + kernel.mask


def _repeated(x: Float[Tensor, "b g k d"], query: Tensor) -> Float[Tensor, "b h k d"]:
    """Keys and values of the heads that share them."""
    times = query.shape[1] // x.shape[1]
    return x if times == 1 else x.repeat_interleave(times, 1)
