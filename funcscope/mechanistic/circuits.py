"""What attention heads compute by their weights alone: QK and OV circuits, copying, and composition of heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_choice, check_finite_params
from ..core.layout import Params
from ..core.model import Functional
from ..core.result import Result, quantity
from .weights import HeadWeights, Weights

KINDS = ("q", "k", "v")


class HeadCircuits(Result):
    """QK and OV circuits of every head: sizes, ranks, copying, and composition with heads of earlier layers.

    Exact functions of the weights: there is no error.
    """

    qk_norm: Float[Tensor, "L H"] = quantity("norm of W_QK", per=("layer", "head"))
    ov_norm: Float[Tensor, "L H"] = quantity("norm of W_OV", per=("layer", "head"))
    qk_rank: Float[Tensor, "L H"] = quantity("effective rank of W_QK", per=("layer", "head"))
    ov_rank: Float[Tensor, "L H"] = quantity("effective rank of W_OV", per=("layer", "head"))
    copying_score: Float[Tensor, "L H"] = quantity("copying score", per=("layer", "head"))
    q_composition: Float[Tensor, "n n"] = quantity("Q-composition above random", per=("reader", "writer"))
    k_composition: Float[Tensor, "n n"] = quantity("K-composition above random", per=("reader", "writer"))
    v_composition: Float[Tensor, "n n"] = quantity("V-composition above random", per=("reader", "writer"))
    q_composition_z: Float[Tensor, "n n"] = quantity("Q-composition, z", per=("reader", "writer"), shown=False)
    k_composition_z: Float[Tensor, "n n"] = quantity("K-composition, z", per=("reader", "writer"), shown=False)
    v_composition_z: Float[Tensor, "n n"] = quantity("V-composition, z", per=("reader", "writer"), shown=False)
    random_composition: float = quantity("composition under random rotations")
    fold: bool
    centred: bool
    distance: int | None
    rotates: bool
    normed_heads: bool
    linear_head: bool

    @property
    def coords(self) -> dict[str, Sequence[Any]]:
        layers, heads = self.qk_norm.shape
        names = [f"{layer}.{head}" for layer in range(layers) for head in range(heads)]
        return {"reader": names, "writer": names, "layer": range(layers), "head": range(heads)}

    @property
    def head(self) -> str:
        layers, heads = self.qk_norm.shape
        return f"circuits of {heads} heads in each of {layers} layers"

    @property
    def notes(self) -> list[str]:
        notes = []
        if self.rotates:
            where = (
                "at distance 0, as of a token with itself" if self.distance is None else f"at distance {self.distance}"
            )
            notes.append(f"queries and keys are rotated, so that W_QK depends on their distance: it is {where}.")
        if self.normed_heads:
            notes.append(
                "queries and keys have norms of their own: W_QK is up to a positive factor for each of two tokens, and its "
                "norm means nothing across heads."
            )
        if not self.linear_head:
            notes.append("copying scores are undefined: the logits are not linear in the output of a final norm.")
        return notes


def qk_ov_circuits(
    net: Functional, params: Params, *, fold: bool = True, centred: bool = True, distance: int | None = None
) -> HeadCircuits:
    r"""Sizes, ranks, copying scores and compositions of all heads' QK and OV circuits, from the weights alone.

    For column vectors, with s the scaling of scores and R(n) the family's rotation at a distance n of query and key,

    $$W_{QK} = s\, W_Q^\top R(n)\, W_K, \qquad W_{OV} = W_O W_V, \qquad
      c = \frac{\sum_i \lambda_i}{\sum_i |\lambda_i|}, \quad \lambda = \mathrm{eig}(W_U W_{OV} W_E):$$

    norms of Frobenius, effective ranks exp H(sigma / sum sigma), and the copying score c in [-1, 1]: 1 where a token that is
    attended to raises its own logit, in every direction. The eigenvalues are those of the d x d matrix $W_V (W_E W_U) W_O$;
    no V x V matrix is made. nan where a matrix is 0, and c where the logits are not linear (BERT).

    Composition of a head with one of an earlier layer, `reader` and `writer` (layer.head),

    $$C_Q = \frac{\|W_{QK}^\top W_{OV}'\|}{\|W_{QK}\| \|W_{OV}'\|}, \quad
      C_K = \frac{\|W_{QK} W_{OV}'\|}{\|W_{QK}\| \|W_{OV}'\|}, \quad
      C_V = \frac{\|W_{OV} W_{OV}'\|}{\|W_{OV}\| \|W_{OV}'\|},$$

    less its random value $1/\sqrt D$: the root mean square of C with a random rotation between the two matrices, as they
    are, which is exact for all matrices of any spectra. `z` is $(C^2 - 1/D)$ over its exact standard deviation under these
    rotations, with P = A'A and Q = BB' of the two matrices, less their traces' part,
    $\mathrm{Var} = 2 \|\tilde P\|^2 \|\tilde Q\|^2 / ((D - 1)(D + 2) \|A\|^4 \|B\|^4)$. nan where the writer is not earlier.

    fold: with what stands between a head and the residual stream at a scale of 1: gains of the norms (and the centring of a
    layer norm) in W_Q, W_K, W_V and W_U, that of a norm behind attention in W_O. Scales are positive and of a token: they
    change neither copying nor composition of it. False: the bare matrices, as published formulas have them. centred: W_U less
    its mean row, for the copying score: no softmax sees what is added to all logits alike, before a cap. False: W_U as it
    is.
    distance: n, for families that rotate; None: 0, as of a token with itself (`notes` say so).

    Elhage et al. (2021), A mathematical framework for transformer circuits. Moments of rotations: proofs/composition.py.

    Raises ValueError for a family that is not described, and for a weight that is not finite.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> found = qk_ov_circuits(net, net.params)
    >>> found.copying_score.shape, found.k_composition.shape, found.random_composition
    (torch.Size([2, 2]), torch.Size([4, 4]), 0.5)
    """
    with torch.no_grad():
        check_finite_params(params, "circuits are")
        w = Weights(net, params)
        layers = [_circuits(w, layer, fold, distance) for layer in range(w.num_layers)]
        found: dict[str, Any] = {
            name: torch.stack([getattr(each, name) for each in layers]) for name in Circuits._fields[:4]
        }
        for kind in KINDS:
            excess, z = _composition(layers, kind)
            found |= {f"{kind}_composition": excess, f"{kind}_composition_z": z}
        copying = _copying(w, layers, fold, centred)
    return HeadCircuits(
        **found, copying_score=copying, random_composition=layers[0].k.shape[-1] ** -0.5, fold=fold, centred=centred,
        distance=distance,
        rotates=w.rotates, normed_heads=w.head_norms(0)[0] is not None, linear_head=_is_linear(w),
    )  # fmt: skip


def full_circuit(
    net: Functional,
    params: Params,
    layer: int,
    head: int,
    *,
    circuit: Literal["qk", "ov"],
    sources: Sequence[int],
    targets: Sequence[int] | None = None,
    of: Literal["tokens", "positions"] = "tokens",
    fold: bool = True,
    distance: int | None = None,
) -> Float[Tensor, "n m"]:
    r"""Chosen rows of a head's full circuit: what a source does to every target, with no V x V matrix.

    "ov": $(W_U W_{OV} W_E)[t, s]$ as row s, column t: what attending to the token s adds to the logit of t. "qk":
    $(W_E^\top W_{QK} W_E)[s, t]$: what the query of the token s gives to the key of t, without biases. Embeddings of
    positions instead of tokens with of="positions", for families that have them. Scales of norms are 1; fold, distance: as in
    `qk_ov_circuits`. targets: all of them for None.

    Raises ValueError for a head, sources or targets that are not there, and for positions that have no embedding.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> full_circuit(net, net.params, 0, 1, circuit="ov", sources=[3, 5]).shape
    torch.Size([2, 9])
    """
    check_choice("circuit", circuit, ("qk", "ov"))
    check_choice("of", of, ("tokens", "positions"))
    w = Weights(net, params)
    each = _circuits(w, layer, fold, distance)
    if not 0 <= head < len(each.q):
        raise ValueError(f"`head` must be one of 0 to {len(each.q) - 1}, got {head}.")
    table = w.embedding if of == "tokens" else w.positions
    if table is None:
        raise ValueError('`of` must be "tokens": this family has no embedding of positions.')
    _check_rows("sources", sources, len(table))
    _check_rows("targets", targets or (), len(table if circuit == "qk" else w.unembedding[0]))
    table = table.double()
    everything = slice(None) if targets is None else list(targets)
    rows = table[list(sources)]
    if circuit == "qk":
        return each.scaling * (rows @ each.q[head].T) @ (table[everything] @ each.k[head].T).T
    out = w.unembedding[0].double()[everything]
    out = w.final.folded(out) if fold else out
    return (rows @ each.v[head].T) @ (out @ each.o[head]).T


def _check_rows(name: str, rows: Sequence[int], num: int) -> None:
    if bad := [row for row in rows if not 0 <= row < num]:
        raise ValueError(f"`{name}` must be from 0 to {num - 1}, got {bad[0]}.")


class Circuits(NamedTuple):
    """Of one layer, in float64."""

    qk_norm: Float[Tensor, " H"]
    ov_norm: Float[Tensor, " H"]
    qk_rank: Float[Tensor, " H"]
    ov_rank: Float[Tensor, " H"]
    qk_fourth: Float[Tensor, "2 H"]
    """Sums of fourth powers of singular values: of W_QK, and of W_OV."""
    q: Float[Tensor, "H d D"]
    k: Float[Tensor, "H d D"]
    v: Float[Tensor, "H e D"]
    o: Float[Tensor, "H D e"]
    roots: dict[str, Tensor]
    """Triangular R with R'R = W W' for q, k, v, and W'W for o."""
    scaling: float


