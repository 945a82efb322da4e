"""Which parts of a transformer make a logit: sums that are exact, the norms' scales held fixed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.checks import check_choice, check_count
from ..core.estimate import Estimate, wide
from ..core.layout import Params
from ..core.model import Functional, Inputs
from ..core.objective import Loss
from ..core.reading import Batch, Reading, one_pass
from ..core.result import Result, internal, quantity
from ..core.softmax import Labels
from ..core.standard_errors import ratio_stderr
from ..core.tables import counted
from ..core.trace import Trace, trace
from .passes import attributed_ids, not_finite
from .weights import Weights


class Contributions(NamedTuple):
    """What every part adds to one logit per position."""

    embedding: Float[Tensor, "b t"]
    positions: Float[Tensor, "b t"]
    """0 where a family has no embedding of positions."""
    heads: Float[Tensor, "L h b t"]
    attention_bias: Float[Tensor, "L b t"]
    mlp: Float[Tensor, "L b t"]
    bias: Float[Tensor, "b t"]
    """Of the final norm and of the logits."""
    logit: Float[Tensor, "b t"]
    """From the output of the final norm, before a cap: what the others sum to."""

    @property
    def parts(self) -> Float[Tensor, "c b t"]:
        """All of them, one after the other."""
        single = [x[None] for x in (self.embedding, self.positions, self.bias)]
        return torch.cat([*single, self.heads.flatten(0, 1), self.attention_bias, self.mlp])


def logit_contributions(
    net: Functional,
    params: Params,
    inputs: Inputs,
    tokens: Int[Tensor, "b t"] | int,
    *,
    minus: Int[Tensor, "b t"] | int | None = None,
    centred: bool = False,
) -> Contributions:
    r"""What embeddings, every head, biases and every MLP add to the logit of a token at each position.

    The final norm is affine once its scale $\sigma$ at that position is held fixed. With the row $W_U[y]$, gain
    $\gamma$, bias $\beta$ and the logits' bias b,

    $$\mathrm{logit}_y = \sum_c \frac{c \cdot u_y}{\sigma} + \beta \cdot W_U[y] + b_y, \qquad u_y = \gamma \odot W_U[y]$$

    less its mean over D for a layer norm: exact, over all that is written to the residual stream. Norms behind attention and
    MLP (Gemma 2) are held fixed as well. Logits that are capped are attributed before the cap.

    tokens: one per position, or one for all. minus: tokens whose logits are subtracted. centred: less the mean over the
    vocabulary, which the softmax does not see; the sum is then $\mathrm{logit}_y - \overline{\mathrm{logit}}$. Padding has
    values, too: mask it.

    Elhage et al. (2021), A mathematical framework for transformer circuits. proofs/logit_attribution.py.

    Raises ValueError for a family that is not described, where logits are not linear in a final norm, for tokens that are not
    one per position, and for inputs without `input_ids` or with `token_type_ids`.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> ids = torch.tensor([[1, 2, 3]])
    >>> made = logit_contributions(net, net.params, {"input_ids": ids}, ids)
    >>> torch.allclose(made.parts.sum(0), net.apply(net.params, ids).gather(-1, ids[..., None])[..., 0], atol=1e-5)
    True
    """
    w = Weights(net, params)
    w.check_linear_head()
    ids = attributed_ids(w.body, inputs)
    tokens = _per_position("tokens", tokens, ids)
    minus = None if minus is None else _per_position("minus", minus, ids)
    return _contributions(w, trace(net, params, inputs, _sites(w)), tokens, minus, centred)


def _sites(w: Weights) -> tuple[str, ...]:
    names = "tok_embed", "z", "mlp_out", "final_scale", "final"
    return names if w.positions is None else (*names, "pos_embed")


def _contributions(
    w: Weights, seen: Trace, tokens: Int[Tensor, "b t"], minus: Int[Tensor, "b t"] | None, centred: bool
) -> Contributions:
    weight, offset = w.unembedding
    rows = weight[tokens] if minus is None else weight[tokens] - weight[minus]
    own = torch.zeros((), dtype=weight.dtype, device=weight.device)
    if offset is not None:
        own = offset[tokens] if minus is None else offset[tokens] - offset[minus]
    if centred and minus is None:
        rows, own = rows - weight.mean(0), own if offset is None else own - offset.mean()
    read = w.final.folded(rows) / seen["final_scale"][..., None]
    layers = [_of_layer(w, seen, layer, read) for layer in range(w.num_layers)]
    heads, attention_bias, mlp = (torch.stack(each) for each in zip(*layers, strict=True))
    bias = own + torch.zeros_like(read[..., 0]) if w.final.bias is None else own + rows @ w.final.bias
    embedding = (read * seen["tok_embed"]).sum(-1)
    positions = (read * seen["pos_embed"]).sum(-1) if w.positions is not None else torch.zeros_like(embedding)
    return Contributions(
        embedding, positions, heads, attention_bias, mlp, bias, (rows * seen["final"]).sum(-1) + own
    )  # fmt: skip


class LogitAttribution(Result):
    """What every part adds to the logits of the targets, on average over positions."""

    heads: Float[Tensor, "L H"] = quantity("head's part of the logit", per=("layer", "head"), stderr="heads_stderr")
    heads_stderr: Float[Tensor, "L H"]
    mlp: Float[Tensor, " L"] = quantity("MLP's part of the logit", per="layer", stderr="mlp_stderr")
    mlp_stderr: Float[Tensor, " L"]
    attention_bias: Float[Tensor, " L"] = quantity(
        "attention bias's part of the logit", per="layer", stderr="attention_bias_stderr"
    )
    attention_bias_stderr: Float[Tensor, " L"]
    embedding: Estimate = quantity("embedding's part of the logit")
    positions: Estimate = quantity("position embedding's part of the logit")
    bias: Estimate = quantity("final bias's part of the logit")
    logit: Estimate = quantity("logit of the target")
    discrepancy: float = quantity("largest relative difference of sum and logit")
    """Of all positions, over the sum of the parts' sizes: rounding."""
    at: str
    centred: bool
    capped: bool
    num_sequences: int = internal()

    @property
    def coords(self) -> dict[str, Sequence[int]]:
        return {"layer": range(len(self.heads)), "head": range(self.heads.shape[1])}

    @property
    def head(self) -> str:
        where = "the last scored position" if self.at == "last" else "scored positions"
        what = "above the vocabulary's mean, " if self.centred else ""
        return f"parts of the target's logit {what}at {where} of {counted(self.num_sequences, 'sequence')}"

    @property
    def notes(self) -> list[str]:
        capped = ["logits are capped: these are parts of what the cap is put on."] if self.capped else []
        return [*capped, *not_finite("logits are", self.logit.value)]


