"""The local learning coefficient over the training of modular addition, beside the Hessian's trace and flatness.

    python bench/learning_coefficient.py [--steps 0 100 200 300 400 600 1000 2000] [--gammas 1000 10000] [--pull X]
                                         [--chains N] [--num N] [--burn-in N] [--folder FOLDER] [--json FILE]

Trains the quick variant (p = 37; some tens of seconds on one core) unless FOLDER has it, and prints a row per checkpoint,
all on the training set but for the test columns: losses, accuracy, the trace of the Hessian, the mean loss change of random
steps of length 0.1. Then, for each localisation gamma, a table: the coefficient at the step size pull / gamma with its error
over chains, R-hat, effective draws, the share of draws below the loss at the weights, the distance of the chains over the
norm of the weights; the coefficient at half and at twice the step size, and whether the three are a plateau as
`learning_coefficient_sweep` has it; what the Hessian at the weights makes of it at most, n beta tr H / 2 gamma. Under each
table rank correlations over the checkpoints on a plateau. Twenty minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import scipy
import torch
from tabulate import tabulate

import funcscope as fs
from funcscope.families import modular
from funcscope.landscape import LearningCoefficient, learning_coefficient
from funcscope.landscape.learning_coefficient_sweep import plateau

FACTORS = (0.5, 1.0, 2.0)
TOLERANCE = 0.2
Row = dict[str, float | str]


def objective(step: int, folder: Path) -> tuple[fs.Loss, torch.Tensor]:
    net = fs.functional(modular.make(modular.QUICK))
    loss = fs.objective(net, [modular.data(modular.QUICK, "train")], modular.CRITERION)
    return loss, net.layout.ravel(modular.checkpoint(modular.QUICK, folder, step).params)


def surroundings(step: int, folder: Path, point: modular.Point) -> Row:
    """What does not depend on the chains."""
    loss, theta = objective(step, folder)
    trace = fs.hutchinson_trace(fs.hessian(loss, theta), theta, key=fs.key(1), num=16)
    flat = fs.flatness(loss, theta, key=fs.key(2), n_directions=16).asdict()
    return {
        "step": step, "train loss": point.train_loss, "test loss": point.test_loss, "test accuracy": point.test_accuracy,
        "tr H": float(trace.value), "± tr H": float(trace.stderr), "flatness": flat["mean_delta_loss"],
        "± flatness": flat["mean_delta_loss_stderr"],
    }  # fmt: skip


def estimates(step: int, gamma: float, options: argparse.Namespace) -> list[LearningCoefficient]:
    loss, theta = objective(step, options.folder)
    return [
        learning_coefficient(
            loss, theta, key=fs.fold_in(fs.key(0), f"{factor} {gamma}"), num_chains=options.chains,
            num_steps=options.num + options.burn_in, burn_in=options.burn_in, step_size=factor * options.pull / gamma,
            localization=gamma,
        )
        for factor in FACTORS
    ]  # fmt: skip


def row(around: Row, gamma: float, options: argparse.Namespace) -> Row:
    begun = time.perf_counter()
    made = estimates(int(around["step"]), gamma, options)
    values, errors = (
        torch.stack([getattr(one.learning_coefficient, name) for one in made]) for name in ("value", "stderr")
    )
    valid = torch.tensor([not one.num_diverged and not one.unresolved for one in made])
    half, mid, twice = made
    strength = mid.num_samples * mid.inverse_temperature
    norm = float(objective(int(around["step"]), options.folder)[1].norm())
    return {
        "gamma": gamma, "step": around["step"], "LLC": float(values[1]), "±": float(errors[1]),
        "R-hat": mid.r_hat, "draws": mid.num_effective,
        "negative": mid.negative_share, "distance / norm": float(mid.distances.mean()) / norm,
        "LLC, half": float(values[0]), "± half": float(errors[0]), "LLC, twice": float(values[2]),
        "± twice": float(errors[2]), "largest R-hat": max(half.r_hat, mid.r_hat, twice.r_hat),
        "diverged": sum(one.num_diverged for one in made),
        "plateau": "yes" if plateau(values, errors, valid, tolerance=TOLERANCE) else "no",
        "of H at most": strength * float(around["tr H"]) / (2 * gamma),
        "seconds": time.perf_counter() - begun,
    }  # fmt: skip


def correlations(rows: list[Row], around: list[Row]) -> str:
    sure = [one | other for one, other in zip(rows, around, strict=True) if one["plateau"] == "yes"]
    if len(sure) < 4:
        return f"{len(sure)} checkpoints on a plateau: too few for a rank correlation"
    ranks = {
        name: float(scipy.stats.spearmanr([x["LLC"] for x in sure], [x[name] for x in sure]).statistic)
        for name in ("tr H", "flatness", "test accuracy")
    }
    texts = ", ".join(f"{value:.2f} with {name}" for name, value in ranks.items())
    return f"Spearman correlation of the LLC over {len(sure)} checkpoints on a plateau: {texts}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 100, 200, 300, 400, 600, 1000, 2000])
    parser.add_argument("--gammas", type=float, nargs="+", default=[1000.0, 10_000.0])
    parser.add_argument("--pull", type=float, default=0.1, help="step size times gamma")
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--num", type=int, default=1500)
    parser.add_argument("--burn-in", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "funcscope-learning-coefficient")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    points = {point.step: point for point in modular.train(modular.QUICK, options.folder, options.steps)}
    around = [surroundings(step, options.folder, points[step]) for step in options.steps]
    print(tabulate(around, headers="keys", floatfmt=".3g"), flush=True)
    rows: list[Row] = []
    for gamma in options.gammas:
        own = [row(each, gamma, options) for each in around]
        print(f"\ngamma = {gamma:g}, step sizes {', '.join(f'{x * options.pull / gamma:g}' for x in FACTORS)}")
        print(tabulate(own, headers="keys", floatfmt=".3g"))
        print(correlations(own, around), flush=True)
        rows += own
    if options.json:
        options.json.write_text(json.dumps({"checkpoints": around, "estimates": rows}, indent=2))


if __name__ == "__main__":
    main()
