"""Ranking of ways to merge the models of prose and of code, over seeds of training, and what quadratic losses say of each.

    python bench/merging.py FOLDER [FOLDER ...]

FOLDER: of `funcscope.families.text`, one per seed: base, prose, code, train, heldout. Losses are over the first `LENGTH`
bytes of each held-out text, so that sequences are independent; Fisher diagonals and second moments of inputs are those of
training texts. Intervals are Student's t over seeds (95 %), of numbers that are means over both tasks, best coefficients
cross-fitted. A JSON line per seed goes to the standard error.
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

LENGTH, TEXTS, DRAWS = 128, 50, 6
TASKS = ("prose", "code")
METHODS = ("linear", "slerp", "task_arithmetic", "ties", "dare", "fisher", "regmean")
COEFFICIENTS = (0.0, 0.5, 0.75, 1.0, 1.25)


def rows(folder: Path, split: str, task: str, num: int) -> torch.Tensor:
    """(num, LENGTH) bytes: the beginnings of texts that are long enough."""
    long = [
        text.encode()[:LENGTH] for text in texts.read(folder / split / f"{task}.jsonl") if len(text.encode()) >= LENGTH
    ]
    return torch.tensor([list(each) for each in long[:num]])


def measured(folder: Path) -> tuple[Any, Any]:
    """Curves of the held-out losses, and the task vectors."""
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


def numbers(curves: Any, vectors: Any) -> dict[str, Any]:
    """What the table has of one seed."""
    single, at_one = curves.single_losses, COEFFICIENTS.index(1.0)
    columns = {
        "mean loss": curves.best_loss, "above best single": curves.gain, "at 1": curves.mean_losses[:, at_one],
        "coefficient": curves.best_coefficient, "increase": curves.increase.mean(1), "slope": curves.slope.mean(1),
        "1/2 GGN": curves.quadratic.mean(1), "1/2 diagonal": curves.diagonal.mean(1),
    }  # fmt: skip
    return {
        "methods": {name: dict(zip(METHODS, column.tolist(), strict=True)) for name, column in columns.items()},
        "single": dict(zip(("base", *TASKS), single.mean(1).tolist(), strict=True)),
        "own expert each": float((single[1, 0] + single[2, 1]) / 2),
        "task vectors": {
            name: float(getattr(vectors, name)[0, 1])
            for name in ("total_cosines", "total_sign_conflicts", "overlap", "chance_overlap", "kappa")
        }
        | {"relative norm": float(vectors.total_relative_norms.mean())},
    }


def main(folders: list[str]) -> None:
    torch.set_num_threads(1)
    rows = []
    for folder in folders:
        rows.append(numbers(*measured(Path(folder))))
        print(json.dumps({"folder": folder} | rows[-1]), file=sys.stderr, flush=True)
    for name in ("base", *TASKS):
        print(f"{name:24}{interval([row['single'][name] for row in rows])}  (mean loss over both tasks, nats per byte)")
    print(f"{'own expert each':24}{interval([row['own expert each'] for row in rows])}")
    for name in rows[0]["task vectors"]:
        print(f"{name:24}{interval([row['task vectors'][name] for row in rows])}")
    print(f"\n{'method':16}" + "".join(f"{name:>19}" for name in rows[0]["methods"]))
    for method in METHODS:
        cells = [interval([row["methods"][name][method] for row in rows]) for name in rows[0]["methods"]]
        print(f"{method:16}" + "".join(f"{cell:>19}" for cell in cells))


if __name__ == "__main__":
    main(sys.argv[1:])
