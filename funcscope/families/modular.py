"""Modular addition: a one-layer transformer that learns (a + b) mod p, memorising first and generalising later.

Tokens are (a, b, =); the answer is read at "=". One attention layer, one ReLU layer, no layer norm, as in Nanda, Chan,
Lieberum, Smith, Steinhardt (2023), Progress measures for grokking via mechanistic interpretability.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..core.checks import check_choice, check_count
from ..core.criterion import Criterion, classification
from ..core.keys import fold_in, key, normal, uniform
from ..core.model import Functional, functional
from ..core.objective import Loss
from ..core.objective import objective as mean_loss
from ..core.store import load, save
from .family import SPLITS, Family, Kept, Setup, register

Split = Literal["train", "test", "probe"]

CRITERION: Criterion = classification.in_dtype(torch.float64)
"""Cross-entropy of float64 logits: in float32 the confident network's gradient vanishes, and its training slips."""

EVERY = 10
"""Steps between two points of the loss curves."""


@dataclass(frozen=True)
class Config:
    """Architecture, data and training of one run.

    When it generalises depends on the seed, and by hundreds of steps on rounding; most seeds do within 5,000 steps.
    """

    p: int = 53
    train_fraction: float = 0.4
    d_model: int = 64
    num_heads: int = 4
    d_mlp: int = 256
    biases: bool = True
    steps: int = 5000
    learning_rate: float = 3e-3
    weight_decay: float = 1.0
    betas: tuple[float, float] = (0.9, 0.98)
    seed: int = 1

    @property
    def name(self) -> str:
        """A folder's name that no other configuration has."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"modular-addition-p{self.p}-seed{self.seed}-{digest[:8]}"


QUICK = Config(p=37, d_mlp=128, steps=2000, learning_rate=1e-2, weight_decay=2.0, seed=0)
"""A smaller run, of a few seconds."""

P113 = Config(
    p=113, train_fraction=0.3, d_model=128, d_mlp=512, biases=False, steps=25_000, learning_rate=1e-3, seed=999
)
"""The published size: 226,048 weights, no biases. The initialisation is that of `make`. Half an hour on two cores."""


class Point(NamedTuple):
    """One point of the curves: mean cross-entropy in nats, share of right answers."""

    step: int
    train_loss: float
    test_loss: float
    train_accuracy: float
    test_accuracy: float


class Checkpoint(NamedTuple):
    step: int
    params: dict[str, Tensor]
    curves: list[Point]
    sha256: str


class ModularAddition(nn.Module):
    """(batch, 3) tokens -> (batch, p) logits for the answer. Only the last position is computed: only it is read."""

    def __init__(self, config: Config):
        super().__init__()
        self.num_heads = config.num_heads
        width = config.d_model
        self.embed = nn.Embedding(config.p + 1, width)
        self.position = nn.Parameter(torch.empty(3, width))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.mlp_in = nn.Linear(width, config.d_mlp, bias=config.biases)
        self.mlp_out = nn.Linear(config.d_mlp, width, bias=config.biases)
        self.unembed = nn.Linear(width, config.p, bias=False)

    def forward(self, tokens: Int[Tensor, "b 3"]) -> Float[Tensor, "b p"]:
        """Keys, values and scores are made once for every token at every position, 3 (p + 1) of them, and then looked up."""
        x = self.embed.weight + self.position[:, None]
        q, k = (proj(x).unflatten(-1, (self.num_heads, -1)) for proj in (self.q_proj, self.k_proj))
        scores = torch.einsum("qhd,pthd->qpth", q[-1], k) / q.shape[-1] ** 0.5
        at = tokens + torch.arange(3, device=tokens.device) * x.shape[1]
        attention = F.embedding(tokens[:, -1:] * (3 * x.shape[1]) + at, scores.flatten(0, 2)).softmax(dim=1)
        v = F.embedding(at, self.v_proj(x).flatten(0, 1)).unflatten(-1, (self.num_heads, -1))
        last = F.embedding(tokens[:, -1], x[-1]) + self.o_proj((attention[..., None] * v).sum(1).flatten(1))
        last = last + self.mlp_out(self.mlp_in(last).relu_())
        return self.unembed(last)


def make(config: Config) -> ModularAddition:
    """The untrained model: weights normal with variance 1 / d_model, biases 0, from the configuration's seed.

    >>> make(Config()).embed.weight.shape
    torch.Size([54, 64])
    """
    with torch.device("meta"):  # the constructors draw weights from the global generator; on meta they draw nothing
        model = ModularAddition(config)
    model = model.to_empty(device="cpu")
    root = fold_in(key(config.seed), "weights")
    with torch.no_grad():
        for name, param in model.named_parameters():
            scale = 0.0 if name.endswith("bias") else config.d_model**-0.5
            param.copy_(normal(fold_in(root, name), param) * scale)
    return model


def data(config: Config, split: Split) -> tuple[Int[Tensor, "n 3"], Int[Tensor, " n"]]:
    """Tokens (a, b, p) and answers (a + b) mod p of a random share of all p^2 pairs, of the rest, or of all in order.

    >>> tokens, answers = data(Config(p=5), "train")
    >>> len(answers), bool((tokens[:, :2].sum(1) % 5 == answers).all())
    (10, True)
    """
    check_choice("split", split, SPLITS)
    p = config.p
    if split == "probe":
        return _pairs(torch.arange(p * p), p)
    order = uniform(fold_in(key(config.seed), "split"), torch.empty(p * p)).argsort(stable=True)
    cut = round(config.train_fraction * p * p)
    return _pairs(order[:cut] if split == "train" else order[cut:], p)


def _pairs(chosen: Tensor, p: int) -> tuple[Tensor, Tensor]:
    a, b = chosen // p, chosen % p
    return torch.stack([a, b, torch.full_like(a, p)], dim=1), (a + b) % p


def objective(net: Functional, config: Config, split: Split = "train") -> Loss:
    """The mean cross-entropy over one split, as a function of theta."""
    return mean_loss(net, [data(config, split)], CRITERION)


def schedule(config: Config, num: int = 24) -> tuple[int, ...]:
    """Steps to keep: the start, a few while it memorises, then evenly to the end; multiples of 10 but for the last.

    >>> schedule(Config(steps=1000), num=8)
    (0, 20, 60, 150, 360, 570, 780, 1000)
    """
    check_count("num", num, least=6)
    early = (0, 20, 60, 150)
    late = torch.linspace(min(150, config.steps), config.steps, num - len(early) + 1)[1:]
    steps = {min(step, config.steps) for step in early} | {int(step) // EVERY * EVERY for step in late} | {config.steps}
    return tuple(sorted(steps))


def train(config: Config, folder: Path, steps: Sequence[int]) -> Iterator[Point]:
    """Train by full-batch AdamW, keeping checkpoints at `steps` in `folder`; yields a point of the curves as it goes.

    Goes on from the last checkpoint before the first that is missing, with the same bits as an uninterrupted run on the
    same machine and number of threads; stored points are yielded first. A checkpoint holds parameters,
    optimiser state, configuration and curves.

    Raises Damaged for a checkpoint that cannot be read, ValueError for one of another configuration.
    """
    model = make(config)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=config.betas, fused=True
    )
    for param in model.parameters():
        optimiser.state[param] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(param),
            "exp_avg_sq": torch.zeros_like(param),
        }
    done = list(takewhile(lambda step: path(folder, step).exists(), sorted(steps)))
    curves = _restore(model, optimiser, config, path(folder, done[-1])) if done else []
    yield from curves
    splits = data(config, "train"), data(config, "test")
    for step in range(done[-1] + 1 if done else 0, max(steps) + 1):
        if step > 0:
            _advance(model, optimiser, *splits[0])
        if step % EVERY == 0:
            _drop_denormals(optimiser)
        if step % EVERY == 0 or step in steps:
            curves.append(_point(model, step, *splits))
            yield curves[-1]
        if step in steps:
            _keep(model, optimiser, config, path(folder, step), step, curves)


def path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies in a run's folder."""
    return folder / "checkpoints" / f"step_{step:05d}.safetensors"


