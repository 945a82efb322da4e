"""Which edges complete repeated text, and what is left of that without the heads that do it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.checks import check_count
from ..core.estimate import wide
from ..core.keys import Key, check_key, fold_in, uniform
from ..core.layout import Params
from ..core.model import Functional
from ..core.result import quantity
from ..core.sites import Edit, Patch
from ..core.trace import apply_with, trace
from .circuit_faithfulness import circuit_faithfulness
from .edge_attribution import EdgeAttribution, edge_attribution
from .induction import copy_losses, induction_heads, period_of, repeated_tokens, vocabulary_of

MOST_REMOVED = 8


class InductionCircuit(EdgeAttribution):
    """The circuit of induction, what it keeps, and the gain without its heads; made by `induction_circuit`."""

    through_keys: Float[Tensor, "i j"] = quantity(
        "estimated share of a head's edge to another's keys", per=("writing head", "reading head")
    )
    """nan where there is no such edge."""
    faithfulness: Float[Tensor, " k"] = quantity(
        "share kept by the circuit", per="edges kept", stderr="faithfulness_stderr"
    )
    faithfulness_stderr: Float[Tensor, " k"]
    random_faithfulness: Float[Tensor, " k"] = quantity(
        "share kept by random circuits", per="edges kept", stderr="random_faithfulness_stderr"
    )
    random_faithfulness_stderr: Float[Tensor, " k"]
    """Over draws."""
    gain_without: Float[Tensor, " r"] = quantity(
        "gain without the heads of the largest induction scores", unit="nats", per="heads removed",
        stderr="gain_without_stderr",
    )  # fmt: skip
    gain_without_stderr: Float[Tensor, " r"]
    """Over sequences."""
    gain_without_random: Float[Tensor, " r"] = quantity(
        "gain without random heads", unit="nats", per="heads removed", stderr="gain_without_random_stderr"
    )
    gain_without_random_stderr: Float[Tensor, " r"]
    """Over draws."""
    sizes: list[int]
    removed: list[int]
    ranking: list[tuple[int, int]]
    """Layers and heads, in the order in which they are removed."""
    period: int
    key: Key

    @property
    def coords(self) -> dict[str, list[str] | list[int]]:  # type: ignore[override]
        senders, receivers = _ends(self)
        own = {
            "writing head": [self.senders[i] for i in senders],
            "reading head": [self.receivers[i] for i in receivers],
        }
        return {**super().coords, **own, "edges kept": self.sizes, "heads removed": self.removed}

    @property
    def head(self) -> str:
        return f"the circuit of induction, {super().head} of {self.period} random tokens twice"


def induction_circuit(
    net: Functional,
    params: Params,
    *,
    key: Key,
    num: int = 32,
    period: int | None = None,
    num_nodes: int = 5,
    num_random: int = 4,
    chunk: int = 8,
) -> InductionCircuit:
    r"""Which edges carry induction, whether they are enough, and whether the heads with the largest scores are needed.

    Clean: P random tokens and the first half of them again. Corrupt: the same with another token before the place in the
    first copy that says what comes next, so that nothing in it matches the last token. Metric: the log-probability of that
    next token. On these `edge_attribution` (EAP-IG of `num_nodes`; without nodes it fails on models that are sure of their
    answer, where gradients vanish), `circuit_faithfulness` over powers of 2, and in `through_keys` the edges by which a
    head's output becomes another one's key: K-composition, of a previous-token head with an induction head.

    `gain_without`: the loss on the first of two whole copies minus that on the second (as in `induction_heads`), heads having
    their mean output over tokens and sequences instead of their own, from the largest induction score on; beside it,
    `num_random` orders of all heads.

    Errors are over sequences, those of random circuits and orders over draws. The circuit is chosen on the sequences that it
    is judged by. period: P; None as in `induction_heads`. chunk: circuits in a pass.

    Raises ValueError as `induction_heads` and `edge_attribution`.

    Olsson et al. (2022), arXiv:2209.11895; Hanna, Pezzelle, Belinkov (2024), arXiv:2403.17806.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> config = GPT2Config(n_layer=2, n_embd=4, n_head=2, vocab_size=9, n_positions=9, bos_token_id=0, eos_token_id=0)
    >>> net = fs.functional(GPT2LMHeadModel(config))
    >>> made = induction_circuit(net, net.params, key=fs.key(0), num=4, num_random=2)
    >>> made.through_keys.shape, made.removed, round(float(made.faithfulness[-1]), 3)
    (torch.Size([4, 4]), [0, 1, 2, 4], 1.0)
    """
    check_key(key)
    check_count("num", num, 2)
    check_count("num_random", num_random)
    ids, bos = vocabulary_of(net)
    period = period_of(net, period, bos is not None)
    tokens = repeated_tokens(key, num, period, ids, bos).to(net.device)
    clean, corrupt, target = _pair(tokens, period, ids.to(net.device), fold_in(key, "corrupt"))

    def metric(logits: Tensor) -> Tensor:
        return torch.log_softmax(logits[:, -1].to(wide(logits.device)), -1).gather(1, target[:, None])[:, 0]

    edges = edge_attribution(net, params, clean, corrupt, metric, num_nodes=num_nodes)
    kept = circuit_faithfulness(
        net, params, clean, corrupt, metric, edges, key=key, num_random=num_random, num_exact=2, chunk=chunk
    )
    heads = induction_heads(net, params, key=key, num=num, period=period)
    gains = _without(net, params, tokens, period, heads.ranking, fold_in(key, "heads"), num_random)
    senders, receivers = _ends(edges)
    through = edges.scores[senders][:, receivers]
    return InductionCircuit(
        edges.samples, edges.reference, edges.edges, edges.senders, edges.receivers, num_nodes, through,
        kept.faithfulness, kept.faithfulness_stderr, kept.random_mean, kept.random_mean_stderr, gains.value,
        gains.stderr, gains.random, gains.random_stderr, kept.sizes, gains.removed, heads.ranking, period, key,
    )  # fmt: skip


def _pair(
    tokens: Int[Tensor, "n t"], period: int, ids: Int[Tensor, " v"], key: Key
) -> tuple[Int[Tensor, "n s"], Int[Tensor, "n s"], Int[Tensor, " n"]]:
    """Clean and corrupt beginnings of two copies, and what comes next."""
    first, shown = tokens.shape[1] - 2 * period, period // 2
    clean = tokens[:, : first + period + shown]
    place = first + shown - 1
    old = torch.searchsorted(ids, clean[:, place].contiguous())
    step = 1 + (uniform(key, torch.zeros(len(tokens), dtype=torch.float64)) * (len(ids) - 1)).long()
    corrupt = clean.clone()
    corrupt[:, place] = ids[(old + step.to(old.device)) % len(ids)]
    return clean, corrupt, tokens[:, first + shown]


class _Gains(NamedTuple):
    value: Float[Tensor, " r"]
    stderr: Float[Tensor, " r"]
    random: Float[Tensor, " r"]
    random_stderr: Float[Tensor, " r"]
    removed: list[int]


@torch.no_grad()
def _without(
    net: Functional, params: Params, tokens: Int[Tensor, "n t"], period: int, ranking: Sequence[tuple[int, int]], key: Key,
    num_random: int,
) -> _Gains:  # fmt: skip
    seen, total = trace(net, params, tokens, ["z"]), len(ranking)
    means = {layer: seen[f"z.{layer}"].mean((0, 1)) for layer in range(seen.num_layers)}
    removed = [0, *(2**i for i in range(total) if 2**i <= min(total, MOST_REMOVED))]

    def gains(heads: Sequence[tuple[int, int]]) -> Float[Tensor, " n"]:
        edits: dict[str, Edit] = {
            f"z.{layer}": Patch(means[layer], heads=own)
            for layer in means
            if (own := [head for at, head in heads if at == layer])
        }
        first, second = copy_losses(apply_with(net, params, tokens, edits)[0], tokens, period)
        return (first - second).cpu()

    orders = [uniform(fold_in(key, i), torch.zeros(total, dtype=torch.float64)).argsort() for i in range(num_random)]
    own = torch.stack([gains(ranking[:size]) for size in removed])
    random = torch.stack(
        [
            torch.stack([gains([ranking[i] for i in order[:size].tolist()]).mean() for order in orders])
            for size in removed
        ]
    )
    spread = random.std(1) / num_random**0.5 if num_random > 1 else torch.full_like(random[:, 0], math.nan)
    return _Gains(own.mean(1), own.std(1) / own.shape[1] ** 0.5, random.mean(1), spread, removed)


def _ends(edges: EdgeAttribution) -> tuple[list[int], list[int]]:
    """Heads that write, and keys of heads that read."""
    senders = [i for i, name in enumerate(edges.senders) if name.startswith("a")]
    return senders, [i for i, name in enumerate(edges.receivers) if name.endswith(".k")]
