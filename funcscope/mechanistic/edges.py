"""A transformer as a graph: what its parts write into the residual stream, who reads that, and passes with edges replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.anatomy import Body, body_of
from ..core.forward import Inputs
from ..core.layout import Params
from ..core.model import Functional
from ..core.trace import Edit, apply_with, trace

FUSED = {"gpt2": "attn.c_attn", "gpt_neox": "attention.query_key_value"}
"""Modules that are one matrix for queries, keys and values; others have three."""
FAMILIES = (*FUSED, "llama", "mistral", "qwen2", "qwen3")
"""Those whose residual stream is the sum of what embeddings, heads and MLPs write, read behind a norm."""
Writes = Float[Tensor, "s b t d"]
"""What every sender writes."""


class Graph(NamedTuple):
    """Senders (embedding, every head, every MLP) and receivers (every head's query, key and value, every MLP, the logits).

    Keys and values are of groups where heads share them. Biases are of no sender: no input changes them.
    """

    net: Functional
    params: Params
    body: Body
    values: Params
    """Of the base model, by the names that they have there."""
    num_heads: int
    num_groups: int

    @property
    def num_layers(self) -> int:
        return len(self.body.blocks)

    @property
    def senders(self) -> list[str]:
        heads, layers = range(self.num_heads), range(self.num_layers)
        return ["embed", *(name for i in layers for name in (*(f"a{i}.{h}" for h in heads), f"m{i}"))]

    @property
    def receivers(self) -> list[str]:
        places = [(i, kind) for i in range(self.num_layers) for kind in "qkv"]
        names = {place: [f"a{place[0]}.{h}.{place[1]}" for h in range(self.sizes[place[1]])] for place in places}
        return [
            name for i in range(self.num_layers) for name in (*(n for k in "qkv" for n in names[i, k]), f"m{i}")
        ] + ["logits"]

    @property
    def sizes(self) -> dict[str, int]:
        """Receivers of a kind in a layer."""
        return {"q": self.num_heads, "k": self.num_groups, "v": self.num_groups, "m": 1}

    def before(self, layer: int, kind: str) -> int:
        """How many senders a receiver reads."""
        behind_heads = kind == "m" and self.body.norm == "pre"
        return 1 + layer * (self.num_heads + 1) + behind_heads * self.num_heads

    def columns(self, layer: int, kind: str) -> slice:
        """Where receivers are among all."""
        sizes = self.sizes
        start = layer * sum(sizes.values()) + sum(sizes[each] for each in "qkvm"[: "qkvm".index(kind)])
        return slice(start, start + sizes[kind])

    @property
    def edges(self) -> Bool[Tensor, "s r"]:
        """Which sender lies before which receiver."""
        reads = [
            self.before(i, kind) for i in range(self.num_layers) for kind in "qkvm" for _ in range(self.sizes[kind])
        ]
        num = len(self.senders)
        return torch.arange(num)[:, None] < torch.tensor([*reads, num])


def graph_of(net: Functional, params: Params) -> Graph:
    """The graph of a model. Raises ValueError for a family whose residual stream is no such sum, or is not described."""
    body = body_of(net._skeleton)
    if body is None or body.kind not in FAMILIES:
        kind = "this model" if body is None else repr(body.kind)
        raise ValueError(
            f"the residual stream of {kind} is not known as a sum of what its parts write: edges are there for "
            f"{', '.join(FAMILIES)}. Patch its sites instead."
        )
    prefix = next(f"{name}." if name else "" for name, each in net._skeleton.named_modules() if each is body.model)
    values = {name.removeprefix(prefix): x for name, x in net._values(params).items() if name.startswith(prefix)}
    heads = body.model.config.num_attention_heads
    shared = 1 if body.kind in FUSED else body.blocks[0].get_submodule(body.anatomy.attention).num_key_value_groups
    return Graph(net, params, body, values, heads, heads // shared)


def writes_of(graph: Graph, inputs: Inputs) -> Writes:
    """What every sender writes in a pass of its own."""
    seen = trace(graph.net, graph.params, inputs, ["resid_pre.0", "z", "mlp_out"])
    parts = [seen["resid_pre.0"][None]]
    for layer in range(graph.num_layers):
        parts += [heads_write(graph, layer, seen[f"z.{layer}"]), seen[f"mlp_out.{layer}"][None]]
    return torch.cat(parts)


def heads_write(graph: Graph, layer: int, z: Float[Tensor, "b t h k"]) -> Float[Tensor, "h b t d"]:
    """Each head's part of the output matrix on its output."""
    weight = _matrix(graph, layer, graph.body.anatomy.output)[0].unflatten(-1, (graph.num_heads, -1))
    return torch.einsum("bthk,ohk->hbto", z, weight)


def pass_with_edges(
    graph: Graph,
    inputs: Inputs,
    cut: Float[Tensor, "#b s r"],
    given: Writes,
    *,
    embedding: Tensor | None = None,
    fixed: Writes | None = None,
) -> Tensor:
    r"""Logits of a pass in which receiver r reads, of sender s, (1 - cut) times what it writes plus cut times what is given.

    $$x_r \to x_r + \textstyle\sum_s c_{sr} (\text{given}_s - \text{current}_s),$$

    each receiver behind its own norm; what a sender writes is what it makes of such inputs. Nothing changes where nothing is
    cut, bit for bit. embedding: in the place of the first residual stream. fixed: in the place of given - current.
    """
    one = _Pass(graph, cut, given, embedding, fixed)
    return apply_with(graph.net, graph.params, inputs, one.edits())[0]


class _Pass:
    """What a pass with edges replaced has read and written so far."""

    def __init__(self, graph: Graph, cut: Tensor, given: Writes, embedding: Tensor | None, fixed: Writes | None):
        self.graph, self.cut, self.given, self.embedding, self.fixed = graph, cut, given, embedding, fixed
        self.streams: dict[str, Tensor] = {}
        self.writes: list[Tensor] = []

    def edits(self) -> dict[str, Edit]:
        """At every site where something is read or written."""
        graph, made = self.graph, dict[str, Edit]()
        for i in range(graph.num_layers):
            before = f"resid_pre.{i}"
            made[before] = self._shown(before) if i else self._first
            for kind in "qkv":
                read = _reader(graph, i, kind)
                made[f"{kind}.{i}"] = self._received(before, read, graph.columns(i, kind), graph.before(i, kind))
            made[f"z.{i}"] = self._sent(lambda z, i=i: heads_write(graph, i, z))  # type: ignore[misc]
            middle = f"resid_mid.{i}" if graph.body.norm == "pre" else before
            made.setdefault(middle, self._shown(middle))
            made[f"mlp_in.{i}"] = self._received(
                middle, _reader(graph, i, "m"), graph.columns(i, "m"), graph.before(i, "m")
            )
            made[f"mlp_out.{i}"] = self._sent(lambda x: x[None])
        last, num, final = f"resid_post.{graph.num_layers - 1}", self.cut.shape[-1], graph.body.anatomy.final
        made[last] = self._shown(last)
        made["final"] = self._received(last, lambda x: _norm(graph, final, x), slice(num - 1, num), len(graph.senders))
        return made

    def _shown(self, name: str) -> Edit:
        def keep(x: Tensor) -> Tensor:
            self.streams[name] = x
            return x

        return keep

    def _first(self, x: Tensor) -> Tensor:
        x = x if self.embedding is None else self.embedding
        self.streams["resid_pre.0"] = x
        self.writes.append(x[None])
        return x

    def _sent(self, write: Callable[[Tensor], Tensor]) -> Edit:
        def keep(x: Tensor) -> Tensor:
            self.writes.append(write(x))
            return x

        return keep

    def _received(self, stream: str, read: Callable[[Tensor], Tensor], columns: slice, num: int) -> Edit:
        def edit(x: Tensor) -> Tensor:
            steps = self.given[:num] - torch.cat(self.writes)[:num] if self.fixed is None else self.fixed[:num]
            old = self.streams[stream][:, :, None]
            cut = self.cut[:, :num, columns].expand(old.shape[0], -1, -1)
            new = old + torch.einsum("bsr,sbtd->btrd", cut, steps)
            return x + (read(new.contiguous()) - read(old.expand_as(new).contiguous())).view(x.shape)

        return edit


def names_of_edges(graph: Graph) -> list[str]:
    """Of every edge, in the order of `edges.nonzero()`."""
    senders, receivers = graph.senders, graph.receivers
    return [f"{senders[s]} -> {receivers[r]}" for s, r in graph.edges.nonzero().tolist()]


def _reader(graph: Graph, layer: int, kind: str) -> Callable[[Tensor], Tensor]:
    """From residual streams, one for every receiver of a kind, to what they read of it."""
    a, block = graph.body.anatomy, f"{graph.body.anatomy.blocks}.{layer}"
    if kind == "m":
        return lambda x: _norm(graph, f"{block}.{a.mlp_in}", x)
    weight, bias = _projection(graph, layer, kind)

    def read(x: Float[Tensor, "b t h d"]) -> Float[Tensor, "b t h k"]:
        normed = _norm(graph, f"{block}.{a.attn_in}", x)
        made = torch.einsum("bthd,hkd->bthk", normed, weight) + bias
        behind = {"q": a.query, "k": a.key}.get(kind, "")
        return _norm(graph, f"{block}.{behind}", made) if behind.endswith("_norm") else made

    return read


def _projection(graph: Graph, layer: int, kind: str) -> tuple[Float[Tensor, "h k d"], Float[Tensor, "h k"]]:
    """Matrix and bias of every head's queries, keys or values."""
    fused = FUSED.get(graph.body.kind)
    size = graph.sizes[kind]
    if fused is None:
        weight, bias = _matrix(graph, layer, f"self_attn.{kind}_proj")
        return weight.unflatten(0, (size, -1)), bias.unflatten(0, (size, -1))
    weight, bias = _matrix(graph, layer, fused)
    place = "qkv".index(kind)
    if graph.body.kind == "gpt2":
        return weight.chunk(3)[place].unflatten(0, (size, -1)), bias.chunk(3)[place].unflatten(0, (size, -1))
    return tuple(x.unflatten(0, (size, 3, -1))[:, place] for x in (weight, bias))  # type: ignore[return-value]


def _matrix(graph: Graph, layer: int, module: str) -> tuple[Float[Tensor, "o i"], Tensor]:
    """Weight (outputs by inputs) and bias of a linear module of a layer."""
    name = f"{graph.body.anatomy.blocks}.{layer}.{module}"
    weight = graph.values[f"{name}.weight"]
    weight = weight if isinstance(graph.body.model.get_submodule(name), nn.Linear) else weight.T
    bias = graph.values.get(f"{name}.bias")
    return weight, weight.new_zeros(len(weight)) if bias is None else bias


def _norm(graph: Graph, name: str, x: Tensor) -> Tensor:
    module, weight = graph.body.model.get_submodule(name), graph.values[f"{name}.weight"]
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, x.shape[-1:], weight, graph.values.get(f"{name}.bias"), module.eps)
    single = x.float()  # whatever the dtype, as the families do
    return weight * (single * (single.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()).to(x.dtype)
