"""Induction heads: found on random tokens that are repeated, where nothing but the text itself says what comes next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ..core.checks import check_count, check_instance
from ..core.estimate import Estimate, wide
from ..core.keys import Key, check_key, fold_in, uniform
from ..core.layout import Params
from ..core.model import Functional
from ..core.result import Result, derived, quantity
from ..core.tables import counted
from ..core.trace import Trace
from .attention import ratios
from .passes import blocks_of, not_finite, pattern_at, traced, visible_to

LONGEST_PERIOD = 50
"""Of what is chosen by itself."""
MOST_RANKED = 10
"""Heads that a table and a figure rank."""
SCORES = ("induction", "duplicate", "previous")


class InductionHeads(Result):
    """Which heads complete repeated text, and how much that helps; made by `induction_heads`."""

    induction: Float[Tensor, "l h"] = quantity(
        "attention to what followed the same token", per=("layer", "head"), stderr="induction_stderr"
    )
    induction_stderr: Float[Tensor, "l h"] = quantity("standard error of induction", per=("layer", "head"), shown=False)
    duplicate: Float[Tensor, "l h"] = quantity(
        "attention to the same token before", per=("layer", "head"), stderr="duplicate_stderr"
    )
    duplicate_stderr: Float[Tensor, "l h"] = quantity("standard error of duplicate", per=("layer", "head"), shown=False)
    previous: Float[Tensor, "l h"] = quantity(
        "attention to the previous token", per=("layer", "head"), stderr="previous_stderr"
    )
    previous_stderr: Float[Tensor, "l h"] = quantity("standard error of previous", per=("layer", "head"), shown=False)
    uniform: Float[Tensor, "s l"] = quantity("score of uniform attention", per=("score", "layer"))
    """Exact: that of every sequence alike."""
    gain: Estimate = quantity("loss on the first copy minus that on the second", unit="nats")
    """Of the tokens of a period but the first, paired over sequences."""
    loss_first: Estimate = quantity("loss on the first copy", unit="nats")
    loss_second: Estimate = quantity("loss on the second copy", unit="nats")
    period: int
    num: int
    vocab: int
    """Token ids that are drawn from."""
    bos: int | None
    key: Key

    @derived("induction above uniform attention, in standard errors", per=("layer", "head"))
    def z(self) -> Float[Tensor, "l h"]:
        return (self.induction - self.uniform[0, :, None]) / self.induction_stderr

    @derived("induction of the heads of the largest z", per="ranked head", stderr="ranked_stderr")
    def ranked(self) -> Float[Tensor, " n"]:
        return self.induction.flatten()[self._order[:MOST_RANKED]]

    @derived("standard error of ranked", per="ranked head", shown=False)
    def ranked_stderr(self) -> Float[Tensor, " n"]:
        return self.induction_stderr.flatten()[self._order[:MOST_RANKED]]

    @property
    def ranking(self) -> list[tuple[int, int]]:
        """Layers and heads, the largest z first; those without one last."""
        num_heads = self.induction.shape[1]
        return [divmod(place, num_heads) for place in self._order.tolist()]

    @property
    def _order(self) -> Int[Tensor, " n"]:
        return self.z.flatten().nan_to_num(-torch.inf, torch.inf, -torch.inf).argsort(descending=True, stable=True)

    @property
    def coords(self) -> dict[str, Sequence[Any]]:
        layers, heads = self.induction.shape
        names = [f"{layer}.{head}" for layer, head in self.ranking[:MOST_RANKED]]
        return {"score": SCORES, "layer": range(layers), "head": range(heads), "ranked head": names}

    @property
    def head(self) -> str:
        return f"induction on {counted(self.num, 'sequence')} of two copies of {self.period} random tokens"

    @property
    def notes(self) -> list[str]:
        if lost := not_finite("the loss is", self.gain.value):
            return lost
        none = self.induction.isnan().any(1).nonzero().flatten().tolist()
        where = "a period is longer than the window of layers " + ", ".join(map(str, none))
        return [f"{where}: they see no token of the first copy."] if none else []


def repeated_tokens(
    key: Key, num: int, period: int, vocab: int | Int[Tensor, " v"], bos: int | None = None
) -> Int[Tensor, "n t"]:
    """Sequences of two copies of `period` random tokens, after `bos` where one is given.

    vocab: token ids, or how many: those from 0 on. All are equally likely, and tokens are independent: one may come twice
    in a copy. Sequence i depends on the key and i alone.

    >>> import funcscope as fs
    >>> ids = repeated_tokens(fs.key(0), 2, 3, 100, bos=7)
    >>> ids.shape, bool((ids[:, 1:4] == ids[:, 4:]).all()), ids[:, 0].tolist()
    (torch.Size([2, 7]), True, [7, 7])
    """
    check_key(key)
    for name, value in (("num", num), ("period", period)):
        check_count(name, value)
    ids = torch.arange(vocab) if isinstance(vocab, int) else vocab.cpu()
    if not len(ids):
        raise ValueError("`vocab` has no token to draw from.")
    once = torch.stack([ids[_places(fold_in(key, i), period, len(ids))] for i in range(num)])
    first = once.new_full((num, 0 if bos is None else 1), bos or 0)
    return torch.cat([first, once, once], 1)


def induction_heads(
    net: Functional, params: Params, *, key: Key, num: int = 64, period: int | None = None, chunk: int = 8
) -> InductionHeads:
    r"""Induction heads: heads that look at what followed the current token the last time, on repeated random tokens.

    On two copies of P random tokens (`repeated_tokens`, after the model's BOS where its configuration names one), per head

    - `induction`: the mean over the queries q of the second copy of $A_{q,q-P+1}$: 1 for a perfect induction head where no
      token repeats within a copy; one that looks evenly at all that followed the token has 0.97 in the mean for 1,000 ids
      and P = 50, and 0.69 for 23 ids and P = 16;
    - `duplicate`: that of $A_{q,q-P}$; `previous`: the mean of $A_{q,q-1}$ over all queries that have one,

    beside what uniform attention gives, for `induction` $\tfrac1P \sum_{q=P+1}^{2P} \tfrac1{q+1} \approx \ln 2 / P$ after BOS
    (proofs/induction_baseline.py). `ranking` is by `z`, how many standard errors a head is above that: no threshold.
    `gain` is what the model makes of it: the loss on the first copy minus that on the second, token by token, without the
    first token of a period, as nothing says that a copy begins.

    A head that looks P - 1 places back whatever the text is scores the same: one that does on other periods, too, reads it.

    Standard errors are over sequences. One forward pass in all over `num` sequences, `chunk` at a time; patterns are made a
    block of queries at a time. A key that is beyond a layer's window is not counted; a layer all of whose keys are has nan.

    period: P; None: 50, or the longest that the model has positions for. Ids that the configuration names as special tokens
    are not drawn.

    Raises ValueError for a model whose attention is not described or looks both ways, and a period that is too long or
    below 2.

    Olsson et al. (2022), arXiv:2209.11895; Elhage et al. (2021), transformer-circuits.pub/2021/framework.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> config = GPT2Config(n_layer=1, n_embd=4, n_head=2, vocab_size=9, n_positions=9, bos_token_id=0, eos_token_id=0)
    >>> made = induction_heads(net := fs.functional(GPT2LMHeadModel(config)), net.params, key=fs.key(0), num=4)
    >>> made.period, made.induction.shape, made.uniform[0].round(decimals=4)                     # (1/6 + ... + 1/9) / 4
    (4, torch.Size([1, 2]), tensor([0.1364], dtype=torch.float64))
    """
    check_instance("net", net, Functional, "`functional(model)`")
    check_key(key)
    for name, value, least in (("num", num, 1), ("chunk", chunk, 1), ("period", 2 if period is None else period, 2)):
        check_count(name, value, least)
    ids, bos = vocabulary_of(net)
    period = period_of(net, period, bos is not None)
    tokens = repeated_tokens(key, num, period, ids, bos)
    with torch.no_grad():
        parts = [_of_copies(net, params, part.to(net.device), period) for part in tokens.split(chunk)]
    over = parts[0].num[:, None].expand(-1, num, -1)
    values, errors = ratios(torch.cat([part.sums for part in parts], 1), over)
    first, second = torch.cat([part.losses for part in parts], 1)
    return InductionHeads(
        values[0], errors[0], values[1], errors[1], values[2], errors[2], parts[0].uniform, Estimate.of(first - second),
        Estimate.of(first), Estimate.of(second), period, num, len(ids), bos, key,
    )  # fmt: skip


def _places(key: Key, num: int, size: int) -> Int[Tensor, " n"]:
    """Independent whole numbers below `size`, of 48 random bits each."""
    like = torch.zeros(num, dtype=torch.float64)
    unit = uniform(key, like) + uniform(fold_in(key, "below"), like) * 2.0**-24
    return (unit * size).long()


class _Copies(NamedTuple):
    """Of some sequences; in the order of `SCORES`."""

    sums: Float[Tensor, "s b l h"]
    num: Float[Tensor, "s l"]
    """Queries of one sequence: of every one alike."""
    uniform: Float[Tensor, "s l"]
    losses: Float[Tensor, "2 b"]
    """Mean losses on the first and on the second copy."""


def _of_copies(net: Functional, params: Params, tokens: Int[Tensor, "b t"], period: int) -> _Copies:
    seen = traced(net, params, {"input_ids": tokens}, "logits")
    layers = [copy_scores(seen, layer, period) for layer in range(seen.num_layers)]
    sums, num, even = (torch.stack(each, -2 if i == 0 else -1) for i, each in enumerate(zip(*layers, strict=True)))
    return _Copies(sums.cpu(), num.cpu(), even.cpu(), copy_losses(seen["logits"], tokens, period).cpu())


def copy_scores(seen: Trace, layer: int, period: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of a layer: sums over queries (s, b, h), numbers of queries (s), and means of uniform attention (s)."""
    visible, place = visible_to(seen, layer)[0], torch.arange(seen.mask.shape[1], device=seen.mask.device)
    if bool(visible.triu(1).any()):
        raise ValueError(
            "induction heads complete text from left to right, and this model's attention looks both ways."
        )
    keys = (place - torch.tensor([[period - 1], [period], [1]], device=place.device)).T
    of_second = place >= len(place) - period
    counts = torch.stack([of_second, of_second, place > 0], 1) & visible.gather(1, keys.clamp(min=0))
    total: Tensor | float = 0.0
    for rows in blocks_of(seen):
        pattern = pattern_at(seen, layer, rows)
        at = pattern.gather(3, keys[rows].clamp(min=0).expand(*pattern.shape[:2], -1, -1))
        total = total + (at * counts[rows]).sum(2, dtype=wide(at.device)).permute(2, 0, 1)
    num = counts.sum(0, dtype=wide(counts.device))
    return total, num, (counts / visible.sum(1, keepdim=True, dtype=num.dtype)).sum(0) / num  # type: ignore[return-value]


def copy_losses(logits: Float[Tensor, "b t v"], tokens: Int[Tensor, "b t"], period: int) -> Float[Tensor, "2 b"]:
    """Mean losses on the tokens of each copy but its first, of each sequence."""
    first = tokens.shape[1] - 2 * period
    of_token = F.cross_entropy(logits[:, :-1].mT.float(), tokens[:, 1:], reduction="none").to(wide(logits.device))
    return torch.stack([of_token[:, at : at + period - 1].mean(1) for at in (first, first + period)])


def vocabulary_of(net: Functional) -> tuple[Int[Tensor, " v"], int | None]:
    """Token ids that are not special, and that of BOS."""
    config = net.config
    if getattr(config, "vocab_size", None) is None:
        raise ValueError("the vocabulary is read from the configuration of a Hugging Face model: this one has none.")
    named = [value for name, value in config.to_dict().items() if name.endswith("_token_id") and value is not None]
    special = {each for value in named for each in (value if isinstance(value, (list, tuple)) else [value])}
    ids = torch.tensor([i for i in range(config.vocab_size) if i not in special])
    bos = getattr(config, "bos_token_id", None)
    return ids, bos if isinstance(bos, int) and bos < config.vocab_size else None


def period_of(net: Functional, period: int | None, after_bos: bool) -> int:
    """The period, which two copies of have positions for."""
    longest = (getattr(net.config, "max_position_embeddings", 2 * LONGEST_PERIOD + 1) - after_bos) // 2
    if longest < 2:
        raise ValueError("the model has no positions for two copies of two tokens.")
    if period is not None and period > longest:
        raise ValueError(f"`period` must be at most {longest}, for which the model has positions, got {period}.")
    return min(longest, LONGEST_PERIOD) if period is None else period
