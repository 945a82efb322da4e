"""The weights of a transformer by what they do: a head's four matrices, norms to be folded, embedding and unembedding."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..core.anatomy import ANATOMIES, body_of
from ..core.layout import Params
from ..core.model import Functional

FUSED = ("c_attn", "query_key_value")
APART = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))


class Norm(NamedTuple):
    r"""A layer norm, or a root-mean-square norm: $N(x) = g \odot (x - \bar x)\, /\, s(x) + \beta$, without the mean for the
    second. With s held fixed it is affine: folded into what reads it.
    """

    gain: Float[Tensor, " D"]
    bias: Float[Tensor, " D"] | None
    eps: float
    centred: bool

    def scale(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "..."]:
        """What is divided by."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        square = x.var(-1, correction=0) if self.centred else x.square().mean(-1)
        return (square + self.eps).sqrt()

    def linear(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """The norm with a scale of 1 and without its bias."""
        return (x - x.mean(-1, keepdim=True) if self.centred else x) * self.gain

    def folded(self, rows: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """What reads the norm, as it reads the residual stream: `rows @ linear(x)` is `folded(rows) @ x`."""
        rows = rows * self.gain
        return rows - rows.mean(-1, keepdim=True) if self.centred else rows

    def __call__(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        made = self.linear(x) / self.scale(x)[..., None]
        return made if self.bias is None else made + self.bias


class HeadWeights(NamedTuple):
    r"""The matrices of a layer's attention heads, for column vectors: $q = W_Q x + b_Q$, and the head writes $W_O W_V x$.

    Query head h reads key and value head `h // (heads / kv_heads)`; `shared` repeats these.
    """

    q: Float[Tensor, "h d D"]
    k: Float[Tensor, "g d D"]
    v: Float[Tensor, "g e D"]
    o: Float[Tensor, "h D e"]
    biases: dict[str, Tensor]
    """Of those that there are: `q` (h, d), `k` and `v` (g, d), `o` (D): the last is of no head."""
    scaling: float
    """What a score is multiplied by."""
    rotation: Callable[[int], Float[Tensor, "d d"]] | None
    """R(n) of a score $q^\\top R(n) k$ of a query n positions behind its key; None where nothing is rotated."""

    def shared(self, x: Float[Tensor, "g ..."]) -> Float[Tensor, "h ..."]:
        """Of keys or values, as the heads of queries read them."""
        return x.repeat_interleave(len(self.q) // len(x), 0)

    def rotated_k(self, distance: int | None) -> Float[Tensor, "h d D"]:
        """W_K of every head of queries, turned as a query `distance` behind it meets it; None: 0, where R is the identity,
        times the square of its attention factor for what a rotation with one turns (YaRN).
        """
        k = self.shared(self.k)
        return k if self.rotation is None else self.rotation(distance or 0).to(k) @ k

    def qk(self, distance: int | None = None) -> Float[Tensor, "h D D"]:
        r"""$W_Q^\top R(n) W_K$ times the scaling; None: n = 0, as where a token meets itself."""
        return self.scaling * self.q.mT @ self.rotated_k(distance)

    def ov(self) -> Float[Tensor, "h D D"]:
        """W_O W_V."""
        return self.o @ self.shared(self.v)


class Weights:
    """The parameters of a described model by what they do; made for one set of parameters.

    Raises ValueError for a model of another family, by `what` was asked of it.
    """

    def __init__(self, net: Functional, params: Params, what: str = "attention heads"):
        body = body_of(net._skeleton)
        if body is None:
            raise ValueError(
                f"the {what} of this model are not described: those of {', '.join(sorted(ANATOMIES))} are."
            )
        self.net, self.body, self.config = net, body, body.model.config
        self._values = net._values(params)
        self._names = {id(each): name for name, each in net._skeleton.named_parameters()}

    @property
    def num_layers(self) -> int:
        return len(self.body.blocks)

    @property
    def rotates(self) -> bool:
        return hasattr(self.body.model, "rotary_emb")

    def of(self, parameter: Tensor | None) -> Tensor:
        """The value of a parameter of the skeleton, in float32 at least."""
        value = self._values[self._names[id(parameter)]]
        return value.to(torch.promote_types(value.dtype, torch.float32))

    def rows(self, module: Any) -> Float[Tensor, "out in"]:
        """The weight of a linear layer: the transpose of what a Conv1D holds."""
        weight = self.of(module.weight)
        return weight if isinstance(module, nn.Linear) else weight.T

    def norm(self, path: str, layer: int | None = None) -> Norm:
        """A norm of a block, or one of the model."""
        module = (self.body.model if layer is None else self.body.blocks[layer]).get_submodule(path)
        gain, bias = self.of(module.weight), getattr(module, "bias", None)
        if type(module).__name__.startswith("Gemma"):
            gain = 1 + gain
        eps = next(getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name))
        return Norm(gain, None if bias is None else self.of(bias), eps, isinstance(module, nn.LayerNorm))

    def write_norms(self, layer: int) -> tuple[Norm | None, Norm | None]:
        """Those behind attention and MLP, before the residual stream (Gemma 2)."""
        a = self.body.anatomy
        both = (a.attn_out, a.attention), (a.mlp_out, a.mlp_post.partition(".")[0])
        there = self.body.norm != "post"
        attn, mlp = (self.norm(out, layer) if there and out != part else None for out, part in both)
        return attn, mlp

    def head_norms(self, layer: int) -> tuple[Norm | None, Norm | None]:
        """Those of queries and keys (Qwen3)."""
        a = self.body.anatomy
        if not a.query.endswith("norm"):
            return None, None
        return self.norm(a.query, layer), self.norm(a.key, layer)

    def heads(self, layer: int) -> HeadWeights:
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"`layer` must be one of 0 to {self.num_layers - 1}, got {layer}.")
        block, num = self.body.blocks[layer], self.config.num_attention_heads
        attention = block.get_submodule(self.body.anatomy.attention)
        output = block.get_submodule(self.body.anatomy.output)
        o = self.rows(output)
        parts, biases = self._projections(attention, num)
        biases |= {} if output.bias is None else {"o": self.of(output.bias)}
        rotation = self._rotation if self.rotates else None
        q, k, v = parts
        return HeadWeights(q, k, v, o.unflatten(-1, (num, -1)).movedim(-2, 0), biases, attention.scaling, rotation)

    def _projections(self, attention: Any, num: int) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Queries, keys and values by head, and their biases."""
        modules = dict(attention.named_children())
        fused = [modules[name] for name in FUSED if name in modules]
        if fused:
            cut = _by_head if isinstance(fused[0], nn.Linear) else _in_blocks
            parts = [cut(self.rows(fused[0]), num, i) for i in range(3)]
            bias = None if fused[0].bias is None else self.of(fused[0].bias)
            return parts, {} if bias is None else {name: cut(bias, num, i) for i, name in enumerate("qkv")}
        names = next(each for each in APART if each[0] in modules)
        size = self.rows(modules[names[0]]).shape[0] // num
        three = {part: modules[name] for part, name in zip("qkv", names, strict=True)}
        biases = {part: self.of(each.bias) for part, each in three.items() if each.bias is not None}
        parts = [self.rows(each).unflatten(0, (-1, size)) for each in three.values()]
        return parts, {part: each.unflatten(0, (-1, size)) for part, each in biases.items()}

    @cached_property
    def embedding(self) -> Float[Tensor, "V D"]:
        """Rows by token, as the first layer gets them: scaled where the family does that."""
        module = self.body.model.get_submodule(self.body.anatomy.tokens)
        scale = getattr(module, "scalar_embed_scale", 1.0)
        return self.of(module.weight) * scale

    @property
    def positions(self) -> Float[Tensor, "T D"] | None:
        """Rows by position; None where the family has no such embedding."""
        path = self.body.anatomy.positions
        return self.of(self.body.model.get_submodule(path).weight) if path else None

    @property
    def final(self) -> Norm:
        """The norm before the logits. Raises ValueError where these are not linear in it."""
        self.check_linear_head()
        return self.norm(self.body.anatomy.final)

    @cached_property
    def unembedding(self) -> tuple[Float[Tensor, "V D"], Float[Tensor, " V"] | None]:
        """Rows and bias that make the logits of the final norm's output."""
        self.check_linear_head()
        module: Any = self.net._skeleton.get_output_embeddings()  # type: ignore[operator]
        return self.of(module.weight), None if module.bias is None else self.of(module.bias)

    @property
    def softcap(self) -> float | None:
        """c of logits c tanh(x / c)."""
        return getattr(self.net._skeleton.config, "final_logit_softcapping", None)

    def logits(self, normed: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """The model's logits, capped where it caps them, from what the final norm gives."""
        logits = nn.functional.linear(normed, *self.unembedding)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def check_linear_head(self) -> None:
        causal = type(self.net._skeleton).__name__.endswith(("ForCausalLM", "LMHeadModel"))
        if not causal or not self.body.anatomy.final:
            raise ValueError(
                f"the logits of {type(self.net._skeleton).__name__} are not linear in the output of a final norm: this takes "
                "a causal language model with its head."
            )

    def rotated(self, x: Float[Tensor, "*n d"], positions: Int[Tensor, "*n"]) -> Float[Tensor, "*n d"]:
        """Queries or keys as the family turns them at these positions; as they are where it does not."""
        if not self.rotates:
            return x
        rotary: Any = self.net._running.base_model.rotary_emb  # type: ignore[union-attr]
        with torch.no_grad():
            cos, sin = (each.view(*positions.shape, -1).to(x) for each in rotary(x, positions.reshape(1, -1)))
        turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        first, second = turned.chunk(2, -1)
        return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], -1)

    def _rotation(self, distance: int) -> Float[Tensor, "d d"]:
        head = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        eye = torch.eye(head, dtype=torch.float64, device=self.net.device)
        at, zero = (self.rotated(eye, torch.full((head,), n, device=eye.device)) for n in (distance, 0))
        return at @ zero.T


def head_weights(net: Functional, params: Params, layer: int) -> HeadWeights:
    r"""The query, key, value and output matrices of every attention head of a layer, for column vectors.

    W_Q (heads, d, D), W_K and W_V (key and value heads, d, D), W_O (heads, D, d), cut as the family lays them out: rows of a
    linear layer, columns of a Conv1D (GPT-2: all queries, then all keys, then all values), head by head (GPT-NeoX); with
    their biases and nothing folded. Where queries and keys are rotated, `qk` depends on the distance of query and key
    (`qk(distance)`); where they are normed by themselves (Qwen3), it is what comes before that norm, whose scale depends on
    the token. In float32 at least.

    Elhage et al. (2021), A mathematical framework for transformer circuits.

    Raises ValueError for a family that is not described, and for a layer that is not there.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> heads = head_weights(net, net.params, 0)
    >>> heads.q.shape, heads.o.shape, heads.ov().shape
    (torch.Size([2, 2, 4]), torch.Size([2, 4, 2]), torch.Size([2, 4, 4]))
    """
    return Weights(net, params).heads(layer)


def _in_blocks(x: Tensor, num: int, part: int) -> Tensor:
    """All queries, then all keys, then all values."""
    return x.chunk(3)[part].unflatten(0, (num, -1))


def _by_head(x: Tensor, num: int, part: int) -> Tensor:
    """Head by head a query, a key and a value."""
    return x.unflatten(0, (num, -1)).chunk(3, 1)[part]