def _circuits(w: Weights, layer: int, fold: bool, distance: int | None) -> Circuits:
    heads = _folded(w, layer) if fold else w.heads(layer)
    q, o = heads.q.double(), heads.o.double()
    k, v = heads.rotated_k(distance).double(), heads.shared(heads.v).double()
    roots = {name: torch.linalg.qr(x.mT, mode="r").R for name, x in (("q", q), ("k", k), ("v", v), ("o", o.mT))}
    qk = torch.linalg.svdvals(heads.scaling * roots["q"] @ roots["k"].mT)
    ov = torch.linalg.svdvals(roots["o"] @ roots["v"].mT)
    fourth = torch.stack([x.pow(4).sum(-1) for x in (qk, ov)])
    norms, ranks = (qk.norm(dim=-1), ov.norm(dim=-1)), (_effective_rank(qk), _effective_rank(ov))
    return Circuits(norms[0], norms[1], ranks[0], ranks[1], fourth, q, k, v, o, roots, heads.scaling)


def _folded(w: Weights, layer: int) -> HeadWeights:
    """Matrices that read and write the residual stream, with the norms between at a scale of 1."""
    heads = w.heads(layer)
    q_norm, k_norm = w.head_norms(layer)
    if q_norm is not None and k_norm is not None:
        heads = heads._replace(q=heads.q * q_norm.gain[:, None], k=heads.k * k_norm.gain[:, None])
    if w.body.anatomy.attn_in:
        norm = w.norm(w.body.anatomy.attn_in, layer)
        heads = heads._replace(q=norm.folded(heads.q), k=norm.folded(heads.k), v=norm.folded(heads.v))
    if (behind := w.write_norms(layer)[0]) is not None:
        heads = heads._replace(o=behind.linear(heads.o.mT).mT)
    return heads