def checkpoint(config: Config, folder: Path, step: int) -> Checkpoint:
    """One checkpoint of a run. Raises FileNotFoundError, Damaged, or ValueError for another configuration."""
    arrays, meta, sha256 = load(path(folder, step))
    _check_config(config, meta, path(folder, step))
    params = {name.removeprefix("param."): value for name, value in arrays.items() if name.startswith("param.")}
    return Checkpoint(step, params, [Point(*point) for point in meta["curves"]], sha256)


def network(config: Config) -> Functional:
    """The model as a pure function; its own weights are the untrained ones."""
    return functional(make(config))


def _advance(model: nn.Module, optimiser: torch.optim.Optimizer, tokens: Tensor, answers: Tensor) -> None:
    loss, _ = CRITERION.token_loss(model(tokens), CRITERION.prepare((tokens, answers))[1])
    optimiser.zero_grad()
    loss.mean().backward()
    optimiser.step()


def _drop_denormals(optimiser: torch.optim.Optimizer) -> None:
    """Zero the moments below 1e-30: those of dead units decay into denormal numbers, which take 3 times the time."""
    for state in optimiser.state.values():
        for moment in (state["exp_avg"], state["exp_avg_sq"]):
            moment.masked_fill_(moment.abs() < 1e-30, 0.0)


