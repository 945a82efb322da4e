"""What the residual stream says of the next token before the last layer: the logit lens and the Jacobian lens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.checks import check_choice, check_count
from ..core.estimate import wide
from ..core.keys import Key, check_key
from ..core.layout import Params
from ..core.objective import Loss
from ..core.reading import Batch, Reading, one_pass, read
from ..core.result import Result, internal, quantity
from ..core.standard_errors import ratio_stderr
from ..core.tables import counted
from .jacobians import mean_jacobians
from .logit_attribution import check_labels
from .passes import not_finite
from .weights import Weights

R = TypeVar("R")
NUMBERS = ("kl", "log_prob", "rank", "agreement", "entropy")


class LogitLens(Result):
    """What the residual stream before each layer, and behind the last, predicts when it is read as the last one is.

    Layer l is the stream before block l; the last is what the model itself predicts.
    """

    kl: Float[Tensor, " l"] = quantity("divergence of the prediction", unit="nats", per="layer", stderr="kl_stderr")
    kl_stderr: Float[Tensor, " l"]
    log_prob: Float[Tensor, " l"] = quantity(
        "log-probability of the target", unit="nats", per="layer", stderr="log_prob_stderr"
    )
    log_prob_stderr: Float[Tensor, " l"]
    rank: Float[Tensor, " l"] = quantity("rank of the target", per="layer", stderr="rank_stderr")
    rank_stderr: Float[Tensor, " l"]
    agreement: Float[Tensor, " l"] = quantity("agreement of the first token", per="layer", stderr="agreement_stderr")
    agreement_stderr: Float[Tensor, " l"]
    entropy: Float[Tensor, " l"] = quantity(
        "entropy of the prediction", unit="nats", per="layer", stderr="entropy_stderr"
    )
    entropy_stderr: Float[Tensor, " l"]
    num_sequences: int = internal()

    @property
    def coords(self) -> dict[str, range]:
        return {"layer": range(len(self.kl))}

    @property
    def head(self) -> str:
        return f"predictions of the residual stream by layer, over {counted(self.num_sequences, 'sequence')}"

    @property
    def notes(self) -> list[str]:
        return not_finite("logits of a layer are", self.log_prob)


class JacobianLens(LogitLens):
    """The logit lens through the mean derivative of the last residual stream by that of each layer."""

    jacobian_norm: Float[Tensor, " l"] = quantity("norm of the mean Jacobian", per="layer")
    jacobian_error: Float[Tensor, " l"] = quantity("relative error of the mean Jacobian", per="layer")
    """The norm of its standard errors, over sequences and probes together, over its own norm."""
    method: str = ""
    num_probes: int = 0

    @property
    def notes(self) -> list[str]:
        text = "the Jacobians are means over these same sequences, and the errors of the lens take them as they are"
        if self.method == "probes":
            text += "; their sampling error (`jacobian_error`) adds to the divergences"
        return [f"{text}.", *super().notes]


@one_pass
def logit_lens(loss: Loss, params: Params, *, chunk: int = 64) -> Reading[LogitLens]:
    r"""At which layer the prediction is there: the logit lens, with errors over sequences.

    With $h_l$ the residual stream before block l, $h_L$ the last, N the final norm (and c the cap of logits, where one is),

    $$p_l = \mathrm{softmax}(c(W_U N(h_l))): \quad \mathrm{KL}(p_L \| p_l), \quad \log p_l(y), \quad
      1 + \#\{v : p_l(v) > p_l(y)\}, \quad [\arg\max p_l = \arg\max p_L], \quad H(p_l),$$

    in nats, y the target; means over scored positions by their weights. An early stream is not written in the last one's
    basis: a large divergence may be that. chunk: positions whose logits are in memory at a time.

    nostalgebraist (2020), Interpreting GPT: the logit lens.

    Raises ValueError where logits are not linear in the output of a final norm, and for targets that are no labels.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> found = logit_lens(fs.objective(net, [torch.tensor([[1, 2, 3], [4, 5, 6]])], fs.causal_lm), net.params)
    >>> len(found.kl), float(found.kl[-1]), float(found.agreement[-1])
    (3, 0.0, 1.0)
    """
    return _reading(loss, params, lambda _, h: h, chunk, lambda parts: LogitLens(**_numbers(parts)))


def jacobian_lens(
    loss: Loss,
    params: Params,
    *,
    key: Key,
    method: Literal["exact", "probes"] = "exact",
    num: int = 1,
    chunk: int = 64,
    chunk_size: int = 16,
) -> JacobianLens:
    r"""What each layer's residual stream disposes the model to say: the logit lens through the mean Jacobian.

    $$\mathrm{logits}_l = c(W_U\, N(J_l h_l)), \qquad
      J_l = \overline{\partial h_L[t] / \partial h_l[t]},$$

    the mean over scored positions t, by their weights, of the derivative at the same position; numbers as in `logit_lens`.
    J changes the basis of an early layer into that of the last. See `mean_jacobians` for `method` and `num`.

    Two passes over the data, and D (exact) or `num` products between. chunk: positions whose logits are in memory at a time;
    chunk_size: products that are made together.

    Raises ValueError as `logit_lens` does, and for models that are not causal.
    """
    check_choice("method", method, ("exact", "probes"))
    check_key(key)
    check_count("num", num)
    mean = mean_jacobians(loss, params, key=key, method=method, num=num, chunk_size=chunk_size)
    turned = [*mean.jacobians, None]

    def through(layer: int, h: Tensor) -> Tensor:
        matrix = turned[layer]
        return h if matrix is None else h @ matrix.to(h).T

    last = torch.eye(mean.jacobians.shape[-1], dtype=torch.float64).norm()
    norms = torch.cat([mean.jacobians.flatten(1).norm(dim=1).cpu(), last[None]])
    errors = torch.cat([mean.stderr_norm.cpu() / norms[:-1], torch.zeros(1, dtype=torch.float64)])
    num_probes = num if method == "probes" else 0

    def result(parts: list[_Part]) -> JacobianLens:
        numbers = _numbers(parts)
        return JacobianLens(**numbers, jacobian_norm=norms, jacobian_error=errors, method=method, num_probes=num_probes)

    return read(loss, params, {"lens": _reading(loss, params, through, chunk, result)})["lens"]


class _Part(NamedTuple):
    """Of a batch: weighted sums of `NUMBERS` and weights, per sequence."""

    sums: Float[Tensor, "numbers l b"]
    weights: Float[Tensor, " b"]


def _reading(
    loss: Loss, params: Params, through: Callable[[int, Tensor], Tensor], chunk: int, result: Callable[[list[_Part]], R]
) -> Reading[R]:
    check_count("chunk", chunk)
    w = Weights(loss.net, params)
    w.check_linear_head()

    def of_batch(batch: Batch) -> _Part:
        index, weight = check_labels(batch.targets)
        streams = [batch.seen["resid_pre.0"], *(batch.seen[f"resid_post.{i}"] for i in range(w.num_layers))]
        sums = _of_batch(w, streams, index, weight, through, chunk)
        return _Part(sums.cpu(), weight.sum(1, dtype=wide(weight.device)).cpu())

    return Reading(("resid_pre.0", "resid_post"), of_batch, result)


def _numbers(parts: list[_Part]) -> dict[str, Any]:
    """Fields of a `LogitLens`."""
    total, per = torch.cat([part.sums for part in parts], -1), torch.cat([part.weights for part in parts])
    means, errors = total.sum(-1) / per.sum(), ratio_stderr(total, per)
    made = dict(zip(NUMBERS, means, strict=True)) | {
        f"{name}_stderr": x for name, x in zip(NUMBERS, errors, strict=True)
    }
    return {**made, "num_sequences": int((per != 0).sum())}


def _of_batch(
    w: Weights,
    streams: Sequence[Float[Tensor, "b t D"]],
    index: Int[Tensor, "b t"],
    weight: Float[Tensor, "b t"],
    through: Callable[[int, Tensor], Tensor],
    chunk: int,
) -> Float[Tensor, "numbers l b"]:
    """Weighted sums per sequence, the logits of a few positions at a time."""
    sums = torch.zeros(len(NUMBERS), len(streams), len(index), dtype=wide(index.device), device=index.device)
    for at in (weight != 0).nonzero().split(chunk):
        rows, places = at.T
        target, scale = index[rows, places], weight[rows, places].to(sums)

        def logits(layer: int, rows: Tensor = rows, places: Tensor = places) -> Tensor:
            h = streams[layer][rows, places].to(w.unembedding[0].dtype)
            return w.logits(w.final(through(layer, h)))

        last = _Last.of(logits(len(streams) - 1))
        for layer in range(len(streams)):
            each = last.logits if layer == len(streams) - 1 else logits(layer)
            sums[:, layer].index_add_(1, rows, _compared(each, last, target).to(sums) * scale)
    return sums


class _Last(NamedTuple):
    """Of the model's own logits."""

    logits: Float[Tensor, "n V"]
    p: Float[Tensor, "n V"]
    best: Int[Tensor, " n"]
    entropy: Float[Tensor, " n"]

    @classmethod
    def of(cls, logits: Tensor) -> _Last:
        shares, total, best, normaliser = _shares(logits)
        p = shares / total[:, None]
        return cls(logits, p, best, normaliser - torch.linalg.vecdot(p, logits))


def _shares(logits: Float[Tensor, "n V"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """exp of the logits below the largest one, their sum, where that is, and log sum exp."""
    largest, best = logits.max(1)
    shares = (logits - largest[:, None]).exp_()
    total = shares.sum(1)
    return shares, total, best, largest + total.log()


def _compared(logits: Float[Tensor, "n V"], last: _Last, target: Int[Tensor, " n"]) -> Float[Tensor, "numbers n"]:
    """A few passes over the logits: no array of log-probabilities is made of them."""
    shares, total, best, normaliser = _shares(logits)
    known, both = normaliser.isfinite(), normaliser.isfinite() & last.entropy.isfinite()
    chosen, dot = logits.gather(1, target[:, None]), torch.linalg.vecdot
    return torch.stack([
        normaliser - dot(last.p, logits) - last.entropy,
        chosen[:, 0] - normaliser,
        torch.where(known, 1 + (logits > chosen).sum(1), torch.nan),  # nan is above nothing, and would have rank 1
        torch.where(both, (best == last.best).to(logits), torch.nan),
        normaliser - dot(shares, logits) / total,
    ])  # fmt: skip