def _effective_rank(sigma: Float[Tensor, "*m n"]) -> Float[Tensor, "*m"]:
    share = sigma / sigma.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1).exp()  # type: ignore[no-any-return]


def _is_linear(w: Weights) -> bool:
    try:
        w.check_linear_head()
    except ValueError:
        return False
    return True


def _copying(w: Weights, layers: Sequence[Circuits], fold: bool, centred: bool) -> Float[Tensor, "L H"]:
    if not _is_linear(w):
        return torch.full((len(layers), len(layers[0].q)), math.nan, dtype=torch.float64)
    out = w.unembedding[0].double()
    out = out - out.mean(0) if centred else out
    between = w.embedding.double().T @ (w.final.folded(out) if fold else out)  # D x D, for all heads
    eigenvalues = torch.stack([torch.linalg.eigvals(each.v @ between @ each.o) for each in layers])
    return eigenvalues.real.sum(-1) / eigenvalues.abs().sum(-1)


def _composition(layers: Sequence[Circuits], kind: str) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n n"]]:
    """Above its random value, and in units of its standard deviation."""
    heads, size = len(layers[0].q), layers[0].q.shape[-1]
    excess = torch.full((len(layers) * heads,) * 2, math.nan, dtype=torch.float64)
    z, own = excess.clone(), 1 if kind == "v" else 0
    for later, reader in enumerate(layers):
        for earlier, writer in enumerate(layers[:later]):
            other = reader.roots[{"q": "k", "k": "q", "v": "o"}[kind]]
            between = torch.einsum("hdD,gDe->hgde", getattr(reader, kind), writer.o)
            scale = 1.0 if kind == "v" else reader.scaling
            product = scale * other[:, None] @ between @ writer.roots["v"].mT
            a, b = (reader.qk_norm, reader.ov_norm)[own], writer.ov_norm
            square = product.square().sum((-2, -1)) / (a[:, None] * b).square()
            p, q = (x / n**4 - 1 / size for x, n in ((reader.qk_fourth[own], a), (writer.qk_fourth[1], b)))
            spread = (2 * p[:, None] * q / ((size - 1) * (size + 2))).sqrt()
            at = (slice(later * heads, (later + 1) * heads), slice(earlier * heads, (earlier + 1) * heads))
            excess[at], z[at] = square.sqrt() - size**-0.5, (square - 1 / size) / spread
    return excess, z