@one_pass
def logit_attribution(
    loss: Loss, params: Params, *, at: Literal["all", "last"] = "all", centred: bool = True
) -> Reading[LogitAttribution]:
    r"""Which heads, MLPs and embeddings raise the logits of the targets: direct logit attribution over the data.

    Parts of `logit_contributions` to the logit of each scored position's target, averaged with the weights of the loss; they
    sum to the mean logit. Standard errors are over sequences, of the weighted mean. What a part adds through later parts is
    in those: this is the direct effect.

    at: "all" scored positions, or the "last" one of each sequence. centred: of the logit less its mean over the vocabulary
    (the softmax does not see that mean); False: of the logit itself.

    Raises ValueError as `logit_contributions`, and for targets that are no labels.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> found = logit_attribution(fs.objective(net, [torch.tensor([[1, 2, 3], [4, 5, 6]])], fs.causal_lm), net.params)
    >>> found.heads.shape, found.discrepancy < 1e-5
    (torch.Size([1, 2]), True)
    """
    check_choice("at", at, ("all", "last"))
    w = Weights(loss.net, params)
    w.check_linear_head()

    def of_batch(batch: Batch) -> _Part:
        attributed_ids(w.body, batch.inputs)
        index, weight = check_labels(batch.targets)
        weight = last_only(weight) if at == "last" else weight
        made = _contributions(w, batch.seen, index, None, centred)
        parts, scored = made.parts.to(wide(weight.device)), weight != 0
        off = ((parts.sum(0) - made.logit).abs() / parts.abs().sum(0))[scored]
        every = torch.cat([made.logit[None].to(parts), parts])
        sums = torch.where(scored, every * weight, 0.0).sum(-1)
        return _Part(sums.cpu(), weight.sum(-1).to(parts).cpu(), off.max()[None].cpu() if off.numel() else off.cpu())

    return Reading(_sites(w), of_batch, lambda parts: _averaged(parts, w, at, centred))


