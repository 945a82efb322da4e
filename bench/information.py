"""How far estimators of mutual information are from the truth, where the truth is known, and whether their errors cover it.

    python bench/information.py [all|quick]

Of every distribution, estimator and number of rows: the mean of the estimates less the truth, the root of their mean
squared error, and how often the interval of 1.96 standard errors holds the truth, over 200 keys (InfoNCE: 20; quick: 40 and
6), beside scikit-learn's mutual_info_regression where both sides have one dimension. The table goes to
bench/results/information.json, too.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.integrate import quad
from sklearn.feature_selection import mutual_info_regression
from torch import Tensor

import funcscope as fs
from funcscope.information import (
    MutualInformation,
    mutual_information_discrete,
    mutual_information_gaussian,
    mutual_information_infonce,
    mutual_information_ksg,
    mutual_information_ross,
)

RESULTS = Path(__file__).parent / "results" / "information.json"
Draw = Callable[[fs.Key, int], tuple[Tensor, Tensor]]


class Distribution(NamedTuple):
    name: str
    kind: str
    truth: float
    draw: Draw


def numbers(key: fs.Key, *shape: int, kind: Callable = fs.normal) -> Tensor:
    return kind(key, torch.zeros(shape, dtype=torch.float64))


def units(key: fs.Key, *shape: int) -> Tensor:
    return numbers(key, *shape, kind=fs.core.keys.uniform)


def gaussian(dims: int, rho: float, through: Callable[[Tensor], Tensor] = lambda x: x, name: str = "") -> Distribution:
    def draw(key: fs.Key, num: int) -> tuple[Tensor, Tensor]:
        x, noise = (numbers(fs.fold_in(key, i), num, dims) for i in range(2))
        return through(x), through(rho * x + math.sqrt(1 - rho**2) * noise)

    return Distribution(
        f"{name or 'Gaussian'} {dims} + {dims}, rho {rho}", "continuous", -dims / 2 * math.log1p(-(rho**2)), draw
    )


def uniform_noise(width: float) -> Distribution:
    """y = x + n, x uniform on [0, 1] and n on [0, width]."""

    def draw(key: fs.Key, num: int) -> tuple[Tensor, Tensor]:
        x = units(fs.fold_in(key, 0), num, 1)
        return x, x + width * units(fs.fold_in(key, 1), num, 1)

    return Distribution(f"uniform noise of width {width}", "continuous", width / 2 - math.log(width), draw)


def channel(size: int, flipped: float) -> Distribution:
    """A letter arrives as itself or, with probability `flipped`, as one of the others."""

    def draw(key: fs.Key, num: int) -> tuple[Tensor, Tensor]:
        x = (units(fs.fold_in(key, 0), num) * size).long()
        other = (x + 1 + (units(fs.fold_in(key, 1), num) * (size - 1)).long()) % size
        return x, torch.where(units(fs.fold_in(key, 2), num) < flipped, other, x)

    parts = [(1 - flipped, 1), (flipped / (size - 1), size - 1)]
    lost = -sum(count * p * math.log(p) for p, count in parts)
    return Distribution(f"channel of {size} letters, {flipped:.2f} flipped", "labels", math.log(size) - lost, draw)


def mixture(apart: float) -> Distribution:
    """A fair coin, and a unit Gaussian at 0 or `apart`."""

    def draw(key: fs.Key, num: int) -> tuple[Tensor, Tensor]:
        coin = (units(fs.fold_in(key, 0), num) < 0.5).long()
        return numbers(fs.fold_in(key, 1), num, 1) + apart * coin[:, None], coin

    def term(x: float) -> float:
        density = [math.exp(-((x - at) ** 2) / 2) / math.sqrt(2 * math.pi) for at in (0, apart)]
        return density[0] * math.log(2 * density[0] / sum(density))

    return Distribution(f"coin, Gaussians {apart} apart", "mixed", quad(term, -12, apart + 12)[0], draw)


def cubed(x: Tensor) -> Tensor:
    return x**3


DISTRIBUTIONS = [
    *(gaussian(dims, rho) for dims, rho in ((1, 0.0), (1, 0.3), (1, 0.6), (1, 0.9), (3, 0.0), (3, 0.6), (5, 0.6), (10, 0.3))),
    gaussian(1, 0.6, cubed, "cubed Gaussian"), gaussian(3, 0.6, torch.arcsinh, "arsinh of Gaussian"),
    uniform_noise(0.5), channel(2, 0.5), channel(2, 0.1), channel(8, 0.3), mixture(0.0), mixture(1.0), mixture(3.0),
]  # fmt: skip


def regression(x: Tensor, y: Tensor, key: fs.Key) -> float:
    seed = key.bits % 2**32
    return float(mutual_info_regression(x.numpy(), y[:, 0].numpy(), n_neighbors=5, random_state=seed)[0])


Estimator = Callable[[Tensor, Tensor, fs.Key], MutualInformation | float]
ESTIMATORS: dict[str, dict[str, Estimator]] = {
    "continuous": {
        "KSG": lambda x, y, key: mutual_information_ksg(x, y, key=key),
        "Gaussian": lambda x, y, _: mutual_information_gaussian(x, y),
        "Gaussian, shrunk": lambda x, y, _: mutual_information_gaussian(x, y, shrinkage="ledoit-wolf"),
        "InfoNCE": lambda x, y, key: mutual_information_infonce(x, y, key=key),
        "scikit-learn": regression,
    },
    "labels": {
        "Miller-Madow": lambda x, y, _: mutual_information_discrete(x, y),
        "plug-in": lambda x, y, _: mutual_information_discrete(x, y, correction="plug-in"),
    },
    "mixed": {"Ross": lambda x, y, key: mutual_information_ross(x, y, key=key)},
}


def rows(sizes: tuple[int, ...], num_keys: int, num_trained: int) -> Iterator[dict[str, str | float]]:
    for each in DISTRIBUTIONS:
        for name, estimator in ESTIMATORS[each.kind].items():
            if name == "scikit-learn" and " 1 + 1" not in each.name and "noise" not in each.name:
                continue
            for num in sizes:
                yield row(each, name, estimator, num, num_trained if name == "InfoNCE" else num_keys)


def row(each: Distribution, name: str, estimator: Estimator, num: int, num_keys: int) -> dict[str, str | float]:
    values, errors = [], []
    for i in range(num_keys):
        own = fs.fold_in(fs.key(i), each.name)
        made = estimator(*each.draw(own, num), own)
        values.append(float(made.value) if isinstance(made, MutualInformation) else made)
        errors.append(float(made.stderr) if isinstance(made, MutualInformation) else math.nan)
    beside = np.array(values) - each.truth
    covered = float((abs(beside) <= 1.96 * np.array(errors)).mean()) if np.isfinite(errors).all() else math.nan
    return {
        "distribution": each.name, "estimator": name, "n": num, "truth": each.truth, "bias": float(beside.mean()),
        "RMSE": float(np.sqrt((beside**2).mean())), "stderr": float(np.mean(errors)), "coverage": covered,
    }  # fmt: skip


def main(quick: bool) -> None:
    torch.set_num_threads(1)
    made = []
    print(
        f"{'distribution':34} {'estimator':17} {'n':>5} {'truth':>7} {'bias':>7} {'RMSE':>7} {'stderr':>7} {'covered':>7}"
    )
    for each in rows((200, 1000) if quick else (200, 1000, 5000), *((40, 6) if quick else (200, 20))):
        made.append(each)
        print(
            f"{each['distribution']:34} {each['estimator']:17} {each['n']:5} {each['truth']:7.3f} {each['bias']:7.3f} "
            f"{each['RMSE']:7.3f} {each['stderr']:7.3f} {each['coverage']:7.2f}",
            flush=True,
        )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(made, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main("quick" in sys.argv[1:])
