"""Ranking of ways to merge the models of prose and of code, over seeds of training, and what quadratic losses say of each.

    python bench/merging.py FOLDER [FOLDER ...]

FOLDER: of `funcscope.families.text`, one per seed: base, prose, code, train, heldout. Losses are over the first `LENGTH`
bytes of each held-out text, so that sequences are independent; Fisher diagonals and second moments of inputs are those of
training texts. Intervals are Student's t over seeds (95 %), of numbers that are means over both tasks, best coefficients
cross-fitted. A JSON line per method follows the table.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import scipy
import torch
from transformers import LlamaForCausalLM

import funcscope as fs
from funcscope.curvature.fisher import fisher_diagonal_mc
from funcscope.families.text import texts
from funcscope.weights.merge_curves import input_moments, merge_curves
from funcscope.weights.task_vectors import task_vectors

LENGTH, TEXTS, DRAWS = 128, 100, 16
TASKS = ("prose", "code")
METHODS = ("linear", "slerp", "task_arithmetic", "ties", "dare", "fisher", "regmean")
COEFFICIENTS = (0.0, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0, 1.25, 1.5)


def rows(folder: Path, split: str, task: str, num: int) -> torch.Tensor:
    """(num, LENGTH) bytes: the beginnings of texts that are long enough."""
    long = [
        text.encode()[:LENGTH] for text in texts.read(folder / split / f"{task}.jsonl") if len(text.encode()) >= LENGTH
    ]
    return torch.tensor([list(each) for each in long[:num]])


def measured(folder: Path) -> tuple[Any, Any]:
    models = {name: LlamaForCausalLM.from_pretrained(folder / name).eval() for name in ("base", *TASKS)}
    net = fs.functional(models["base"])
    at = {name: fs.functional(model).theta for name, model in models.items()}
    held, train = (
        {task: fs.objective(net, list(rows(folder, split, task, num).split(50)), fs.causal_lm) for task in TASKS}
        for split, num in (("heldout", TEXTS), ("train", 2 * TEXTS))
    )
    experts = {task: at[task] for task in TASKS}
    key = fs.key(0)
    fishers = {
        task: fisher_diagonal_mc(train[task], at[task], key=fs.fold_in(key, task), num=DRAWS).value for task in TASKS
    }
    grams = {task: input_moments(train[task], at[task]) for task in TASKS}
    curves = merge_curves(
        held, experts, at["base"], key=key, methods=METHODS, coefficients=COEFFICIENTS, fishers=fishers, grams=grams
    )
    return curves, task_vectors(at["base"], list(experts.values()), net.layout, names=TASKS)


def interval(values: list[float]) -> str:
    x = torch.tensor(values).double()
    if len(x) < 2:
        return f"{float(x[0]):.4f}"
    half = float(scipy.stats.t.ppf(0.975, len(x) - 1)) * float(x.std()) / math.sqrt(len(x))
    return f"{float(x.mean()):.4f} ± {half:.4f}"


def main(folders: list[str]) -> None:
    torch.set_num_threads(1)
    everything = [measured(Path(folder)) for folder in folders]
    curves = [each for each, _ in everything]
    vectors = [each for _, each in everything]
    single = [each.single_losses for each in curves]
    names = ("base", *TASKS)
    for i, name in enumerate(names):
        print(
            f"{name:16}{interval([float(x[i].mean()) for x in single]):>22}  (mean loss over both tasks, nats per byte)"
        )
    oracle = [float((x[1, 0] + x[2, 1]) / 2) for x in single]
    print(f"{'own expert each':16}{interval(oracle):>22}")
    for name in ("total_cosines", "total_sign_conflicts", "overlap", "chance_overlap", "kappa"):
        print(f"{name:24}{interval([float(getattr(each, name)[0, 1]) for each in vectors])}")
    print(f"{'relative norms':24}{interval([float(each.total_relative_norms.mean()) for each in vectors])}\n")
    columns = ("mean loss", "above best single", "at 1", "coefficient", "increase", "slope", "1/2 GGN", "1/2 diagonal")
    print(f"{'method':16}" + "".join(f"{name:>19}" for name in columns))
    at_one = COEFFICIENTS.index(1.0)
    for m, method in enumerate(METHODS):
        numbers = {
            "mean loss": [float(c.best_loss[m]) for c in curves], "above best single": [float(c.gain[m]) for c in curves],
            "at 1": [float(c.mean_losses[m, at_one]) for c in curves],
            "coefficient": [float(c.best_coefficient[m]) for c in curves],
            "increase": [float(c.increase[m].mean()) for c in curves], "slope": [float(c.slope[m].mean()) for c in curves],
            "1/2 GGN": [float(c.quadratic[m].mean()) for c in curves],
            "1/2 diagonal": [float(c.diagonal[m].mean()) for c in curves],
        }  # fmt: skip
        print(f"{method:16}" + "".join(f"{interval(x):>19}" for x in numbers.values()))
        print(json.dumps({"method": method} | numbers), file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