class _Part(NamedTuple):
    """Of a batch: weighted sums of the logit and its parts, and weights, per sequence; the largest discrepancy."""

    sums: Float[Tensor, "c b"]
    weights: Float[Tensor, " b"]
    largest: Float[Tensor, " #any"]


def check_labels(targets: object) -> Labels:
    """What the metrics of this area score against. Raises ValueError for other targets."""
    if not isinstance(targets, Labels) or targets.index.ndim != 2:
        raise ValueError("the loss must score a label per position: `fs.objective(net, batches, fs.causal_lm)`.")
    return targets


def last_only(weight: Float[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """The weights of the last position of each sequence that has one."""
    later = (weight != 0).flip(1).cumsum(1).flip(1)
    return torch.where(later == 1, weight, 0.0)


def _per_position(name: str, tokens: Tensor | int, ids: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    if not isinstance(tokens, Tensor):
        check_count(name, tokens, 0)
        return torch.full_like(ids, tokens)
    if tokens.shape != ids.shape:
        raise ValueError(
            f"`{name}` must be one token per position, of shape {tuple(ids.shape)}, or an integer for all of them, got "
            f"{tuple(tokens.shape)}: one per sequence is `tokens[:, None].expand(...)`."
        )
    return tokens


def _of_layer(
    w: Weights, seen: Trace, layer: int, read: Float[Tensor, "b t D"]
) -> tuple[Float[Tensor, "h b t"], Float[Tensor, "b t"], Float[Tensor, "b t"]]:
    """Parts of heads, of the bias of attention, and of the MLP."""
    heads, z, mlp = w.heads(layer), seen[f"z.{layer}"], (read * seen[f"mlp_out.{layer}"]).sum(-1)
    own = heads.biases.get("o", torch.zeros_like(read[0, 0]))
    behind = w.write_norms(layer)[0]
    if behind is not None:
        out = torch.einsum("bthe,hDe->btD", z.to(own), heads.o) + own
        read = behind.folded(read) / behind.scale(out)[..., None]
    back = torch.einsum("btD,hDe->hbte", read, heads.o)
    return (back * z.movedim(2, 0)).sum(-1), read @ own, mlp


def _averaged(each: list[_Part], w: Weights, at: str, centred: bool) -> LogitAttribution:
    sums, weights = torch.cat([part.sums for part in each], 1), torch.cat([part.weights for part in each])
    discrepancy = float(torch.cat([part.largest for part in each]).max())  # nan where one is
    num, layers = int((weights != 0).sum()), w.num_layers
    means, errors = sums.sum(1) / weights.sum(), ratio_stderr(sums, weights)
    single = [Estimate(mean, error, num) for mean, error in zip(means[:4], errors[:4], strict=True)]
    logit, embedding, positions, bias = single
    sizes = [len(sums) - 4 - 2 * layers, layers, layers]
    (heads, own, mlp), (heads_error, own_error, mlp_error) = (x[4:].split(sizes) for x in (means, errors))
    by_layer, error_by_layer = (x.unflatten(0, (layers, -1)) for x in (heads, heads_error))
    return LogitAttribution(
        by_layer, error_by_layer, mlp, mlp_error, own, own_error, embedding, positions, bias, logit, discrepancy, at, centred,
        w.softcap is not None, num,
    )  # fmt: skip
