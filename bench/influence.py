"""Which scores of training sequences foretell what training without them does: LDS of TracIn and of influence functions.

    python bench/influence.py [all|quick]

A small language model of bytes is trained on texts of the standard library, and then the matrices of its layers are
fine-tuned on N short sequences to the minimum of their mean loss and lambda/2 times the squared distance to the base; so are
models on M random halves of them. (With the embeddings, those of rare bytes pass near 0, where the norm behind them is not
smooth.) What every method says of the losses of held-out sequences is compared with those: Spearman's correlation over the
halves, mean over held-out sequences, with its 95 % interval. TracIn is over checkpoints of gradient descent on all N
sequences.
The table goes to bench/results/influence.json, too. All: 64 sequences, 60 halves; quick: 32 and 20.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor
from torch.func import grad, grad_and_value

import funcscope as fs
from funcscope.curvature.scored_sequences import chosen
from funcscope.families.text import BASE, Config, data, make, train
from funcscope.families.text.model import load, place
from funcscope.families.text.texts import read
from funcscope.gradients import checkpoint_rates, half_subsets, influence, linear_datamodeling_score, tracin

RESULTS = Path(__file__).parent / "results" / "influence.json"
LENGTH = 32
LAMBDA = 1.0
"""With 0.3, halves end where the Hessian has eigenvalues above 1,000, and their minima are not come to."""
TINY = Config(
    hidden_size=32, intermediate_size=64, num_layers=2, length=LENGTH, train_bytes=200_000, heldout_bytes=20_000, steps=300,
    tuning_steps=1,
)  # fmt: skip


class Task(NamedTuple):
    train: fs.Loss
    test: fs.Loss
    base: Tensor
    damping: float


def task(num: int, num_test: int, folder: Path, damping: float = LAMBDA) -> Task:
    """The base, trained; sequences to fine-tune it on, prose and code by turns, and held-out ones."""
    for _ in train(TINY, folder):
        pass
    model = make(TINY)
    place(model, load(folder / BASE))
    net = fs.functional(model, trainable=[name for name, _ in model.named_parameters() if "proj" in name])
    files = data(TINY, folder)
    losses = [
        fs.objective(net, [{"input_ids": sequences(files[split], size)}], fs.causal_lm)
        for split, size in (("train", num), ("heldout", num_test))
    ]
    return Task(*losses, net.theta, damping)


def sequences(files: dict[str, Path], num: int) -> Tensor:
    """Windows of texts, one of each text, of both kinds by turns."""
    kinds = [[text.encode() for text in read(path)] for path in files.values()]
    long = [[row for row in rows if len(row) >= 2 * LENGTH] for rows in kinds]
    picked = [long[i % len(long)][i // len(long)] for i in range(num)]
    return torch.tensor([[*row[LENGTH : 2 * LENGTH]] for row in picked])


def objective(loss: fs.Loss, case: Task) -> Callable[[Tensor], Tensor]:
    return lambda t: loss(t) + case.damping / 2 * (t - case.base).square().sum()


def minimum(loss: fs.Loss, case: Task, tolerance: float = 3e-3, most: int = 120) -> Tensor:
    """By L-BFGS from the base, until the largest entry of the gradient is `tolerance` of what it was."""
    value_and_gradient = grad_and_value(objective(loss, case))
    theta = case.base.clone().requires_grad_()
    first = float(value_and_gradient(case.base)[0].abs().max())
    optimiser = torch.optim.LBFGS(
        [theta], max_iter=most, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=tolerance * first,
        tolerance_change=0.0,
    )  # fmt: skip

    def closure() -> Tensor:
        theta.grad, value = value_and_gradient(theta.detach())
        return value

    optimiser.step(closure)
    found = theta.detach()
    rest = float(value_and_gradient(found)[0].abs().max()) / first
    if rest > 1.01 * tolerance:
        print(f"  not at a minimum: the gradient is still {rest:.1e} of the first", file=sys.stderr)
    return found


def descent(case: Task, steps: int, rate: float, every: int) -> Iterator[tuple[int, Tensor]]:
    """Step and weights along gradient descent on all sequences."""
    slope, theta = grad(objective(case.train, case)), case.base
    for step in range(steps + 1):
        if step % every == 0:
            yield step, theta
        theta = theta - rate * slope(theta)


def retrained(case: Task, subsets: Tensor) -> Tensor:
    losses = []
    for subset in subsets:
        theta = minimum(chosen(case.train, subset), case)
        with torch.no_grad():
            sums, weights = case.test.terms(theta)
        losses.append(sums / weights)
    return torch.stack(losses)


def scores(case: Task) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """What every training sequence adds to the loss of every held-out one, by every method."""
    theta = minimum(case.train, case)
    steps, rate, every = 150, 0.03, 15

    def of_tracin(normalize: bool, last: bool) -> Tensor:
        at, points = zip(*descent(case, steps, rate, every), strict=True)
        rates = checkpoint_rates([rate] * steps, at, rule="trapezoid")
        part = slice(-1, None) if last else slice(None)
        return -tracin(case.train, case.test, points[part], learning_rates=rates[part], normalize=normalize).total

    yield "TracIn, last checkpoint", lambda: of_tracin(False, True)
    yield "TracIn", lambda: of_tracin(False, False)
    yield "TracIn, cosines", lambda: of_tracin(True, False)
    for method in ("gram", "kfac", "ekfac", "cg"):
        yield (
            f"influence, {method}",
            lambda method=method: (
                influence(case.train, case.test, theta, key=fs.key(1), method=method, damping=case.damping).values
            ),
        )
    yield (
        "influence, ekfac, 0.1 mean eigenvalue",
        lambda: influence(case.train, case.test, theta, key=fs.key(1), method="ekfac").values,
    )


def main(which: str = "all") -> None:
    num, num_subsets, num_test = (64, 60, 16) if which == "all" else (32, 20, 8)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        case = task(num, num_test, Path(folder))
    print(f"{len(case.base):,} weights; base after {time.perf_counter() - began:.0f} s", file=sys.stderr)
    subsets = half_subsets(num, key=fs.key(0), num=num_subsets)
    losses = retrained(case, subsets)
    print(f"{num_subsets} halves after {time.perf_counter() - began:.0f} s", file=sys.stderr)
    rows = []
    for name, make_scores in scores(case):
        start = time.perf_counter()
        made = make_scores()
        seconds = time.perf_counter() - start
        found = linear_datamodeling_score(made, subsets, losses, key=fs.key(2))
        rows.append([name, float(found.score.value), float(found.score.stderr), found.low, found.high, seconds])
        print("  ", name, f"{rows[-1][1]:.3f}", file=sys.stderr)
    header = ["scores", "LDS", "error", "from", "to", "seconds"]
    print(tabulate(rows, header, floatfmt=".3f"))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps([dict(zip(header, row, strict=True)) for row in rows], indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