@torch.no_grad()
def _point(model: nn.Module, step: int, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> Point:
    scores = []
    for tokens, answers in (train, test):
        logits = model(tokens)
        loss, _ = CRITERION.token_loss(logits, CRITERION.prepare((tokens, answers))[1])
        scores.append((float(loss.mean()), float((logits.argmax(-1) == answers).double().mean())))
    return Point(step, scores[0][0], scores[1][0], scores[0][1], scores[1][1])


def _keep(
    model: nn.Module, optimiser: torch.optim.Optimizer, config: Config, path: Path, step: int, curves: list[Point]
) -> None:
    arrays: dict[str, Tensor] = {}
    for name, param in model.named_parameters():
        state = optimiser.state[param]
        arrays |= {
            f"param.{name}": param,
            f"exp_avg.{name}": state["exp_avg"],
            f"exp_avg_sq.{name}": state["exp_avg_sq"],
        }
    save(path, arrays, {"family": "modular_addition", "config": asdict(config), "step": step, "curves": curves})


def _restore(model: nn.Module, optimiser: torch.optim.Optimizer, config: Config, path: Path) -> list[Point]:
    arrays, meta, _ = load(path)
    _check_config(config, meta, path)
    with torch.no_grad():
        for name, param in model.named_parameters():
            state = optimiser.state[param]
            param.copy_(arrays[f"param.{name}"])
            state["exp_avg"].copy_(arrays[f"exp_avg.{name}"])
            state["exp_avg_sq"].copy_(arrays[f"exp_avg_sq.{name}"])
            state["step"].fill_(meta["step"])
    return [Point(*point) for point in meta["curves"]]


def _check_config(config: Config, meta: dict, path: Path) -> None:
    wanted = json.loads(json.dumps(asdict(config)))
    if meta.get("config") != wanted:
        raise ValueError(f"{path} belongs to another run: its configuration is {meta.get('config')}, wanted {wanted}.")


def _published(last: int) -> tuple[int, ...]:
    """Checkpoints every 100 steps where the network changes fast, every 500 elsewhere."""
    dense = (*range(0, 1500, 100), *range(1500, 9000, 500), *range(9000, 13000, 100), *range(13000, last, 500), last)
    return tuple(step for step in dense if step <= last)


def _batches(config: Config, split: str) -> list[tuple[Tensor, Tensor]]:
    return [data(config, split)]  # type: ignore[arg-type]


def _kept(config: Config, folder: Path, step: int) -> Kept:
    found = checkpoint(config, folder, step)
    return Kept(found.params, found.sha256)


FAMILY = register(
    Family(
        name="modular_addition",
        variants={
            "p53": Setup(Config(), schedule(Config(), 30)),
            "p37": Setup(QUICK, schedule(QUICK)),
            "p113": Setup(P113, _published(P113.steps)),
        },
        config=Config,
        network=network,
        batches=_batches,
        criterion=CRITERION,
        train=train,
        checkpoint=_kept,
    )
)
