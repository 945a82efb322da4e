"""Integrated gradients: what each entry of an input, or each token, adds to an output, to a stated completeness."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..core.anatomy import body_of
from ..core.checks import check_count
from ..core.estimate import wide
from ..core.forward import Inputs
from ..core.layout import Params
from ..core.model import Functional
from ..core.result import Result, derived, internal, quantity
from ..core.trace import apply_with
from .passes import attributed_ids, token_ids

Rows = Float[Tensor, " n"]


class _Complete(Result):
    """What rows of attributions say of themselves."""

    output: Rows = quantity("output", per="row")
    baseline_output: Rows = quantity("output at the baseline", per="row")
    completeness_error: Rows = quantity("error of the sum of attributions", per="row")
    """|sum of attributions - (F(x) - F(x'))|: what the quadrature and rounding leave."""
    num_nodes: int
    num_forwards: int
    """Forward passes, each of all rows; all but two with a backward pass."""
    tol: float

    @derived("whether the error is below the tolerance", per="row")
    def resolved(self) -> Bool[Tensor, " n"]:
        return self.completeness_error <= self.tol * (self.output - self.baseline_output).abs()

    @property
    def notes(self) -> tuple[str, ...]:
        num = int((~self.resolved).sum())
        if not num:
            return ()
        return (
            f"{num} of {len(self.output)} rows are not resolved: with {self.num_nodes} nodes their attributions do not add "
            f"up to the change of the output within {self.tol:g} of it. Allow more nodes, or take a baseline whose output "
            "is another one.",
        )


class IntegratedGradients(_Complete):
    """Attributions of the entries of an input; made by `integrated_gradients`."""

    attributions: Float[Tensor, "n k"] = quantity("attribution", per=("row", "entry"))
    """Entries in the order of `x.flatten(1)`."""

    @property
    def coords(self) -> dict[str, Sequence[int]]:
        return dict(zip(("row", "entry"), map(range, self.attributions.shape), strict=True))

    @property
    def head(self) -> str:
        num, entries = self.attributions.shape
        return f"integrated gradients of {entries} entries in {num} rows, {self.num_nodes} nodes"


class TokenAttribution(_Complete):
    """Attributions of tokens; made by `token_attribution`."""

    attributions: Float[Tensor, "n t"] = quantity("attribution", per=("row", "position"))
    """Sums over the units of an embedding; nan where there is no token."""
    tokens: Int[Tensor, "n t"] = internal()
    targets: Int[Tensor, " n"] = internal()
    against: Int[Tensor, " n"] | None = internal()
    baseline: str

    @property
    def coords(self) -> dict[str, Sequence[int]]:
        return dict(zip(("row", "position"), map(range, self.attributions.shape), strict=True))

    @property
    def head(self) -> str:
        what = "log-probability" if self.against is None else "difference of logits"
        return f"{what} of the next token by tokens of {len(self.tokens)} sequences, {self.num_nodes} nodes"


def integrated_gradients(
    f: Callable[[Tensor], Rows],
    x: Float[Tensor, "n *k"],
    baseline: Float[Tensor, "..."] | float = 0.0,
    *,
    tol: float = 1e-3,
    num: int = 8,
    most: int = 256,
) -> IntegratedGradients:
    r"""How much of F(x) - F(x') each entry of x adds on the straight line from the baseline x'.

    $$\mathrm{IG}_i = (x_i - x'_i) \int_0^1 \partial_i F(x' + a (x - x'))\, da, \qquad
      \textstyle\sum_i \mathrm{IG}_i = F(x) - F(x'),$$

    in the unit of F. The integral is taken by Gauss-Legendre quadrature, exact for F of degree 2 n along the line with n
    nodes; these are doubled from `num` until the sum is right to `tol` times |F(x) - F(x')| in every row, or `most` is
    reached. Both, and that the sum is what it is: proofs/integrated_gradients.py. A sum may be right where entries are
    not: their own errors cancel, so that `completeness_error` bounds none of them.

    f: one number for every row, of that row alone. x: rows of any shape. baseline: what can be expanded to x.
    F must be a scalar that matters: the mean of logits over a vocabulary is none, as softmax does not see it.
    Memory is that of one forward and backward pass, whatever the nodes. Sums in float64.

    Raises ValueError where f does not give one number per row, for a baseline of another shape, a tolerance that is not
    above 0, x that does not hold floating-point numbers, and less than one node.

    Sundararajan, Taly, Yan (2017), arXiv:1703.01365.

    >>> import torch
    >>> found = integrated_gradients(lambda x: x[:, 0] ** 2 * x[:, 1], torch.tensor([[1.0, 3.0]]))
    >>> found.attributions.round(decimals=4), bool(found.resolved.all())
    (tensor([[2., 1.]], dtype=torch.float64), True)
    """
    _check_request(tol, num, most)
    if not x.is_floating_point():
        raise ValueError(
            f"`x` must hold floating-point numbers, got {x.dtype}: take `x.float()`, or embeddings of tokens."
        )
    start = torch.as_tensor(baseline, dtype=x.dtype, device=x.device)
    try:
        start = start.expand(x.shape)
    except RuntimeError:
        raise ValueError(
            f"`baseline` must be a number or have a shape that can be expanded to {tuple(x.shape)}, got {tuple(start.shape)}."
        ) from None
    with torch.no_grad():
        end_value, start_value = (_per_row(f, each) for each in (x, start))
    step, change = (x - start).to(wide(x.device)), end_value - start_value
    slopes_at = torch.func.grad(lambda z: _per_row(f, z).sum())
    num_forwards = 2
    while True:
        found = step * _mean_slope(slopes_at, x, start, num)
        num_forwards += num
        error = (found.flatten(1).sum(1) - change).abs()
        if bool((error <= tol * change.abs()).all()) or 2 * num > most:
            return IntegratedGradients(
                end_value, start_value, error, num, num_forwards, float(tol), attributions=found.flatten(1)
            )
        num *= 2


def token_attribution(
    net: Functional,
    params: Params,
    inputs: Inputs,
    *,
    targets: Int[Tensor, " n"] | None = None,
    against: Int[Tensor, " n"] | None = None,
    baseline: Literal["zero", "mean"] | Tensor = "mean",
    tol: float = 1e-3,
    num: int = 8,
    most: int = 128,
) -> TokenAttribution:
    r"""How much each token adds to the prediction of the next token at the last position that holds one.

    F is the log-probability of `targets` there, or its logit minus that of `against`; without targets, of the token that
    the model itself finds most probable, held fixed on the way. Attributions are those of the embeddings of tokens, summed
    over their units: sum over positions = F(x) - F(x'), positions staying as they are.

    baseline: the mean embedding of the tokens in `inputs`, embeddings of 0, or a tensor that can be expanded to (sequence,
    position, unit). What is found depends on it: nothing is said about tokens, but about tokens instead of it. Where a norm
    reads nothing but the embedding (Llama), 0 is no good one: the norm's output hardly changes until just before it, and few
    nodes see that; it is not resolved then.

    Raises ValueError as `integrated_gradients` and `trace` do, for a sequence without a token, and for targets that are
    not one token per sequence; for inputs without `input_ids`, or with `token_type_ids` for models other than BERT.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=4, n_head=2, vocab_size=9, n_positions=8))
    >>> net = fs.functional(model.double())
    >>> found = token_attribution(net, net.params, {"input_ids": torch.tensor([[1, 2, 3]])})
    >>> found.attributions.shape, bool(found.resolved.all())
    (torch.Size([1, 3]), True)
    """
    body = body_of(net._skeleton)
    tokens = token_ids(inputs) if body is None else attributed_ids(body, inputs)
    with torch.no_grad():
        out, seen = apply_with(net, params, inputs, {}, ["tok_embed"])
    x, mask = seen["tok_embed"], seen.mask
    rows, last = torch.arange(len(x), device=x.device), last_positions(mask)
    targets = out[rows, last].argmax(-1) if targets is None else _checked("targets", targets, out)
    against = None if against is None else _checked("against", against, out)

    def output(embedded: Tensor) -> Tensor:
        logits = apply_with(net, params, inputs, {"tok_embed": embedded})[0][rows, last].to(wide(x.device))
        value = logits[rows, targets]
        return value - (logits.logsumexp(-1) if against is None else logits[rows, against])

    start = torch.where(mask[..., None], _baseline(baseline, x, mask), x)
    found = integrated_gradients(output, x, start, tol=tol, num=num, most=most)
    per_token = found.attributions.view(x.shape).sum(-1).masked_fill(~mask, math.nan)
    return TokenAttribution(
        found.output, found.baseline_output, found.completeness_error, found.num_nodes, found.num_forwards + 1, found.tol,
        per_token, tokens, targets, against, baseline if isinstance(baseline, str) else "given",
    )  # fmt: skip


def last_positions(mask: Bool[Tensor, "n t"]) -> Int[Tensor, " n"]:
    """The last position of each sequence that holds a token, whatever side is padded.

    Raises ValueError for a sequence without one.
    """
    if not bool(mask.any(1).all()):
        raise ValueError(f"sequence {int((~mask.any(1)).nonzero()[0])} has no token: `attention_mask` is 0 everywhere.")
    return (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)


def _mean_slope(slopes_at: Callable[[Tensor], Tensor], x: Tensor, start: Tensor, num: int) -> Tensor:
    """The mean gradient on the line, by `num` nodes."""
    at, weights = np.polynomial.legendre.leggauss(num)
    total = torch.zeros(x.shape, dtype=wide(x.device), device=x.device)
    for place, weight in zip(((at + 1) / 2).tolist(), (weights / 2).tolist(), strict=True):
        total = total + weight * slopes_at(start + place * (x - start)).to(total)
    return total


def _per_row(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    value = f(x)
    if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
        got = tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(
            f"`f` must give one number for each of the {len(x)} rows, got {got}: leave out the mean over rows."
        )
    return value.to(wide(x.device))


def _baseline(baseline: str | Tensor, x: Tensor, mask: Tensor) -> Tensor:
    if isinstance(baseline, Tensor):
        try:
            return baseline.to(x).expand(x.shape)
        except RuntimeError:
            raise ValueError(
                f"`baseline` must be expandable to embeddings of shape {tuple(x.shape)}, got {tuple(baseline.shape)}."
            ) from None
    if baseline not in ("zero", "mean"):
        raise ValueError(f"`baseline` must be 'zero', 'mean' or a tensor, got {baseline!r}.")
    return torch.zeros_like(x) if baseline == "zero" else x[mask].mean(0).expand(x.shape)


def _checked(name: str, tokens: Tensor, out: Tensor) -> Tensor:
    num, vocabulary = len(out), out.shape[-1]
    if not isinstance(tokens, Tensor) or tokens.shape != (num,) or tokens.is_floating_point():
        got = f"{tokens.dtype} of {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else f"a {type(tokens).__name__}"
        raise ValueError(f"`{name}` must hold one token for each of the {num} sequences, got {got}.")
    if bool(((tokens < 0) | (tokens >= vocabulary)).any()):
        raise ValueError(
            f"`{name}` must be tokens from 0 to {vocabulary - 1}, got {int(tokens.min())} to {int(tokens.max())}."
        )
    return tokens


def _check_request(tol: float, num: int, most: int) -> None:
    if not tol > 0:
        raise ValueError(f"`tol` must be above 0, got {tol}.")
    check_count("num", num)
    check_count("most", most, num)
