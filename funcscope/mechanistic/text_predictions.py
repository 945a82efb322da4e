"""What every layer says of the next token of one text, and which tokens of it the prediction at its end comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_count
from ..core.layout import Params
from ..core.objective import Loss
from ..core.result import Result, internal, quantity
from ..core.trace import trace
from .integrated_gradients import token_attribution
from .passes import sequence_at, token_ids
from .weights import Weights

Names = Callable[[list[int]], list[str]]


class TextLens(Result):
    """What each layer predicts at every position of one text, exactly: there is no error; made by `lens_on_text`.

    Layer l is the residual stream before block l; the last is the model's own prediction.
    """

    probability: Float[Tensor, "l t"] = quantity(
        "probability of the most probable next token", per=("layer", "position"), shown=False
    )
    target_probability: Float[Tensor, "l t"] = quantity(
        "probability of the token that is next", per=("layer", "position"), shown=False
    )
    """nan at the last token, behind which there is none."""
    entropy: Float[Tensor, "l t"] = quantity(
        "entropy of the prediction", unit="nats", per=("layer", "position"), shown=False
    )
    predictions: list[list[str]] = internal()
    """By layer and position, the most probable token."""
    tokens: list[str] = internal()

    @property
    def coords(self) -> dict[str, Sequence[Any]]:
        layers, num = self.probability.shape
        return {"layer": range(layers), "position": range(num)}

    @property
    def head(self) -> str:
        layers, num = self.probability.shape
        return f"predictions of {layers} residual streams on a text of {num} tokens"


class TextAttribution(Result):
    """How much each token of one text adds to the prediction behind it; made by `attribution_on_text`."""

    attribution: Float[Tensor, " t"] = quantity("attribution of the token", unit="nats", per="position", shown=False)
    log_prob: float = quantity("log-probability of the prediction", unit="nats")
    baseline_log_prob: float = quantity("log-probability with the baseline in the place of every token", unit="nats")
    completeness_error: float = quantity("relative error of the sum of attributions")
    predicted: str
    num_nodes: int
    tokens: list[str] = internal()

    @property
    def coords(self) -> dict[str, Sequence[Any]]:
        return {"position": range(len(self.tokens))}

    @property
    def head(self) -> str:
        return f"what {len(self.tokens)} tokens add to the log-probability of {self.predicted!r} behind them"


def lens_on_text(
    loss: Loss,
    params: Params,
    token_names: Names = lambda ids: [*map(str, ids)],
    *,
    sequence: int = 0,
    num: int = 24,
) -> TextLens:
    r"""The table of the logit lens: what each layer holds to be the next token, at every position of one text.

    $$p_l = \mathrm{softmax}(c(W_U N(h_l))),$$

    its largest entry and that of the token that is next, its entropy in nats; see `logit_lens` for means over the data, with
    errors. Padding is left out.

    token_names: texts of token ids. sequence: which of the data, from 0 on. num: tokens from its beginning.

    Raises ValueError as `logit_lens` and `attention_on_text`.

    nostalgebraist (2020), Interpreting GPT: the logit lens.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> made = lens_on_text(fs.objective(net, [{"input_ids": torch.tensor([[1, 2, 3]])}], fs.causal_lm), net.params)
    >>> made.probability.shape, len(made.predictions[0])
    (torch.Size([3, 3]), 3)
    """
    w = Weights(loss.net, params)
    w.check_linear_head()
    check_count("num", num)
    inputs = sequence_at(loss, sequence)
    with torch.no_grad():
        seen = trace(loss.net, params, inputs, ["resid_pre.0", "resid_post"])
        at = seen.mask[0].nonzero().flatten()[:num]
        streams = [seen["resid_pre.0"], *(seen[f"resid_post.{i}"] for i in range(w.num_layers))]
        dtype = w.unembedding[0].dtype
        logs = torch.stack([torch.log_softmax(w.logits(w.final(h[0, at].to(dtype))).float(), -1) for h in streams])
    ids = token_ids(inputs)[0, at]
    best = logs.max(-1)
    after = logs[:, :-1].gather(2, ids[1:, None].expand(len(logs), -1, -1))[..., 0].exp()
    target = torch.cat([after, after.new_full((len(logs), 1), torch.nan)], 1)
    entropy = torch.special.entr(logs.exp()).sum(-1)
    predictions = [token_names(row) for row in best.indices.tolist()]
    names = token_names(ids.tolist())
    return TextLens(best.values.exp().cpu(), target.cpu(), entropy.cpu(), predictions, names)


def attribution_on_text(
    loss: Loss,
    params: Params,
    token_names: Names = lambda ids: [*map(str, ids)],
    *,
    sequence: int = 0,
    tol: float = 1e-2,
) -> TextAttribution:
    r"""How much each token of one text adds to what the model holds to be most probable behind it.

    Integrated gradients of the log-probability of that token by the embeddings, from the mean embedding of the text; they
    sum to the difference of the two log-probabilities, to `tol` times that or as `completeness_error` says. See
    `token_attribution`, which takes targets and baselines of your own.

    token_names: texts of token ids. sequence: which of the data, from 0 on.

    Raises ValueError as `token_attribution` and `attention_on_text`.

    Sundararajan, Taly, Yan (2017), arXiv:1703.01365.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> made = attribution_on_text(fs.objective(net, [{"input_ids": torch.tensor([[1, 2, 3]])}], fs.causal_lm), net.params)
    >>> made.attribution.shape, made.tokens
    (torch.Size([3]), ['1', '2', '3'])
    """
    inputs = sequence_at(loss, sequence)
    found = token_attribution(loss.net, params, inputs, tol=tol)
    attributions = found.attributions[0]
    real = ~attributions.isnan()
    ids = found.tokens[0][real]
    return TextAttribution(
        attributions[real].cpu(), float(found.output[0]), float(found.baseline_output[0]),
        float(found.completeness_error[0]), token_names([int(found.targets[0])])[0], found.num_nodes,
        token_names(ids.tolist()),
    )  # fmt: skip
