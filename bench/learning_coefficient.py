"""The local learning coefficient over the training of modular addition, beside the Hessian's trace and flatness.

    python bench/learning_coefficient.py [--steps 0 100 300 600 1000 2000] [--chains N] [--num N] [--burn-in N]
                                         [--epsilon E] [--gamma G] [--folder FOLDER] [--json FILE]

Trains the quick variant (p = 37; some tens of seconds on one core) unless FOLDER has it, and prints a row per checkpoint,
all on the training set: losses, accuracy on the test set, the coefficient with its error over chains, R-hat, the share of
draws below the loss at the weights, chains that diverged, the trace of the Hessian with its error, the mean loss change of
random filter-normalised steps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from tabulate import tabulate

import funcscope as fs
from funcscope.families import modular
from funcscope.landscape import learning_coefficient


def row(step: int, folder: Path, points: dict[int, modular.Point], options: argparse.Namespace) -> dict[str, float]:
    params = modular.checkpoint(modular.QUICK, folder, step).params
    net = fs.functional(modular.make(modular.QUICK))
    loss = fs.objective(net, [modular.data(modular.QUICK, "train")], modular.CRITERION)
    theta = net.layout.ravel(params)
    begun = time.perf_counter()
    found = learning_coefficient(
        loss, theta, key=fs.key(0), num_chains=options.chains, num_steps=options.num + options.burn_in,
        burn_in=options.burn_in, step_size=options.epsilon, localization=options.gamma,
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    trace = fs.hutchinson_trace(fs.hessian(loss, theta), theta, key=fs.key(1), num=16)
    flat = fs.flatness(loss, theta, key=fs.key(2), n_directions=16).asdict()
    made, point = found.asdict(), points[step]
    return {
        "step": step, "train loss": point.train_loss, "test accuracy": point.test_accuracy,
        "LLC": made["learning_coefficient"], "±": made["learning_coefficient_stderr"], "R-hat": found.r_hat,
        "negative": found.negative_share, "diverged": found.num_diverged, "tr H": float(trace.value),
        "± tr H": float(trace.stderr), "flatness": flat["mean_delta_loss"], "seconds": seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 100, 300, 600, 1000, 2000])
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--num", type=int, default=200)
    parser.add_argument("--burn-in", type=int, default=200)
    parser.add_argument("--epsilon", type=float, default=1e-4)
    parser.add_argument("--gamma", type=float, default=100.0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "funcscope-learning-coefficient")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    points = {point.step: point for point in modular.train(modular.QUICK, options.folder, options.steps)}
    rows = []
    for step in options.steps:
        rows.append(row(step, options.folder, points, options))
        print(tabulate(rows[-1:], headers="keys", floatfmt=".4g"), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
