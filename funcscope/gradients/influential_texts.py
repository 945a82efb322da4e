"""The training texts that help and harm a test loss most, as one can read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.batches import num_rows
from ..core.checks import check_count
from ..core.keys import Key
from ..core.masks import tokens_there
from ..core.objective import Loss, Theta
from ..core.result import Result, internal, quantity
from ..core.tables import counted
from .influence import Method, influence

Names = Callable[[list[int]], list[str]]
SAID = 72
"""Characters of a text that a label has."""


class MostInfluential(Result):
    """The training sequences without which the mean test loss would rise and fall most; made by `most_influential`."""

    rise: Float[Tensor, " k"] = quantity("rise of the test loss when the text is left out", unit="loss", per="text")
    """The most helpful first, then the most harmful, whose numbers are negative where there is one that harms."""
    spread: float = quantity("standard deviation over all texts", unit="loss")
    damping: float = quantity("damping")
    residual: float | None = quantity("relative residual of the solve")
    num_helpful: int
    """How many of all lower the test loss."""
    num_sequences: int
    method: str
    sequences: list[int] = internal()
    """Their places in the training data."""
    passages: list[str] = internal()
    """Their texts, whole."""

    @property
    def helpful(self) -> list[str]:
        """Texts that lower the test loss, the most helpful first."""
        return self.passages[: len(self.passages) // 2]

    @property
    def harmful(self) -> list[str]:
        """Texts that raise it, the most harmful first."""
        return self.passages[len(self.passages) // 2 :]

    @property
    def coords(self) -> dict[str, Sequence[str]]:
        half = len(self.passages) // 2
        kinds = [f"{kind} {i + 1}" for kind in ("helpful", "harmful") for i in range(half)]
        places = zip(kinds, self.sequences, self.passages, strict=True)
        return {"text": [f"{kind} (#{at}): {_short(text)}" for kind, at, text in places]}

    @property
    def notes(self) -> list[str]:
        half, rises = len(self.passages) // 2, self.rise
        wrong = [
            ("helpful", "lower", int((rises[:half] <= 0).sum())),
            ("harmful", "raise", int((rises[half:] >= 0).sum())),
        ]
        return [
            f"{num} of the {half} texts at the {end} end do not {does} the test loss."
            for end, does, num in wrong
            if num
        ]

    @property
    def head(self) -> str:
        half = len(self.passages) // 2
        return f"the {half} most helpful and most harmful of {counted(self.num_sequences, 'training sequence')}"


SPACES = str.maketrans({"Ġ": " ", "▁": " ", "Ċ": "\n", "ĉ": "\t"})
"""What tokenizers write for spaces, in names of tokens."""


def most_influential(
    train_loss: Loss,
    test_loss: Loss,
    theta: Theta,
    token_names: Names = lambda ids: [*map(str, ids)],
    *,
    key: Key | None = None,
    method: Method = "cg",
    damping: float | None = None,
    num_texts: int = 5,
    num: int = 4,
) -> MostInfluential:
    r"""Which training texts help the mean test loss most, and which harm it: `influence` on one test loss, as texts.

    A text's number is $-I/W$: how much the mean test loss would rise if it were left out, to first order. Two ends of one
    list: where there are fewer than twice `num_texts` sequences, half of them stand at each end.

    token_names: texts of token ids. num_texts: at each end. Data without token ids have their places for texts. Other
    arguments as of `influence`. No error: the numbers are of these sequences, and hang on the damping.

    Raises ValueError as `influence`, and for fewer than two training sequences.

    Grosse et al. (2023), arXiv:2308.03296.

    >>> import funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> loss = fs.objective(net, [torch.tensor([[1, 2, 3], [3, 2, 1], [1, 1, 1]])], fs.causal_lm)
    >>> len(most_influential(loss, loss, net.theta, key=fs.key(0)).helpful)
    1
    """
    check_count("num_texts", num_texts)
    found = influence(train_loss, test_loss, theta, key=key, method=method, test="mean", damping=damping, num=num)
    rise = found.left_out[:, 0].double().cpu()
    if len(rise) < 2:
        raise ValueError(f"the training data must have two sequences or more, got {len(rise)}.")
    half, order = min(num_texts, len(rise) // 2), rise.argsort(descending=True, stable=True).tolist()
    places = [*order[:half], *reversed(order[-half:])]
    texts = texts_of(train_loss, token_names)
    residual = None if found.residual is None else float(found.residual[0])
    return MostInfluential(
        rise[places], float(rise.std()), found.damping, residual, int((rise > 0).sum()), len(rise), method, places,
        [texts[i] for i in places],
    )  # fmt: skip


def texts_of(loss: Loss, token_names: Names) -> list[str]:
    """The text of every sequence, without its padding; its place where there are no token ids."""
    made: list[str] = []
    for inputs, targets in loss.batches:
        ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        size = num_rows((inputs, targets))
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.ndim != 2:
            made += [f"sequence {len(made) + i}" for i in range(size)]
            continue
        there = torch.ones_like(ids, dtype=torch.bool) if mask is None else tokens_there(mask).expand(ids.shape)
        texts = ("".join(token_names(row[real].tolist())) for row, real in zip(ids, there, strict=True))
        made += [text.translate(SPACES) for text in texts]
    return made


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= SAID else f"{flat[: SAID - 1]}…"
