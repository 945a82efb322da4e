"""What the engine costs: against the pure calls, side by side in one run; a cached study; many checkpoints, cached.

OMP_NUM_THREADS=1 python bench/engine.py [overhead|cached|many]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import funcscope as fs
from funcscope.families import modular
from funcscope.families.family import Setup
from funcscope.study.cache import Cache
from funcscope.study.catalogue import CATALOGUE, metric
from funcscope.study.engine import run
from funcscope.study.metric import Metric
from funcscope.study.sources import Checkpoint, InMemory
from funcscope.study.training import trained

CHOSEN = {
    "mean_loss": {},
    "directional_losses": {"n_samples": 20},
    "landscape_flatness": {"n_directions": 20},
    "loss_landscape_2d": {"n_points": 9},
    "hessian_trace": {"num": 16},
    "sam_sharpness": {},
    "asam_sharpness": {},
    "average_sharpness": {"num": 16},
    "critical_sharpness": {},
    "effective_dimensionality": {},
}
FEW = {
    "directional_losses": {"n_samples": 4},
    "landscape_flatness": {"n_directions": 4},
    "loss_landscape_2d": {"n_points": 3},
    "hessian_eigenvalues": {"num": 1, "num_probes": 2, "steps": 5, "trace_matvecs": 4},
    "fisher_information": {"num": 1, "num_probes": 2, "steps": 5, "trace_matvecs": 4},
}
CACHED = """
import sys, time
start = time.perf_counter()
from pathlib import Path
from engine import every
from funcscope.study.analyze import checkpoints_of
from funcscope.study.cache import Cache
from funcscope.study.engine import run
imports = time.perf_counter() - start
folder = Path(sys.argv[1])
start = time.perf_counter()
outcomes = run(every(sys.argv[2]), checkpoints_of(folder / "run"), tasks=("train",), cache=Cache(folder / "cache"))
print(imports, time.perf_counter() - start, sum(o.reused for o in outcomes), len(outcomes))
"""


def every(which: str) -> list[Metric]:
    """All metrics of single models with small settings, or ten of them."""
    if which == "ten":
        return [metric(name).configured(**{**CHOSEN[name], **FEW.get(name, {})}) for name in CHOSEN]
    return [one.configured(**FEW.get(one.name, {})) for one in CATALOGUE.values() if one.on == "model"]


def family(folder: Path, num: int) -> list[Checkpoint]:
    """So many checkpoints of a small run, which is trained where it is not there."""
    steps = tuple(range(num))
    config = modular.Config(p=5, d_model=8, d_mlp=8, steps=max(steps))
    variant = trained(modular.FAMILY, Setup(config, steps), folder / "run", quiet=True)
    return [Checkpoint(str(variant.path), step) for step in steps]


def overhead(rounds: int = 5) -> None:
    """The engine with a cache on the disk, against the sum of the pure calls; alternating, the median of the ratios."""
    torch.manual_seed(0)
    net = fs.functional(torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 10)))
    batches = [(torch.randn(512, 64), torch.randint(10, (512,))) for _ in range(4)]
    loss = fs.objective(net, batches, fs.classification)
    chosen = [metric(name).configured(**settings) for name, settings in CHOSEN.items()]
    calls = [pure(one, loss) for one in chosen]
    ratios = []
    for turn in range(rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            alone = timed(lambda: [call() for call in calls])
            cache = Cache(Path(folder))
            engine = timed(lambda: run(chosen, [InMemory({"data": loss}, content="1")], cache=cache))  # noqa: B023
        if turn:  # the first one warms up
            ratios.append(engine / alone)
            print(f"pure {alone:.3f} s, engine {engine:.3f} s")
    print(f"engine / pure: median {statistics.median(ratios):.4f}, {min(ratios):.4f} to {max(ratios):.4f}")


def pure(one: Metric, loss: fs.Loss) -> Callable[[], object]:
    """A metric's function with its arguments, called as a user would."""
    theta = loss.net.theta
    needs = {"texts": "", "loss": loss, "theta": theta, "params": loss.layout.unravel(theta)}
    arguments = [needs[name] for name in one.needs if name != "key"]
    drawn = {"key": fs.key(42)} if "key" in one.needs else {}

    def call() -> object:
        value = one.call(*arguments, **drawn, **one.settings, **one.plan)
        return value if isinstance(value, fs.Result) else value.result(list(value.rows(0)))

    return call


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def cached(num: int, which: str) -> None:
    """A study made once here, then asked for again by a process of its own: its imports, and the call."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(every(which), family(folder, num), tasks=("train",), cache=Cache(folder / "cache"))
        print(f"{num} checkpoints, {which} metrics ({len(every(which))}); imports, call, reused, of:")
        for _ in range(3):
            command = [sys.executable, "-c", CACHED, name, which]
            shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
            print("  " + " ".join(f"{float(each):.3f}" for each in shown.stdout.split()))


if __name__ == "__main__":
    parts = {"overhead": overhead, "cached": lambda: cached(3, "all"), "many": lambda: cached(100, "ten")}
    for part in sys.argv[1:] or parts:
        parts[part]()
